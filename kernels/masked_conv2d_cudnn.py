"""The same operation by cuDNN, for the layers where it was measured faster than the kernels on this GPU.

"dense" convolves with zeros for what is masked; "cropped" with the smallest box of taps that holds all live weights
(the upper two of three rows, say), which reads nothing of what the box leaves out.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgen.kernels.masked_conv2d_plan import Geometry


def _cropped(
    x: Tensor, weight: Tensor, mask: Tensor | None, box: tuple[int, int, int, int] | None, geometry: Geometry
) -> tuple[Tensor, Tensor, list[int], list[int]]:
    """(padded x, live weights of the box, padding that the convolution adds, padding added to x: left, right, ...)."""
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
    padded = F.pad(x, pads) if any(pads) else x
    return padded, live[:, :, top:bottom, left:right], padding, pads


def sums(
    x: Tensor, weight: Tensor, mask: Tensor | None, box: tuple[int, int, int, int] | None, geometry: Geometry
) -> Tensor:
    """The convolution without bias, (B, O, H', W'); box None: dense."""
    padded, live, padding, _ = _cropped(x, weight, mask, box, geometry)
    return F.conv2d(padded, live, None, geometry.stride, padding, geometry.dilation)


def input_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    box: tuple[int, int, int, int] | None,
    geometry: Geometry,
) -> Tensor:
    """The gradient of x from that of the sums."""
    padded, live, padding, pads = _cropped(x, weight, mask, box, geometry)
    of_x = _backward(grad, padded, live, padding, geometry, [True, False, False])[0]
    return F.pad(of_x, [-pad for pad in pads]) if any(pads) else of_x


def weight_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    box: tuple[int, int, int, int] | None,
    geometry: Geometry,
) -> Tensor:
    """The gradient of the weight from that of the sums, contiguous, zero where masked."""
    padded, live, padding, _ = _cropped(x, weight, mask, box, geometry)
    of_live = _backward(grad, padded, live, padding, geometry, [False, True, False])[1]
    top, bottom, left, right = box or (0, weight.shape[2], 0, weight.shape[3])
    of_weight = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    of_weight[:, :, top:bottom, left:right] = of_live
    return of_weight if mask is None else torch.where(mask, of_weight, 0).contiguous()


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, padding: list[int], geometry: Geometry, wanted: list[bool]
) -> tuple[Tensor, ...]:
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, geometry.stride, padding, geometry.dilation, False, [0, 0], 1, wanted
    )
