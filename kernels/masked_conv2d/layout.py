"""How tensors lie in memory: what kernels are launched with, tensor descriptors, units of 16 bytes, results to be."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgen.kernels.common import cdiv, prepare


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
    """Makes tensor descriptors of tensors of one kind, in blocks; Triton's own constructor takes the host longer."""

    __slots__ = ("fields", "kind")

    def __init__(self, like: Tensor, sizes: Sequence[int], strides: Sequence[int], block: list[int]) -> None:
        from triton.tools.tensor_descriptor import TensorDescriptor

        self.kind = TensorDescriptor
        self.fields = {**vars(TensorDescriptor(like, list(sizes), list(strides), block)), "base": None}

    def __call__(self, x: Tensor) -> Any:
        descriptor = object.__new__(self.kind)
        descriptor.__dict__.update(self.fields)
        descriptor.base = x
        return descriptor


def boxes_of_map(x: Tensor, box: tuple[int, ...], channels: int) -> Boxes:
    order = (0, 2, 3, 1)
    return Boxes(x, [x.shape[a] for a in order], [x.stride(a) for a in order], [*box, channels])


def boxes_of_result(x: Tensor, halves: int, box: tuple[int, ...], channels: int) -> Boxes:
    """Of a channels-last map whose channels are `halves` times as many."""
    batch, all_rows, height, width = x.shape
    rows = all_rows // halves
    strides = [height * width * all_rows, width * all_rows, all_rows, rows, 1]
    return Boxes(x, [batch, height, width, halves, rows], strides, [*box, 1, channels])


def box_of(pixels: int, batch: int, height: int, width: int) -> tuple[int, int, int]:
    """(images, rows, columns) of a box of `pixels` pixels, all powers of two, of which the fewest boxes are needed."""
    powers = [1 << i for i in range(pixels.bit_length())]
    shapes = [(pixels // (high * wide), high, wide) for wide in powers for high in powers if high * wide <= pixels]
    # Among equals the widest, whose pixels lie side by side.
    return min(shapes, key=lambda s: (cdiv(batch, s[0]) * cdiv(height, s[1]) * cdiv(width, s[2]), -s[2], -s[1]))


def side_by_side(x: Tensor) -> bool:
    """Whether the channels of a map (B, C, H, W) lie side by side."""
    return x.stride(1) == 1 or x.shape[1] == 1


def unit_of(x: Tensor, *counts: int) -> int:
    """Elements of 16 bytes where all strides of the pixels, counts and the address are multiples of them, else 1."""
    unit = 16 // x.element_size()
    steps = (x.stride(axis) for axis in (0, 2, 3) if x.shape[axis] > 1)
    return 1 if x.data_ptr() % 16 or any(n % unit for n in (*steps, *counts)) else unit


def pixel_steps(x: Tensor | None, unit: int) -> tuple[int, ...]:
    """Strides of images, rows and columns, in units."""
    return (0, 0, 0) if x is None else tuple(0 if x.shape[a] == 1 else x.stride(a) // unit for a in (0, 2, 3))


# Sizes and strides are found once for `new_empty_strided`, which takes the host a third of what `torch.empty` takes.
Layout = tuple[tuple[int, ...], tuple[int, ...]]


def channels_last(batch: int, channels: int, height: int, width: int) -> Layout:
    return (batch, channels, height, width), (height * width * channels, 1, width * channels, channels)


def contiguous(*size: int) -> Layout:
    return size, tuple(math.prod(size[axis + 1 :]) for axis in range(len(size)))


# --- how tensors must lie


def as_map(x: Tensor) -> Tensor:
    """x (B, C, H, W) with its channels side by side."""
    return x if side_by_side(x) else x.contiguous(memory_format=torch.channels_last)


def as_input(x: Tensor) -> Tensor:
    """As `as_map`, but that the few channels of an image are read as they lie."""
    return x if x.shape[1] < 16 else as_map(x)


def as_weight(weight: Tensor) -> Tensor:
    """Contiguous, or channels-last."""
    return weight if weight.is_contiguous(memory_format=torch.channels_last) else weight.contiguous()
