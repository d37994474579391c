"""Shares the scratch memory of programs: a block serves again as soon as nothing reads what is in it."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from fastgen.sampling.plan.program import Memory, Program


@dataclass
class Scratch:
    """Attributes:
    block_of: id of a scratch memory -> number of its block.
    sizes: of the blocks, numbers an image.
    dtypes: of the blocks.
    """

    block_of: dict[int, int] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)
    dtypes: list[torch.dtype] = field(default_factory=list)


def share_scratch(programs: Iterable[Program]) -> Scratch:
    """One set of blocks for all programs, of which one runs at a time."""
    found = Scratch()
    for program in programs:
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        memories: dict[int, Memory] = {}
        for k, instruction in enumerate(program.instructions):
            for view in instruction.views():
                if view.memory.kind == "scratch":
                    memories[id(view.memory)] = view.memory
                    first.setdefault(id(view.memory), k)
                    last[id(view.memory)] = k
        free = set(range(len(found.sizes)))
        ending: dict[int, list[int]] = {}
        for key, begin in sorted(first.items(), key=lambda item: item[1]):
            for end in [end for end in ending if end < begin]:
                free.update(ending.pop(end))
            number = _take(found, free, memories[key])
            found.block_of[key] = number
            ending.setdefault(last[key], []).append(number)
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
