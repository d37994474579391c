"""A convolution with masked weights, bias and activation. Bound by operations, of which the mask leaves about half."""

import functools
from typing import Any

import torch
from torch import Tensor

from benchmarks import references
from benchmarks.case import Case, Rivals, contenders
from fastgen.ops import causal_mask, masked_conv2d
from fastgen.ops.masked_conv2d import masked_conv2d_reference

# (B, I, O, N, kernel, mask type, activation) on N x N maps.
Layer = tuple[int, int, int, int, int, str, str]
LAYERS: dict[str, list[Layer]] = {
    "toy": [(2, 4, 6, 5, 3, "B", "gated"), (2, 3, 4, 5, 5, "A", "relu")],
    "cpu": [(16, 32, 64, 28, 3, "B", "gated"), (16, 1, 64, 28, 7, "A", "none")],
    "cpu-full": [
        (16, 32, 64, 28, 3, "B", "gated"),
        (16, 1, 64, 28, 7, "A", "none"),
        (16, 128, 256, 32, 3, "B", "gated"),
    ],
    "gpu": [
        (16, 128, 256, 32, 3, "B", "gated"),
        (128, 128, 256, 32, 3, "B", "gated"),
        (128, 3, 256, 32, 7, "A", "none"),
    ],
    "gpu-full": [(b, c, 2 * c, 32, k, "B", "gated") for b in (16, 128) for c in (64, 128, 256) for k in (3, 5)]
    + [(128, 3, 256, 32, 7, "A", "none"), (128, 256, 256, 32, 1, "B", "relu"), (128, 128, 128, 64, 3, "B", "relu")],
}


def _inputs(device: torch.device, layer: Layer, dtype: torch.dtype) -> dict[str, Any]:
    """Channels-last, the layout that cuDNN is fastest in; the mask of a grey image."""
    batch, of, to, n, kernel, mask_type, activation = layer
    x = torch.randn(batch, of, n, n, device=device).contiguous(memory_format=torch.channels_last)
    mask = causal_mask(mask_type, to, of, kernel).to(device)
    weight = torch.randn(to, of, kernel, kernel, device=device) / (of * kernel**2 / 2) ** 0.5
    bias = torch.randn(to, device=device)
    tensors = {"x": x, "weight": weight.contiguous(memory_format=torch.channels_last), "bias": bias}
    floats = {name: tensor.to(dtype).requires_grad_() for name, tensor in tensors.items()}
    return {**floats, "mask": mask, "activation": activation}


def _operation(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor, activation: str, **options: Any) -> Tensor:
    return masked_conv2d(x, weight, mask, bias, padding=weight.shape[2] // 2, activation=activation, **options)


def _definition(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor, activation: str) -> Tensor:
    return masked_conv2d_reference(x, weight, mask, bias, padding=weight.shape[2] // 2, activation=activation)


def _case(size: str, device: torch.device, layer: Layer, dtype: torch.dtype) -> Case:
    batch, of, to, n, kernel, mask_type, activation = layer
    rivals: Rivals = {
        "eager, dense": references.masked_conv2d_dense,
        "eager, cropped": references.masked_conv2d_cropped,
        "compiled, dense": references.compiled(references.masked_conv2d_dense),
        "compiled, cropped": references.compiled(references.masked_conv2d_cropped),
    }
    taps = int(causal_mask(mask_type, 1, 1, kernel).sum())
    flops = 2 * taps * of * to * batch * n * n
    results = to // 2 if activation == "gated" else to
    fwd = dtype.itemsize * (batch * n * n * (of + results) + taps * of * to)
    # The backward reads x, the convolution's result and the incoming gradient, and writes the gradient of x.
    bwd = dtype.itemsize * (batch * n * n * (2 * of + to + results) + 2 * taps * of * to)
    return Case(
        op="masked_conv2d",
        shape=f"{batch}x{of}x{n}x{n} to {to}, {kernel}x{kernel} {mask_type} {activation}",
        dtype=dtype,
        inputs=functools.partial(_inputs, layer=layer, dtype=dtype),
        providers=contenders(size, device, rivals, _operation, _definition),
        truth=_definition,
        kernels=("masked_conv2d",),
        bytes={"fwd": fwd, "bwd": bwd, "full": fwd + bwd},
        flops={"fwd": flops, "bwd": 2 * flops, "full": 3 * flops},
        batch=batch,
    )


def cases(size: str, device: torch.device) -> list[Case]:
    dtypes = [torch.float32] if size.startswith("cpu") else [torch.float32, torch.bfloat16]
    return [_case(size, device, layer, dtype) for layer in LAYERS[size] for dtype in dtypes]
