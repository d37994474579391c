"""A convolution with masked weights, bias and activation. Bound by operations, of which the mask leaves about half.

python -m benchmarks masked_conv2d                          measures
python -m benchmarks.masked_conv2d [--full] [--chip sm_90]  only counts: multiply-adds and bytes of every layer
"""

import argparse
import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import references
from benchmarks.case import Case, Rivals, contenders
from fastgen.nn import GatedMaskedBlock
from fastgen.ops import causal_mask, masked_conv2d
from fastgen.ops.masked_conv2d import masked_conv2d_reference

# (B, I, O, N, kernel, mask type, activation) on N x N maps.
Layer = tuple[int, int, int, int, int, str, str]
GATED, PLAIN = (256, 32, 3, "B", "gated"), (128, 32, 3, "B", "relu")  # 128 features in, as in both papers
LAYERS: dict[str, list[Layer]] = {
    "toy": [(2, 4, 6, 5, 3, "B", "gated"), (2, 3, 4, 5, 5, "A", "relu"), (1, 17, 4, 4, 1, "B", "none")],
    "cpu": [(16, 32, 64, 28, 3, "B", "gated"), (16, 1, 64, 28, 7, "A", "none")],
    "cpu-full": [
        (16, 32, 64, 28, 3, "B", "gated"),
        (16, 1, 64, 28, 7, "A", "none"),
        (16, 128, *GATED),
    ],
    "gpu": [
        (16, 128, *GATED),
        (128, 128, *GATED),
        (128, 128, *PLAIN),
        (128, 128, 256, 32, 7, "B", "gated"),
        (128, 3, 256, 32, 7, "A", "none"),
    ],
    "gpu-full": [(b, c, 2 * c, n, 3, "B", "gated") for b in (16, 128) for c in (64, 128, 256) for n in (28, 32)]
    + [(b, 128, 128, 32, k, "B", "relu") for b in (16, 128) for k in (1, 3)]
    + [(128, 128, 256, 32, k, "B", "gated") for k in (5, 7)]
    + [(b, c, 256, n, 7, "A", "none") for b, c, n in ((128, 1, 28), (16, 3, 32), (128, 3, 32))]
    + [(64, 128, 256, 64, 3, "B", "gated")],
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
        "eager, split": references.masked_conv2d_split,
        "compiled, dense": references.compiled(references.masked_conv2d_dense),
        "compiled, cropped": references.compiled(references.masked_conv2d_cropped),
    }
    if size.startswith("gpu"):  # a CPU has nothing to tune there
        for name, call in (("dense", references.masked_conv2d_dense), ("cropped", references.masked_conv2d_cropped)):
            rivals[f"compiled max-autotune, {name}"] = references.compiled(call, "max-autotune-no-cudagraphs")
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


# (B, channels, N): layers of the Gated PixelCNN, both stacks, 3x3, one colour.
BLOCKS: dict[str, list[tuple[int, int, int]]] = {
    "toy": [(2, 17, 4)],
    "cpu": [(16, 32, 28)],
    "cpu-full": [(16, 32, 28), (16, 128, 32)],
    "gpu": [(16, 128, 32), (128, 128, 32)],
    "gpu-full": [(b, c, n) for b in (16, 128) for c in (128, 256) for n in (28, 32)],
}


def _block_inputs(device: torch.device, size: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Any]:
    batch, channels, n = size
    maps = [torch.randn(batch, n, n, channels, device=device).permute(0, 3, 1, 2).to(dtype) for _ in range(2)]
    vertical, horizontal = (one.requires_grad_() for one in maps)
    return {
        "block": GatedMaskedBlock(channels, channels).to(device, dtype),
        "vertical": vertical,
        "horizontal": horizontal,
    }


