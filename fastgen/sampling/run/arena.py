"""All memory of a plan in two blocks, of float32 and of int64: an address is a number of one of them.

Numbers in half precision, and conditions, lie among the float32 ones, which hold them as they are.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from fastgen.sampling.machine.language import Memory
from fastgen.sampling.machine.parts import HALF
from fastgen.sampling.plan.plan import Plan
from fastgen.sampling.run.memory import PlanMemory, pitch

ALIGNED = 16  # numbers
SHARE_OF_MEMORY = 0.5  # of a device's free memory that one batch may take


class ArenaMemory(PlanMemory):
    """Attributes:
    arenas: by dtype. The first numbers are 0 and belong to nothing.

    Args:
        plan, n, device: as in `PlanMemory`.
        constants: that lie in the arenas, too; others lie where they like.
    """

    held = dict.fromkeys((*HALF, torch.bool), torch.float32)

    def __init__(self, plan: Plan, n: int, device: torch.device, constants: Iterable[Memory]) -> None:
        self._shared = {one for one in constants if self._held_as(one.dtype) in (torch.float32, torch.int64)}
        sizes = defaultdict(lambda: ALIGNED, dict.fromkeys((torch.float32, torch.int64), ALIGNED))
        for size, dtype in zip(plan.scratch.sizes, map(self._held_as, plan.scratch.dtypes), strict=True):
            sizes[dtype] += _room(n * pitch(size))
        lasting = (plan.levels, *plan.leaves, *plan.output.values, *plan.storage.stored)
        memories = {*plan.storage.memories.values(), *(plan.storage.memory(value) for value in lasting)}
        for memory in (one for one in memories if one.kind == "stored"):
            dtype = self._held_as(memory.dtype)
            sizes[dtype] = sizes.get(dtype, 0) + _room(n * pitch(plan.rings.get(memory, memory).numel))
        for memory in self._shared:
            sizes[self._held_as(memory.dtype)] += _room(memory.numel)
        self.arenas = {dtype: torch.zeros(size, dtype=dtype, device=device) for dtype, size in sizes.items()}
        self._taken = dict.fromkeys(self.arenas, ALIGNED)
        super().__init__(plan, n, device)

    def allocate(self, size: int, dtype: torch.dtype) -> Tensor:
        dtype = self._held_as(dtype)
        begin = self._taken[dtype]
        self._taken[dtype] += _room(size)
        return self.arenas[dtype][begin : begin + size]

    def block(self, memory: Memory, program: int = 0) -> Tensor:
        if memory in self._shared and memory not in self._blocks:
            assert memory.data is not None
            self._blocks[memory] = self.allocate(memory.numel, memory.dtype).view(1, -1)
            self._blocks[memory].copy_(memory.data.view(1, -1))
        return super().block(memory, program)

    def _held_as(self, dtype: torch.dtype) -> torch.dtype:
        return self.held.get(dtype, dtype)


def _room(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def images_that_fit(plan: Plan, device: torch.device) -> int | None:
    """The most images whose memory the device has; None where nothing is known of it."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    of_image = plan.bytes_of_image * (2 if plan.computes_in_half else 1)  # where half precision is held as float32
    return max(1, int(SHARE_OF_MEMORY * free) // max(1, of_image))
