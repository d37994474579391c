"""The same operation by cuDNN, for the layers where it is expected or was measured to be faster than the kernels.

It convolves with the smallest box of taps that holds all live weights (the upper two of three rows, say), with zeros
for those of the box that are masked. Weights are channels-last, so that cuDNN reads and writes channels-last maps.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgen.kernels.masked_conv2d.walk import Geometry, Walk


class Cropped:
    """A convolution with the live weights of a box. pads: what is added to the map before (left, right, top, bottom)
    where the two sides differ."""

    def __init__(self, weight: Tensor, mask: Tensor | None, walk: Walk, geometry: Geometry) -> None:
        self.mask, self.live_taps = mask, walk.live
        self.box = (slice(None), slice(None), slice(*walk.box[:2]), slice(*walk.box[2:]))
        live = weight if mask is None else torch.where(mask, weight, 0)
        self.live = live[self.box].contiguous(memory_format=torch.channels_last)
        self.pads: list[int] = []
        padding: list[int] = []
        for axis in (1, 0):
            dilation, around = geometry.dilation[axis], geometry.padding[axis]
            before = around - walk.box[2 * axis] * dilation
            after = around - (weight.shape[2 + axis] - walk.box[2 * axis + 1]) * dilation
            shared = before if before == after >= 0 else 0
            padding.insert(0, shared)
            self.pads += [before - shared, after - shared]
        self.geometry = (geometry.stride, padding, geometry.dilation)

    def padded(self, x: Tensor, sign: int = 1) -> Tensor:
        return F.pad(x, [sign * pad for pad in self.pads]) if any(self.pads) else x

    def gradients(self, grad: Tensor, padded: Tensor, wanted: list[bool]) -> Any:
        return torch.ops.aten.convolution_backward(
            grad, padded, self.live, None, *self.geometry, False, [0, 0], 1, [*wanted, False]
        )


def forward(
    x: Tensor, cropped: Cropped, activation: str, keep: str, bias: Tensor | None = None,
    condition: Tensor | None = None, residual: Tensor | None = None, other: Tensor | None = None,
    other_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The result and what is kept, both channels-last; PyTorch computes what follows the sums."""
    pre = F.conv2d(cropped.padded(x), cropped.live, bias, *cropped.geometry)
    if other is not None and other_weight is not None:
        pre = pre + F.conv2d(other, other_weight)
    if condition is not None:
        pre = pre + condition[:, :, None, None]
    out, kept = pre, pre
    if activation == "relu":
        out = pre.relu()
    if activation == "gated":
        signal, valve = pre.chunk(2, 1)
        out = signal.tanh() * valve.sigmoid()
        kept = valve if keep == "valve" else pre
    if residual is not None:
        out = out + residual
    out = out.contiguous(memory_format=torch.channels_last)
    return out, kept.contiguous(memory_format=torch.channels_last) if keep else None


def input_gradient(grad: Tensor, size: tuple[int, ...], cropped: Cropped) -> Tensor:
    """The gradient of an input (B, I, H, W) from that of the sums, channels-last."""
    left, right, top, bottom = cropped.pads
    padded = grad.new_empty(1).expand(*size[:2], size[2] + top + bottom, size[3] + left + right)
    gradient = cropped.padded(cropped.gradients(grad, padded, [True, False])[0], -1)
    return gradient.contiguous(memory_format=torch.channels_last)


def weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, cropped: Cropped) -> Tensor:
    """The gradient of the weight from that of the sums, contiguous, zero where masked."""
    gradient = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    if not cropped.live_taps:
        return gradient
    gradient[cropped.box] = cropped.gradients(grad, cropped.padded(x), [False, True])[1]
    return gradient if cropped.mask is None else torch.where(cropped.mask, gradient, 0).contiguous()