def _block(block: GatedMaskedBlock, vertical: Tensor, horizontal: Tensor, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """impl="triton": the kernels also on a CPU, in the interpreter."""
    return block.fused(vertical, horizontal) if impl == "triton" else block(vertical, horizontal)


def _block_case(size: str, device: torch.device, of_block: tuple[int, int, int], dtype: torch.dtype) -> Case:
    batch, c, n = of_block
    rivals: Rivals = {
        "eager, cropped": references.gated_block_cropped,
        "compiled, cropped": references.compiled(references.gated_block_cropped),
    }
    pixels, weights = batch * n * n, 2 * c * c * (6 + 2) + 4 * c * c + c * c
    # Two maps in, two out; the backward reads the maps and both gradients and writes the gradients of the maps.
    moved = {"fwd": dtype.itemsize * (4 * c * pixels + weights), "bwd": dtype.itemsize * (6 * c * pixels + 2 * weights)}
    flops = 2 * weights * pixels
    return Case(
        op="masked_conv2d",
        shape=f"gated block {batch}x{c}x{n}x{n}",
        dtype=dtype,
        inputs=functools.partial(_block_inputs, size=of_block, dtype=dtype),
        providers=contenders(size, device, rivals, _block, _block),
        truth=_block,
        kernels=("masked_conv2d",),
        bytes={**moved, "full": moved["fwd"] + moved["bwd"]},
        flops={"fwd": flops, "bwd": 2 * flops, "full": 3 * flops},
        batch=batch,
    )


def cases(size: str, device: torch.device) -> list[Case]:
    dtypes = [torch.float32] if size.startswith("cpu") else [torch.float32, torch.bfloat16]
    found = [_case(size, device, layer, dtype) for layer in LAYERS[size] for dtype in dtypes]
    return found + [_block_case(size, device, block, dtype) for block in BLOCKS[size] for dtype in dtypes]


@dataclass(frozen=True)
class Work:
    """What a layer costs, counted.

    Multiply-adds: of live weights; those that the kernel's tiles visit, the padding of channels, columns and pixels
    included; those of a dense convolution. Bytes: those that the forward must move; those kept for the backward beside
    input and result; what eager PyTorch keeps.
    """

    live: int
    visited: int
    dense: int
    moved: int
    kept: int
    kept_eager: int
    tile: str


def work(layer: Layer, dtype: torch.dtype, chip: str) -> Work:
    """By the default configuration of the chip; needs no GPU."""
    from fastgen.kernels import masked_conv2d_config as config
    from fastgen.kernels.masked_conv2d_plan import Blocks, Geometry, build
    from fastgen.kernels.masked_conv2d_tma import box_of

    batch, of, to, n, kernel, mask_type, activation = layer
    parts = 2 if activation == "gated" else 1
    mask = causal_mask(mask_type, to, of, kernel)
    pixels, taps = batch * n * n, int(mask[0, 0].sum())
    gather = config.gathers(of, False, 1)
    tma = not gather and config.has_tma(chip) and of * dtype.itemsize % 16 == 0
    product = config.Layer("out", dtype, to // parts, parts, of, taps, pixels, 1, tma)
    tile = config.default_tile(chip, product, "tf32" if dtype == torch.float32 else "ieee")
    geometry = Geometry((1, 1), (kernel // 2,) * 2, (1, 1))
    plan = build(mask, Blocks(tile.N, tile.K, parts, gather), geometry, torch.device("cpu"))
    results = to // parts
    positions = -(-pixels // tile.M) * tile.M
    if tile.tma:
        boxes = zip((batch, n, n), box_of(tile.M, batch, n, n), strict=True)
        positions = tile.M * math.prod(-(-whole // side) for whole, side in boxes)
    return Work(
        live=int(mask.sum()) * pixels,
        visited=plan.pairs * tile.K * tile.N * parts * positions,
        dense=mask.numel() * pixels,
        moved=dtype.itemsize * (pixels * (of + results) + int(mask.sum())),
        kept=dtype.itemsize * pixels * (results if parts == 2 else 0),
        kept_eager=dtype.itemsize * pixels * (2 * results if parts == 2 else 0),
        tile=f"{tile.M}x{tile.N}{'(x2)' if parts == 2 else ''}x{tile.K}{' TMA' if tile.tma else ''}",
    )


def table(size: str, chip: str) -> str:
    lines = [
        f"Counted for {chip}, not measured. 10^9 multiply-adds of the forward; 10^6 bytes.",
        "| layer | dtype | tile | live | visited | dense | dense / visited | moved | kept | kept by eager |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for layer in LAYERS[size]:
        batch, of, to, n, kernel, mask_type, activation = layer
        for dtype in (torch.bfloat16, torch.float32):
            found = work(layer, dtype, chip)
            counts = [f"{count / 1e9:.4g}" for count in (found.live, found.visited, found.dense)]
            counts.append(f"{found.dense / found.visited:.2f}")
            counts += [f"{count / 1e6:.4g}" for count in (found.moved, found.kept, found.kept_eager)]
            name = f"{batch}x{of}x{n}x{n} to {to}, {kernel}x{kernel} {mask_type} {activation}"
            kind = str(dtype).removeprefix("torch.")
            lines.append(f"| {name} | {kind} | {found.tile} | {' | '.join(counts)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.masked_conv2d", description="Counts, measures nothing.")
    parser.add_argument("--full", action="store_true", help="more layers")
    parser.add_argument("--chip", default="sm_90", help="sm_80, sm_90, gfx942, ... (default %(default)s)")
    arguments = parser.parse_args()
    print(table("gpu-full" if arguments.full else "gpu", arguments.chip))
