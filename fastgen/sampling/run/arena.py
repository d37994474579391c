"""All memory of a plan in two blocks, of float32 and of int64: an address is a number of one of them.

Numbers in half precision, and conditions, lie among the float32 ones, which hold them as they are.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from fastgen.sampling.machine.language import Memory
from fastgen.sampling.machine.parts import HALF
from fastgen.sampling.plan.plan import Plan
from fastgen.sampling.run.memory import PlanMemory, Sizes

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
        self._constants = constants
        super().__init__(plan, n, device)

    def allocated(self, sizes: Sizes) -> dict[Memory | int, Tensor]:
        rows: dict[Memory | int, tuple[int, int, torch.dtype]] = {one: (self.n, *sizes[one]) for one in sizes}
        shared = []
        for memory in self._constants:
            dtype = self.held.get(memory.dtype, memory.dtype)
            if dtype in (torch.float32, torch.int64):
                shared.append(memory)
                rows[memory] = (1, memory.numel, dtype)
        taken = {torch.float32: ALIGNED, torch.int64: ALIGNED}
        begins: dict[Memory | int, int] = {}
        for one, (count, size, dtype) in rows.items():
            begins[one] = taken.setdefault(dtype, ALIGNED)
            taken[dtype] += -(-count * size // ALIGNED) * ALIGNED
        self.arenas = {dtype: torch.zeros(size, dtype=dtype, device=self.device) for dtype, size in taken.items()}
        found = {
            one: self.arenas[dtype].narrow(0, begins[one], count * size).view(count, size)
            for one, (count, size, dtype) in rows.items()
        }
        for memory in shared:
            assert memory.data is not None
            found[memory].copy_(memory.data.view(1, -1))
        return found


def images_that_fit(plan: Plan, device: torch.device) -> int | None:
    """The most images whose memory the device has; None where nothing is known of it."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    of_image = plan.bytes_of_image * (2 if plan.computes_in_half else 1)  # where half precision is held as float32
    return max(1, int(SHARE_OF_MEMORY * free) // max(1, of_image))
