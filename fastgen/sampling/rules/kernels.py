"""Weights of a convolution as its parts need them, and the functions of tensors (n, N, C, ...) that the parts are."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, eq=False)
class Packed:
    """Weights (O, I, *kernel) of a part, and where it begins in the input channels and in the kernel."""

    weight: Tensor
    first: tuple[int, ...]
    matrix: Tensor
    parts: dict[Any, Tensor]

    @staticmethod
    def of(weight: Tensor, first: tuple[int, ...], any_live: Tensor) -> "Packed | None":
        if not bool(any_live):
            return None
        weight = weight.contiguous()
        matrix = weight.flatten(2).permute(2, 1, 0).flatten(0, 1).contiguous()
        return Packed(weight, first, matrix, {})

    def part(self, k: int, rows: Tensor) -> Tensor:
        return self.parts.setdefault(k, rows[k])

    def slice(self, taps: tuple[int, ...], index: tuple[Any, ...]) -> Tensor:
        if taps not in self.parts:
            self.parts[taps] = self.weight[index].contiguous()
        return self.parts[taps]


def extent(live: Tensor) -> tuple[int, int]:
    """The first live place, and the one after the last."""
    places = torch.nonzero(live).flatten()
    return (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 1)


def fill(out: Tensor, value: Tensor | float) -> Tensor:
    return out.copy_(value) if isinstance(value, Tensor) else out.fill_(value)


def select(found: Tensor, start: int, size: int, step: int) -> Tensor:
    return found[:, :, start : start + (size - 1) * step + 1 : step]


@dataclass(frozen=True)
class Slab:
    """A convolution without padding of x (n, N, I, ...), plus a bias (O,) or a map: (n, N, O, ...)."""

    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def __call__(self, x: Tensor, weight: Tensor, added: Tensor | None, out: Tensor | None = None) -> Tensor:
        images, batch = x.shape[:2]
        no = [0] * len(self.stride)
        bias = added if added is not None and added.dim() == 1 else None
        found = torch.convolution(
            x.flatten(0, 1), weight, bias, self.stride, no, self.dilation, False, no, self.groups
        ).unflatten(0, (images, batch))
        if added is not None and bias is None:
            return torch.add(found, added, out=out)
        return found if out is None else out.copy_(found)


def convolve_transposed(
    x: Tensor, weight: Tensor, *, stride: list[int], dilation: list[int], groups: int, cuts: list[tuple[int, int, int]]
) -> Tensor:
    images, batch = x.shape[:2]
    rank = len(stride)
    extra = []
    for d, (first, size, step) in enumerate(cuts):
        room = (x.shape[3 + d] - 1) * stride[d] + dilation[d] * (weight.shape[2 + d] - 1) + 1
        extra.append(max(0, first + (size - 1) * step + 1 - room))
    found = torch.convolution(x.flatten(0, 1), weight, None, stride, [0] * rank, dilation, True, [0] * rank, groups)
    if any(extra):
        found = F.pad(found, [pad for one in reversed(extra) for pad in (0, one)])
    cut = tuple(slice(first, first + (size - 1) * step + 1, step) for first, size, step in cuts)
    return found[(slice(None), slice(None), *cut)].unflatten(0, (images, batch))


def project(x: Tensor, weight: Tensor, *, groups: int) -> Tensor:
    """x (n, N, I), weight (I, O / groups) -> (n, N, O)"""
    if groups == 1:
        return x @ weight
    parts = x.unflatten(-1, (groups, -1)).unsqueeze(-2) @ weight.unflatten(0, (groups, -1))
    return parts.squeeze(-2).flatten(-2)
