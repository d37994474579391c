"""The same products by cuDNN, for the layers where it is expected or was measured to be faster than the kernels.

It convolves with the smallest box of taps that holds all live weights (the upper two of three rows, say), with zeros
for those of the box that are masked. Weights are channels-last, so that cuDNN reads and writes channels-last maps.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgen.kernels.maps import common_padding
from fastgen.kernels.masked_conv2d.walk import Walk


def cropped(weight: Tensor, mask: Tensor | None, walk: Walk) -> tuple[Tensor, list[Any], list[int]]:
    """(live weights of the box, zero where masked; stride, padding, dilation; what `F.pad` adds to the map before)."""
    top, bottom, left, right = walk.box
    live = weight if mask is None or not walk.masked else torch.where(mask, weight, 0)
    stride, padding, dilation = walk.geometry
    sides = zip(padding, dilation, weight.shape[2:], (top, left), (bottom, right), strict=True)
    common, pads = common_padding([(p - first * d, p - (size - last) * d) for p, d, size, first, last in sides])
    live = live[:, :, top:bottom, left:right].contiguous(memory_format=torch.channels_last)
    return live, [stride, common, dilation], pads


def padded(x: Tensor, pads: list[int]) -> Tensor:
    return F.pad(x, pads) if any(pads) else x  # which copies also where it adds nothing


def gradients(grad: Tensor, x: Tensor, live: Tensor, geometry: list[Any], wanted: list[bool]) -> Any:
    return torch.ops.aten.convolution_backward(grad, x, live, None, *geometry, False, [0, 0], 1, [*wanted, False])


def forward(
    x: Tensor, weight: Tensor, mask: Tensor | None, walk: Walk, activation: str, keep: str, bias: Tensor | None = None,
    *added: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The result and what is kept, both channels-last."""
    live, geometry, pads = cropped(weight, mask, walk)
    out, kept = finish(F.conv2d(padded(x, pads), live, bias, *geometry), activation, keep, *added)
    out = out.contiguous(memory_format=torch.channels_last)
    return out, None if kept is None else kept.contiguous(memory_format=torch.channels_last)


def finish(pre, activation, keep, condition=None, residual=None, other=None, other_weight=None):
    """The result and what is kept (None for ""), in PyTorch from the convolution with its bias."""
    if condition is not None:
        pre = pre + condition[:, :, None, None]
    if other is not None:
        pre = pre + F.conv2d(other, other_weight)
    out = pre.relu() if activation == "relu" else pre
    if activation == "gated":
        signal, valve = pre.chunk(2, 1)
        out = signal.tanh() * valve.sigmoid()
        pre = valve if keep == "valve" else pre
    return out if residual is None else out + residual, pre if keep else None


def input_gradient(grad: Tensor, weight: Tensor, mask: Tensor | None, walk: Walk, size: tuple[int, ...]) -> Tensor:
    """The gradient of an input (B, I, H, W) from that of the sums, channels-last."""
    live, geometry, pads = cropped(weight, mask, walk)
    left, right, top, bottom = pads
    x = grad.new_empty(1).expand(*size[:2], size[2] + top + bottom, size[3] + left + right)
    gradient = padded(gradients(grad, x, live, geometry, [True, False])[0], [-pad for pad in pads])
    return gradient.contiguous(memory_format=torch.channels_last)


def weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor | None, walk: Walk) -> Tensor:
    """The gradient of the weight from that of the sums, contiguous, zero where masked."""
    gradient = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    if not walk.live:
        return gradient
    live, geometry, pads = cropped(weight, mask, walk)
    top, bottom, left, right = walk.box
    gradient[:, :, top:bottom, left:right] = gradients(grad, padded(x, pads), live, geometry, [False, True])[1]
    return gradient if mask is None or not walk.masked else torch.where(mask, gradient, 0)
