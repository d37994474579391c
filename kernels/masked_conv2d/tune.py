"""Searches the launch configurations of the masked convolution on this machine's GPU, and times cuDNN beside them.

    python -m fastgen.kernels.masked_conv2d.tune                                the layers of the usual models
    python -m fastgen.kernels.masked_conv2d.tune --layer 64 64 128 3 28 --gated  batch, channels, outputs, kernel, size

For each layer and each of its three products (the result, the gradient of the input, that of the weight) every
candidate first has to give the right numbers (check.py), twice the same, on this very device. The fastest that does is
saved with its time and cuDNN's, see config.py; where cuDNN is faster, "auto" uses it from then on.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastgen.kernels.masked_conv2d import config
from fastgen.kernels.masked_conv2d.check import is_right
from fastgen.kernels.masked_conv2d.config import Choice, Layer, Tile, default_tile, side_of
from fastgen.kernels.masked_conv2d.launch import forget
from fastgen.kernels.masked_conv2d.products import Made, products_of

DIRECTIONS = ("out", "in", "weight")


class Problem(NamedTuple):
    """A layer with "same" padding on square maps, with the mask B of a grey image."""

    batch: int
    channels: int
    outputs: int
    kernel: int
    size: int
    dtype: torch.dtype
    gated: bool

    def product(self, direction: str, device: torch.device) -> Made:
        """On random numbers."""
        generator = torch.Generator(device).manual_seed(0)

        def random(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device)

        def feature_map(channels: int) -> Tensor:
            return random(self.batch, self.size, self.size, channels).permute(0, 3, 1, 2).to(self.dtype)

        side, taps = self.kernel, self.kernel**2
        mask = (torch.arange(taps, device=device) <= taps // 2).view(side, side)
        mask = mask.expand(self.outputs, self.channels, -1, -1).contiguous()
        weight = (random(*mask.shape) / (self.channels * taps / 2) ** 0.5).to(self.dtype)
        geometry, finish = ((1, 1), (side // 2, side // 2), (1, 1)), ("gated", "valve") if self.gated else ("none",)
        make, tensors = products_of(feature_map(self.channels), weight, mask, geometry, *finish)[direction]
        return make, tensors if direction == "out" else (feature_map(self.outputs), *tensors[1:])


def usual_problems() -> list[Problem]:
    """Those of PixelCNN and the Gated PixelCNN at 128 features, 28x28 and 32x32, in bfloat16 and float32."""
    return [
        Problem(batch, 128, outputs, kernel, size, dtype, gated)
        for dtype in (torch.bfloat16, torch.float32)
        for batch in (16, 128)
        for size in (28, 32)
        for outputs, kernel, gated in ((256, 3, True), (128, 3, False), (128, 1, False))
    ]


def candidates(layer: Layer) -> list[Tile]:
    """What the search tries, eight at most: the default, smaller and larger ones, by descriptors and without."""
    base = default_tile(layer)
    tiles = [base, base._replace(tma=False), base._replace(num_stages=base.num_stages + 1)]
    tiles += [base._replace(M=64, N=min(base.N, 64), num_warps=4), base._replace(M=64, num_warps=4)]
    if layer.direction == "weight":
        tiles += [base._replace(M=2 * base.M), base._replace(K=max(base.K // 2, 16), num_warps=4)]
        tiles += [base._replace(N=side_of(layer.rows, 128), K=side_of(layer.channels, 128), num_warps=8)]
    else:
        tiles += [base._replace(M=256, num_stages=max(base.num_stages - 1, 2))]
    return list(dict.fromkeys(tiles))


def milliseconds(call: Callable[[], Any]) -> float:
    """Median time of a call on the GPU, after the L2 cache was written over."""
    return triton.testing.do_bench(call, warmup=5, rep=50, return_mode="median")


def search(product: Made, tiles: list[Tile]) -> dict[str, Any]:
    """The row of a table: the fastest of the right ones, and the time of cuDNN, which is taken where none is right."""
    make, tensors = product

    def timed(provider: str, tile: Tile) -> float:
        return milliseconds(partial(make(*tensors, choice=Choice(provider, tile, "")).run, *tensors))

    times = {"cudnn": timed("cudnn", tiles[0])}
    right = {tile: timed("triton", tile) for tile in tiles if is_right(make, tensors, Choice("triton", tile, ""))}
    best = min(right, key=lambda tile: right[tile], default=tiles[0])
    times |= {"triton": right[best]} if right else {}
    provider = min(times, key=lambda name: times[name])
    return {"provider": provider, "tile": best._asdict(), "ms": times, "refused": len(tiles) - len(right)}


def save(gpu: str, layers: dict[str, Any], versions: dict[str, str]) -> Path:
    """Adds rows to this machine's table of the GPU; a reader sees the old file or the new one, never a part."""
    path = config.own_table(gpu)
    rows = (json.loads(path.read_text())["layers"] if path.exists() else {}) | layers
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(f".{os.getpid()}.tmp")
    whole.write_text(json.dumps({"gpu": gpu, **versions, "layers": dict(sorted(rows.items()))}, indent=1))
    whole.replace(path)
    config.measured.cache_clear()
    return path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = ("BATCH", "CHANNELS", "OUTPUTS", "KERNEL", "SIZE")
    parser.add_argument("--layer", nargs=5, type=int, metavar=sizes, help="one layer; outputs: both halves of a gate")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of one layer")
    parser.add_argument("--gated", action="store_true", help="with the gate in the finish of one layer")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("tune: torch finds no CUDA GPU, and only a GPU can be measured", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    gpu = torch.cuda.get_device_name(device)
    versions = {"torch": torch.__version__, "triton": triton.__version__, "cuda": str(torch.version.cuda)}
    problems = usual_problems()
    if options.layer:
        problems = [Problem._make((*options.layer, getattr(torch, options.dtype), options.gated))]
    for problem in problems:
        products = [problem.product(direction, device) for direction in DIRECTIONS]
        layers = [make(*tensors).layer for make, tensors in products]
        rows = [search(product, candidates(layer)) for product, layer in zip(products, layers, strict=True)]
        save(gpu, {layer.key: row for layer, row in zip(layers, rows, strict=True)}, versions)
    forget()
    print(config.describe(gpu))
    return 0


if __name__ == "__main__":
    sys.exit(main())
