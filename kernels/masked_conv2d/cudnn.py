"""The same operation by cuDNN, for the layers where it is expected or was measured to be faster than the kernels.

It convolves with zeros for what is masked: with the whole weight, or with the smallest box of taps that holds all live
weights (the upper two of three rows, say), which reads nothing of what the box leaves out. Weights are channels-last,
so that cuDNN reads and writes channels-last maps.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgen.kernels.masked_conv2d.walk import Geometry

Box = tuple[int, int, int, int] | None  # (top, bottom, left, right); None: the whole weight


def cropped(weight: Tensor, mask: Tensor | None, box: Box, geometry: Geometry) -> tuple[Tensor, list[int], list[int]]:
    """(live weights of the box, padding that the convolution adds, padding added to x before: left, right, ...)."""
    live = weight if mask is None else torch.where(mask, weight, 0)
    height, width = weight.shape[2:]
    top, bottom, left, right = box or (0, height, 0, width)
    pads: list[int] = []
    padding: list[int] = []
    for axis, before, after in ((1, left, width - right), (0, top, height - bottom)):
        first = geometry.padding[axis] - before * geometry.dilation[axis]
        last = geometry.padding[axis] - after * geometry.dilation[axis]
        shared = first if first == last >= 0 else 0
        padding.insert(0, shared)
        pads += [first - shared, last - shared]
    return live[:, :, top:bottom, left:right].contiguous(memory_format=torch.channels_last), padding, pads


def forward(
    x: Tensor, weight: Tensor, mask: Tensor | None, box: Box, geometry: Geometry, bias: Tensor | None,
    condition: Tensor | None, residual: Tensor | None, other: Tensor | None, other_weight: Tensor | None,
    activation: str, keep: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The result and what is kept, both channels-last; PyTorch computes what follows the sums."""
    live, padding, pads = cropped(weight, mask, box, geometry)
    padded = F.pad(x, pads) if any(pads) else x
    pre = F.conv2d(padded, live, bias, geometry.stride, padding, geometry.dilation)
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
    return out, kept.contiguous(memory_format=torch.channels_last) if keep else out


def input_gradient(
    grad: Tensor, size: tuple[int, ...], weight: Tensor, mask: Tensor | None, box: Box, geometry: Geometry
) -> Tensor:
    """The gradient of an input (B, I, H, W) from that of the sums, channels-last."""
    live, padding, pads = cropped(weight, mask, box, geometry)
    height, width = size[2] + pads[2] + pads[3], size[3] + pads[0] + pads[1]
    padded = grad.new_empty(1).expand(*size[:2], height, width)
    gradient = torch.ops.aten.convolution_backward(
        grad, padded, live, None, geometry.stride, padding, geometry.dilation, False, [0, 0], 1, [True, False, False]
    )[0]
    gradient = F.pad(gradient, [-pad for pad in pads]) if any(pads) else gradient
    return gradient.contiguous(memory_format=torch.channels_last)


def weight_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor | None, box: Box, geometry: Geometry
) -> Tensor:
    """The gradient of the weight from that of the sums, contiguous, zero where masked."""
    live, padding, pads = cropped(weight, mask, box, geometry)
    padded = F.pad(x, pads) if any(pads) else x
    live_gradient = torch.ops.aten.convolution_backward(
        grad, padded, live, None, geometry.stride, padding, geometry.dilation, False, [0, 0], 1, [False, True, False]
    )[1]
    top, bottom, left, right = box or (0, weight.shape[2], 0, weight.shape[3])
    gradient = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    gradient[:, :, top:bottom, left:right] = live_gradient
    return gradient if mask is None else torch.where(mask, gradient, 0).contiguous()
