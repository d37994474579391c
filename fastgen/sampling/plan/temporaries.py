"""Takes programs; gives the blocks that their scratch memory shares: one serves again once it is read no more."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from fastgen.sampling.machine.language import Memory, View, lives


@dataclass
class Scratch:
    """Attributes:
    block_of: for every program, a scratch memory -> number of its block.
    sizes: of the blocks, numbers an image.
    dtypes: of the blocks.
    """

    block_of: list[dict[Memory, int]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    dtypes: list[torch.dtype] = field(default_factory=list)


def share_scratch(programs: Iterable[Iterable[Sequence[View]]]) -> Scratch:
    """One set of blocks for all programs, of which one runs at a time: for each, the views that its instructions
    read and write."""
    found = Scratch()
    for program in programs:
        used = ([view.memory for view in views if view.memory.kind == "scratch"] for views in program)
        blocks: dict[Memory, int] = {}
        free = set(range(len(found.sizes)))
        ending: dict[int, list[int]] = {}
        for memory, (first, last) in lives(used).items():
            for end in [end for end in ending if end < first]:
                free.update(ending.pop(end))
            number = blocks[memory] = _take(found, free, memory)
            ending.setdefault(last, []).append(number)
        found.block_of.append(blocks)
    return found


def _take(found: Scratch, free: set[int], memory: Memory) -> int:
    """The free block that fits best, grown where none is large enough; a new one where none is free."""
    fitting = [number for number in free if found.dtypes[number] == memory.dtype]
    if not fitting:
        found.sizes.append(0)
        found.dtypes.append(memory.dtype)
        fitting = [len(found.sizes) - 1]
    number = min(fitting, key=lambda one: (found.sizes[one] < memory.numel, abs(found.sizes[one] - memory.numel), one))
    found.sizes[number] = max(found.sizes[number], memory.numel)
    free.discard(number)
    return number
