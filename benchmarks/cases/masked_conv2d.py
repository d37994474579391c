"""A convolution with masked weights, bias and activation. Arithmetic limits it; the mask leaves about half of it."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import references
from benchmarks.harness.case import Case, Rivals, contenders
from fastgen.nn import GatedMaskedBlock
from fastgen.ops import causal_mask, masked_conv2d
from fastgen.ops.masked_conv2d import masked_conv2d_reference

Sizes = tuple[int, int, int, int]  # (B, I, O, N): N x N maps
Layer = tuple[Sizes, int, str, str]  # sizes, kernel size, mask type, activation
GATED, PLAIN = (3, "B", "gated"), (3, "B", "relu")
SMALL: list[Layer] = [((16, 32, 64, 28), *GATED), ((16, 1, 64, 28), 7, "A", "none")]
LAYERS: dict[str, list[Layer]] = {
    "toy": [((2, 4, 6, 5), *GATED), ((2, 3, 4, 5), 5, "A", "relu"), ((1, 17, 4, 4), 1, "B", "none")],
    "cpu": SMALL,
    "cpu-full": [*SMALL, ((16, 128, 256, 32), *GATED)],
    "gpu": [  # 128 features in, as in both papers
        *(((b, 128, 256, 32), *GATED) for b in (16, 128)),
        ((128, 128, 128, 32), *PLAIN),
        ((128, 128, 256, 32), 7, "B", "gated"),
        ((128, 3, 256, 32), 7, "A", "none"),
    ],
    "gpu-full": [
        *(((b, c, 2 * c, n), *GATED) for b in (16, 128) for c in (64, 128, 256) for n in (28, 32)),
        *(((b, 128, 128, 32), k, "B", "relu") for b in (16, 128) for k in (1, 3)),
        *(((b, i, o, 32), 1, "B", a) for b in (16, 128) for i, o, a in ((256, 128, "relu"), (128, 256, "none"))),
        *(((128, 128, 256, 32), k, "B", "gated") for k in (1, 5, 7)),
        *(((b, c, 256, n), 7, "A", "none") for b, c, n in ((128, 1, 28), (16, 3, 32), (128, 3, 32))),
        ((64, 128, 256, 64), *GATED),
    ],
}
# (B, channels, N): layers of the Gated PixelCNN, both stacks, 3x3, one colour.
BLOCKS: dict[str, list[tuple[int, int, int]]] = {
    "toy": [(2, 17, 4)],
    "cpu": [(16, 32, 28)],
    "cpu-full": [(16, 32, 28), (16, 128, 32)],
    "gpu": [(16, 128, 32), (128, 128, 32)],
    "gpu-full": [(b, c, n) for b in (16, 128) for c in (128, 256) for n in (28, 32)],
}


def inputs(
    device: torch.device, sizes: Sizes, kernel: int, mask_type: str, dtype: torch.dtype, data_channels: int = 1
) -> dict[str, Tensor]:
    """Tensors in the layout channels-last, in which cuDNN is fastest."""
    batch, in_channels, out_channels, n = sizes
    tensors = {"x": torch.randn(batch, in_channels, n, n, device=device)}
    weight = torch.randn(out_channels, in_channels, kernel, kernel, device=device)
    tensors["weight"] = weight / (in_channels * kernel**2 / 2) ** 0.5
    tensors = {name: x.contiguous(memory_format=torch.channels_last) for name, x in tensors.items()}
    tensors["bias"] = torch.randn(out_channels, device=device)
    mask = causal_mask(mask_type, out_channels, in_channels, kernel, data_channels).to(device)
    return {**{name: x.to(dtype).requires_grad_() for name, x in tensors.items()}, "mask": mask}


def convolve(
    x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor, *, call: Callable[..., Tensor], **options: Any
) -> Tensor:
    return call(x, weight, mask, bias, padding=weight.shape[2] // 2, **options)


def _layer(size: str, device: torch.device, layer: Layer, dtype: torch.dtype) -> Case:
    (batch, in_channels, out_channels, n), kernel, mask_type, activation = layer
    plain = {name: getattr(references, f"masked_conv2d_{name}") for name in ("dense", "cropped", "split")}
    plain = {name: functools.partial(call, activation=activation) for name, call in plain.items()}
    rivals: Rivals = {f"eager, {name}": call for name, call in plain.items()}
    for prefix, mode in (("compiled", None), ("compiled max-autotune", "max-autotune-no-cudagraphs")):
        rivals |= {f"{prefix}, {name}": references.compiled(plain[name], mode) for name in ("dense", "cropped")}
    definition = functools.partial(convolve, call=masked_conv2d_reference, activation=activation)
    operation = functools.partial(convolve, call=masked_conv2d, activation=activation)
    taps = int(causal_mask(mask_type, 1, 1, kernel).sum())
    results = out_channels // 2 if activation == "gated" else out_channels
    weights, pixels, itemsize = taps * in_channels * out_channels, batch * n * n, dtype.itemsize
    return Case(
        op="masked_conv2d",
        shape=f"{batch}x{in_channels}x{n}x{n} to {out_channels}, {kernel}x{kernel} {mask_type} {activation}",
        dtype=dtype,
        inputs=functools.partial(inputs, sizes=layer[0], kernel=kernel, mask_type=mask_type, dtype=dtype),
        providers=contenders(size, device, rivals, operation, definition),
        truth=definition,
        # The backward reads x, the convolution's result and the incoming gradient, and writes the gradient of x.
        bytes=(
            itemsize * (pixels * (in_channels + results) + weights),
            itemsize * (pixels * (2 * in_channels + out_channels + results) + 2 * weights),
        ),
        flops=(2 * weights * pixels, 4 * weights * pixels),
        batch=batch,
    )


def block_inputs(device: torch.device, sizes: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Any]:
    batch, channels, n = sizes
    maps = [torch.randn(batch, n, n, channels, device=device).permute(0, 3, 1, 2).to(dtype) for _ in range(2)]
    vertical, horizontal = (x.requires_grad_() for x in maps)
    block = GatedMaskedBlock(channels, channels).to(device, dtype)
    return {"block": block, "vertical": vertical, "horizontal": horizontal}


def run_block(
    block: GatedMaskedBlock, vertical: Tensor, horizontal: Tensor, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Runs the block. impl="triton" runs its kernels also on a CPU, in the interpreter."""
    return block.fused(vertical, horizontal) if impl == "triton" else block(vertical, horizontal)


