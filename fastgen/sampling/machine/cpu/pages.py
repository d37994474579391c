"""Gives memory on pages of 2 MiB, where the system has them: `LargePages`.

A step reads all weights of a network once, megabytes of them, and activations all over an image. The processor keeps
too few addresses of pages of 4 KiB for so many, and would look most of them up again at every step.
"""

import mmap

import torch
from torch import Tensor

PAGE = 2**21  # bytes
LINE = 64  # bytes, of a cache
AT_ONCE = 2 * PAGE  # that are asked of the system, at least


class LargePages:
    """Pieces are handed out one after the other, and live as long as their tensors."""

    def __init__(self) -> None:
        self._left = torch.empty(0, dtype=torch.uint8)

    def take(self, size: int, dtype: torch.dtype) -> Tensor:
        """(size,) zeros."""
        count = size * dtype.itemsize
        room = -(-count // LINE) * LINE
        if len(self._left) < room:
            self._left = _fresh(max(room, AT_ONCE))
        found, self._left = self._left[:count], self._left[room:]
        return found.view(dtype)


def _fresh(count: int) -> Tensor:
    """Bytes, all zero."""
    try:
        memory = mmap.mmap(-1, count + PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
    except (AttributeError, OSError):  # another system than Linux, or a kernel without such pages
        return torch.zeros(count, dtype=torch.uint8)
    found = torch.frombuffer(memory, dtype=torch.uint8)
    first = -found.data_ptr() % PAGE
    return found[first : first + count]
