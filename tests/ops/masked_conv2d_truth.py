"""Problems, and the masked convolution as the public surface states it, by other means than the definition's."""

import mmap

import torch
from torch.nn import functional as F

from fastgen.ops import causal_mask

ACTIVATIONS = ["none", "relu", "gated"]
GEOMETRIES = [
    {},
    {"padding": 1},
    {"padding": (2, 1), "stride": 2},
    {"padding": 2, "dilation": 2},
    {"padding": (1, 3), "stride": (1, 3), "dilation": (1, 2)},
]


EPSILON = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def make_mask(kind, out_channels, in_channels, size):
    if kind == "random":
        return torch.rand(out_channels, in_channels, *size) < 0.5
    if kind in ("all", "none"):
        return torch.full((out_channels, in_channels, *size), kind == "all")
    return causal_mask(kind[0], out_channels, in_channels, size, 3 if kind.endswith("rgb") else 1)


def problem(kind="B", batch=2, inputs=3, outputs=6, height=6, width=5, size=(3, 3), dtype=torch.float64, device="cpu"):
    mask = make_mask(kind, outputs, inputs, size)
    x = torch.randn(batch, inputs, height, width, dtype=torch.float64)
    weight = torch.randn(outputs, inputs, *size, dtype=torch.float64) / (inputs * size[0] * size[1]) ** 0.5
    bias = torch.randn(outputs, dtype=torch.float64)
    x, weight, bias = (one.to(device, dtype).requires_grad_() for one in (x, weight, bias))
    return x, weight, mask.to(device), bias


def truth(x, weight, mask, bias, activation="none", condition=None, residual=None, **geometry):
    """In float64; bias None for none."""
    x, weight = x.double(), weight.double()
    out = F.conv2d(x, weight * mask, None if bias is None else bias.double(), **geometry)
    if condition is not None:
        out = out + condition.double()[:, :, None, None]
    if activation == "relu":
        out = torch.clamp(out, min=0)
    if activation == "gated":
        half = out.shape[1] // 2
        out = torch.tanh(out[:, :half]) * torch.sigmoid(out[:, half:])
    return out if residual is None else out + residual.double()


def gradients(function, inputs, seed=1, channels_last=False):
    """The result and its gradients; the incoming one is contiguous, or channels-last as that of a next layer."""
    out = function(*inputs)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(out.device)
    if channels_last:
        grad = grad.contiguous(memory_format=torch.channels_last)
    asked = [one for one in inputs if one is not None and one.requires_grad]
    return [out, *torch.autograd.grad(out, asked, grad.to(out.device, out.dtype))]


def far_apart(tensor, dim):
    """The same values, with a step of more than 2^30 elements along `dim`, so that 32 bits hold the step, but not the
    third place; memory is taken only where values lie."""
    steps = list(tensor.contiguous(memory_format=torch.channels_last).stride())
    steps[dim] = 2**30 + 16
    reach = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, steps, strict=True))
    memory = torch.frombuffer(mmap.mmap(-1, reach * tensor.element_size()), dtype=tensor.dtype)
    return memory.as_strided(tensor.shape, steps).copy_(tensor)


def strided(tensor, layout):
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "expanded":
        return tensor[:1].expand(tensor.shape)
    wide = torch.full((*tensor.shape[:3], 2 * tensor.shape[3] + 1), torch.nan, dtype=tensor.dtype, device=tensor.device)
    wide[..., 1::2] = tensor
    return wide[..., 1::2]


def check(found, expected, dtype=torch.float32, terms=1.0):
    """Errors of a few roundings of the largest value; `terms` scales that for long sums of rounded terms."""
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and one.dtype == dtype
        error = (one.detach().double() - other).abs().max() if one.numel() else torch.tensor(0.0)
        assert error <= 4 * EPSILON[dtype] * terms * max(1.0, other.abs().max().item() if other.numel() else 0), error
