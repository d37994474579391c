"""Searches the launch configurations of the masked convolution on this machine's GPU, and times cuDNN beside them.

    python -m fastgen.kernels.masked_conv2d.tune                                   the layers of the usual models
    python -m fastgen.kernels.masked_conv2d.tune --channels 64 --outputs 128 --kernel 3 --size 28 --batch 64

For each layer and each of its three products (the result, the gradient of the input, that of the weight) every
candidate first has to give the right numbers, twice the same, on this very device: compilers have produced wrong code
for single configurations. The fastest that does is saved with its time and cuDNN's; where cuDNN is faster, "auto" uses
it from then on. Rows go to the folder FASTGEN_TUNED (default ~/.cache/fastgen/masked_conv2d).
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastgen.kernels.masked_conv2d.config import (
    Choice,
    Layer,
    Tile,
    candidates,
    chip_of,
    default_tile,
    describe,
    precision_of,
    save,
)
from fastgen.kernels.masked_conv2d.launch import error_of, forget, tolerance, weights_of
from fastgen.kernels.masked_conv2d.products import Convolve, WeightGradient
from fastgen.kernels.masked_conv2d.walk import Geometry, known_walk

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DIRECTIONS = ("out", "in", "weight")


@dataclass(frozen=True)
class Problem:
    """A layer with "same" padding on square maps, with the mask of a grey image."""

    batch: int
    channels: int
    outputs: int
    kernel: int
    size: int
    dtype: torch.dtype
    gated: bool
    mask: str = "B"


class Product:
    """One of the three products of a layer on random numbers, and what it should give in float64."""

    def __init__(self, problem: Problem, direction: str, device: torch.device) -> None:
        p, generator = problem, torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        def feature_map(channels: int) -> Tensor:
            return normal(p.batch, p.size, p.size, channels).permute(0, 3, 1, 2).to(p.dtype)

        live = torch.zeros(p.kernel**2, dtype=torch.bool)
        live[: p.kernel**2 // 2 + (p.mask == "B")] = True
        shape = (p.outputs, p.channels, p.kernel, p.kernel)
        mask = live.view(p.kernel, p.kernel).expand(shape).contiguous().to(device)
        weight = (normal(*shape) / (p.channels * p.kernel**2 / 2) ** 0.5).to(p.dtype)
        x, grad, padding = feature_map(p.channels), feature_map(p.outputs), p.kernel // 2
        geometry = Geometry((1, 1), (padding, padding), (1, 1))
        weights = weights_of(weight, mask, known_walk(mask, weight.shape, 2 if p.gated else 1), geometry)
        results = p.outputs // 2 if p.gated else p.outputs
        options = {"activation": "gated" if p.gated else "none", "keep": "valve" if p.gated else ""}
        self.make: Callable[..., Any]
        self.tensors: tuple[Tensor, ...]
        if direction == "weight":
            self.make, self.tensors = partial(WeightGradient, grad, x, weights, adds_up=True), (grad, x, weight, mask)
        elif direction == "in":
            self.make = partial(Convolve, grad, weights, tuple(x.shape), mirrored=True)
            self.tensors = (grad, weight, mask)
        else:
            size = (p.batch, results, p.size, p.size)
            self.make, self.tensors = partial(Convolve, x, weights, size, **options), (x, weight, mask)
        none = Choice("dense", Tile(0, 0, 0, 0, 0), "")
        self.layer: Layer = self.make(choice=none).layer
        wide = [one.double() for one in (x, weight * mask, grad)]
        if direction == "out":
            sums = torch.nn.functional.conv2d(*wide[:2], padding=padding)
            truth = sums[:, :results].tanh() * sums[:, results:].sigmoid() if p.gated else sums
            self.truths = [truth, sums[:, results:]] if p.gated else [truth]
        else:
            # Not by autograd, which is off inside an operator.
            arguments = ([1, 1], [padding] * 2, [1, 1], False, [0, 0], 1, [direction == "in", direction != "in", False])
            found = torch.ops.aten.convolution_backward(wide[2], *wide[:2], None, *arguments)
            self.truths = [found[0]] if direction == "in" else [found[1] * mask, wide[2].sum((0, 2, 3))]

    def run(self, choice: Choice) -> list[Tensor]:
        """Results as `truths`; the sums for the bias only where the kernel finds them."""
        first, second = self.make(choice=choice)(*self.tensors)
        if self.layer.direction == "weight" and second is not None:
            second = second.sum((0, 1))
        return [first] if second is None or len(self.truths) == 1 else [first, second]

    def error(self, choice: Choice) -> float:
        return max(error_of(one, truth) for one, truth in zip(self.run(choice), self.truths, strict=False))

    def default(self, device: torch.device) -> Tile:
        return default_tile(chip_of(device), self.layer, precision_of(device, self.layer.dtype))


def usual_problems() -> list[Problem]:
    """Those of PixelCNN and the Gated PixelCNN at 128 features, 28x28 and 32x32, in bfloat16 and float32."""
    return [
        Problem(batch, 128, outputs, kernel, size, dtype, gated)
        for dtype in (torch.bfloat16, torch.float32)
        for batch in (16, 128)
        for size in (28, 32)
        for outputs, kernel, gated in ((256, 3, True), (128, 3, False), (128, 1, False))
    ]


def milliseconds(call: Callable[[], Any], device: torch.device, budget: float = 0.05) -> float:
    """Median time of a call; on a GPU between events, after the L2 cache was written over."""
    call()
    times: list[float] = []
    flush = torch.empty(2**28 if device.type == "cuda" else 1, dtype=torch.uint8, device=device)
    start = time.perf_counter()
    while len(times) < 3 or (time.perf_counter() - start < budget and len(times) < 50):
        flush.zero_()
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            begun = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - begun))
    return sorted(times)[len(times) // 2]


def search(product: Product, device: torch.device, tiles: list[Tile]) -> dict[str, Any]:
    """The row of a table: the fastest of the right ones, and the times of cuDNN.

    The allowed error is four times cuDNN's in the same dtype, and at least `tolerance`. Where no tile is right, cuDNN
    is chosen whatever its time.
    """
    times: dict[str, float] = {}
    allowed = tolerance(product.layer.dtype)
    for name in ("dense", "cropped"):
        choice = Choice(name, tiles[0], "")
        allowed = max(allowed, 4 * product.error(choice))
        times[name] = milliseconds(partial(product.run, choice), device)
    best, refused = tiles[0], 0
    for tile in tiles:
        choice = Choice("triton", tile, "")
        try:
            first, again = product.run(choice), product.run(choice)
            right = all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
            right = right and product.error(choice) <= allowed
        except Exception as error:  # too much shared memory, too many registers, a compiler's own failure
            print(f"  {tile}: {type(error).__name__}", file=sys.stderr)
            right = False
        if not right:
            refused += 1
            continue
        taken = milliseconds(partial(product.run, choice), device)
        if taken < times.get("triton", float("inf")):
            times["triton"], best = taken, tile
    return {"provider": min(times, key=lambda name: times[name]), "tile": best, "ms": times, "refused": refused}


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fastgen.kernels.masked_conv2d.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--channels", type=int, help="input channels of one layer; without it the usual layers")
    parser.add_argument("--outputs", type=int, help="output channels, both halves of a gate (default: channels)")
    parser.add_argument("--kernel", type=int, default=3, help="odd (default %(default)s)")
    parser.add_argument("--size", type=int, default=32, help="height and width (default %(default)s)")
    parser.add_argument("--batch", type=int, default=128, help="images (default %(default)s)")
    parser.add_argument("--mask", choices=("A", "B"), default="B", help="default %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default %(default)s")
    parser.add_argument("--gated", action="store_true", help="with the gate in the finish")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = _parse(argv)
    if not torch.cuda.is_available():
        print("tune: torch finds no CUDA GPU, and only a GPU can be measured", file=sys.stderr)
        return 2
    problems = usual_problems()
    if arguments.channels is not None:
        outputs = arguments.outputs or arguments.channels
        sizes = (arguments.batch, arguments.channels, outputs, arguments.kernel, arguments.size)
        problems = [Problem(*sizes, DTYPES[arguments.dtype], arguments.gated, arguments.mask)]
    import triton

    device = torch.device("cuda", torch.cuda.current_device())
    gpu = torch.cuda.get_device_name(device)
    versions = {"torch": torch.__version__, "triton": triton.__version__, "cuda": str(torch.version.cuda)}
    for problem in problems:
        rows = {}
        for direction in DIRECTIONS:
            product = Product(problem, direction, device)
            tiles = candidates(chip_of(device), product.layer, precision_of(device, problem.dtype))
            rows[product.layer.key] = search(product, device, tiles)
        save(gpu, rows, versions)
    forget()
    print(describe(gpu))
    return 0


if __name__ == "__main__":
    sys.exit(main())
