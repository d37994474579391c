"""Feature maps as kernels write them. Needs no Triton: the operators describe their results by it as well."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

Layout = tuple[tuple[int, ...], tuple[int, ...]]  # size and strides


def empty_map(like: Tensor, channels: int, height: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
    """(B, channels, height, width) with the batch, device and dtype of `like`, channels-last, uninitialized.

    No view: PyTorch forbids users to write into views that an operator returns.
    """
    size = (like.shape[0], channels, height, width)
    return torch.empty(size, dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last)


def dense(*size: int) -> Layout:
    return size, tuple(math.prod(size[axis + 1 :]) for axis in range(len(size)))


def channels_last(batch: int, channels: int, height: int, width: int) -> Layout:
    return (batch, channels, height, width), (height * width * channels, 1, width * channels, channels)


def boxes(like: Tensor, size: Sequence[int], block: Sequence[int]) -> Callable[[Tensor], Any]:
    """Makes tensor descriptors, in blocks, of dense tensors with the dtype of `like`. Only their base differs: what is
    common is their class's, as Triton's constructor takes the host ten times as long."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    def init(self: Any, base: Tensor) -> None:
        self.base = base

    whole = TensorDescriptor(like, list(size), list(dense(*size)[1]), list(block))
    return type("Boxes", (TensorDescriptor,), {**vars(whole), "base": None, "__init__": init})


def empties(like: Tensor, layout: Layout, dtype: torch.dtype | None = None) -> Callable[[], Tensor]:
    """Makes uninitialized tensors on the device of `like`, which is to be the current one when they are made.

    With what torch.compile's own code calls, where PyTorch has it: `torch.empty_strided` takes the host twice as long.
    It passes by the dispatcher, so that no transform or mode would see it, and does not fill memory as PyTorch does
    where its algorithms shall be deterministic.
    """
    device, dtype = like.device.type, dtype or like.dtype
    allocate = getattr(torch._C._dynamo.guards, f"_empty_strided_{device}", None)
    if allocate is None or torch.are_deterministic_algorithms_enabled():
        return partial(torch.empty_strided, *layout, dtype=dtype, device=device)
    return partial(allocate, *layout, dtype)


def result_size(x: Tensor, weight: Tensor, geometry: Any) -> list[int]:
    """[height, width] of the result of a convolution; geometry: its stride, padding and dilation, in pairs."""
    return [
        (x.shape[a] + 2 * padding - dilation * (weight.shape[a] - 1) - 1) // stride + 1
        for a, stride, padding, dilation in zip((-2, -1), *geometry, strict=True)
    ]


def common_padding(around: Sequence[tuple[int, int]]) -> tuple[tuple[int, ...], list[int]]:
    """How a convolution pads a map that `around` says what is added to, (before, after) of its height and width: its
    padding of both sides alike, and what `F.pad` adds before where they differ (left, right, top, bottom)."""
    padding = [before if before == after >= 0 else 0 for before, after in around]
    pads = [side - padding[axis] for axis in (1, 0) for side in around[axis]]
    return tuple(padding), pads


def order_of(x: Tensor) -> tuple[int, ...]:
    """Dimensions of x (B, ...): the batch, then those of an image from the slowest to the fastest in memory."""
    if x.dim() <= 2 or x.is_contiguous():
        return tuple(range(x.dim()))
    return 0, *sorted(range(1, x.dim()), key=x.stride().__getitem__, reverse=True)


def empty_in_order(x: Tensor, order: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Like x (B, ...), dense, with its dimensions in that order in memory, uninitialized."""
    if order == tuple(range(x.dim())):
        return torch.empty(x.shape, dtype=dtype, device=x.device)
    strides = [1] * x.dim()
    step = 1
    for axis in reversed(order):
        strides[axis] = step
        step *= x.shape[axis]
    return torch.empty_strided(x.shape, strides, dtype=dtype, device=x.device)
