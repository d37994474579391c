"""How tensors lie in memory, and what kernels are launched with: results to be, boxes of pixels, tensor descriptors."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgen.kernels.common import cdiv, prepare
from fastgen.kernels.masked_conv2d.config import Tile

Layout = tuple[tuple[int, ...], tuple[int, ...]]  # size and strides, for `new_empty_strided`, which is the fastest


def dense(*size: int) -> Layout:
    return size, tuple(math.prod(size[axis + 1 :]) for axis in range(len(size)))


def channels_last(batch: int, channels: int, height: int, width: int) -> Layout:
    return (batch, channels, height, width), (height * width * channels, 1, width * channels, channels)


def as_map(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


class Launches:
    """Launches of one kernel in which only the tensors differ."""

    __slots__ = ("arguments", "constants", "grid", "kernel", "ready")

    def __init__(self, kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], **constants: Any) -> None:
        self.kernel, self.grid, self.arguments, self.constants = kernel, grid, arguments, constants
        self.ready: Any = None

    def __call__(self, *tensors: Any) -> None:
        arguments = tensors + self.arguments
        if self.ready is None:
            self.ready = prepare(self.kernel, arguments, self.constants)
        self.ready(self.grid, arguments)


class Boxes:
    """Makes tensor descriptors of dense tensors of one kind, in blocks; Triton's constructor takes the host longer."""

    __slots__ = ("fields", "kind")

    def __init__(self, like: Tensor, sizes: Sequence[int], block: list[int]) -> None:
        from triton.tools.tensor_descriptor import TensorDescriptor

        self.kind = TensorDescriptor
        size, strides = dense(*sizes)
        self.fields = {**vars(TensorDescriptor(like, list(size), list(strides), block)), "base": None}

    def __call__(self, x: Tensor) -> Any:
        descriptor = object.__new__(self.kind)
        descriptor.__dict__.update(self.fields)
        descriptor.base = x
        return descriptor


def boxes_of(x: Tensor, box: tuple[int, ...], channels: int) -> Boxes:
    batch, all_channels, height, width = x.shape
    return Boxes(x, [batch, height, width, all_channels], [*box, channels])


def boxes_of_result(x: Tensor, halves: int, box: tuple[int, ...], channels: int) -> Boxes:
    batch, all_rows, height, width = x.shape
    return Boxes(x, [batch, height, width, halves, all_rows // halves], [*box, 1, channels])


def box_of(pixels: int, batch: int, height: int, width: int) -> tuple[int, int, int]:
    """(images, rows, columns) of a box of `pixels` pixels, all powers of two, of which the fewest boxes are needed."""
    powers = [1 << i for i in range(pixels.bit_length())]
    shapes = [(pixels // (high * wide), high, wide) for wide in powers for high in powers if high * wide <= pixels]
    # Among equals the widest, whose pixels lie side by side.
    return min(shapes, key=lambda s: (cdiv(batch, s[0]) * cdiv(height, s[1]) * cdiv(width, s[2]), -s[2], -s[1]))


def blocks_of(tile: Tile, batch: int, height: int, width: int) -> tuple[tuple[int, int, int], int, int, int]:
    """How the pixels of a map are divided: (box as the kernels take it, boxes across, boxes down, number of blocks)."""
    if not tile.tma:
        return (tile.M, 0, 0), 1, 1, cdiv(batch * height * width, tile.M)
    box = box_of(tile.M, batch, height, width)
    across, down = cdiv(width, box[2]), cdiv(height, box[1])
    return box, across, down, cdiv(batch, box[0]) * across * down


def unit_of(x: Tensor, *counts: int) -> int:
    """Elements of 16 bytes where the address and all counts are multiples of them, else 1."""
    unit = 16 // x.element_size()
    return 1 if x.data_ptr() % 16 or any(n % unit for n in counts) else unit