def _block(size: str, device: torch.device, sizes: tuple[int, int, int], dtype: torch.dtype) -> Case:
    batch, c, n = sizes
    cropped = references.gated_block_cropped
    rivals: Rivals = {"eager, cropped": cropped, "compiled, cropped": references.compiled(cropped)}
    pixels, weights = batch * n * n, 2 * c * c * (6 + 2) + 4 * c * c + c * c
    return Case(
        op="masked_conv2d",
        shape=f"gated block {batch}x{c}x{n}x{n}",
        dtype=dtype,
        inputs=functools.partial(block_inputs, sizes=sizes, dtype=dtype),
        providers=contenders(size, device, rivals, run_block, run_block),
        truth=run_block,
        # The forward reads and writes two maps. The backward reads two maps and two gradients, and writes two
        # gradients. tes=(dtype.itemsize * (4 * c * pixels + weights), dtype.itemsize * (6 * c * pixels + 2 * weights)),
        flops=(2 * weights * pixels, 4 * weights * pixels),
        batch=batch,
    )


def cases(size: str, device: torch.device) -> Iterator[Case]:
    dtypes = [torch.float32, torch.bfloat16] if size.startswith("gpu") else [torch.float32]
    yield from (_layer(size, device, layer, dtype) for layer in LAYERS[size] for dtype in dtypes)
    yield from (_block(size, device, block, dtype) for block in BLOCKS[size] for dtype in dtypes)
