"""Searches the launch configurations of the masked convolution on this machine's GPU, and times cuDNN beside them.

    python -m fastgen.kernels.tune_masked_conv2d                                   the layers of the usual models
    python -m fastgen.kernels.tune_masked_conv2d --channels 64 --outputs 128 --kernel 3 --size 28 --batch 64

For each layer and each of its three products (the result, the gradient of the input, that of the weight) every
candidate first has to give the right numbers, twice the same, on this very device: compilers have produced wrong code
for single configurations. The fastest that does is saved with its time and cuDNN's; where cuDNN is faster, "auto" uses
it from then on. Rows go to the folder FASTGEN_TUNED (default ~/.cache/fastgen/masked_conv2d).
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from fastgen.kernels import masked_conv2d as kernels
from fastgen.kernels.masked_conv2d_check import Problem, Product, error_of, products, tolerance
from fastgen.kernels.masked_conv2d_config import Tile, candidates, chip_of, describe, save

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


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


def search(product: Product, device: torch.device, tiles: list[Tile], tf32: bool) -> dict[str, Any]:
    """The row of a table: the fastest of the right ones, and the times of cuDNN.

    The allowed error is four times cuDNN's in the same dtype, and at least `tolerance`. Where no tile is right, cuDNN
    is chosen whatever its time.
    """
    base = Tile(0, 0, 0, 0, 0)
    times: dict[str, float] = {}
    allowed = tolerance(product.layer.dtype, tf32)
    for name in ("dense", "cropped"):
        allowed = max(allowed, 4 * error_of(product.run((name, base)), product.truth))
        times[name] = milliseconds(partial(product.run, (name, base)), device)
    best, refused = tiles[0], 0
    for tile in tiles:
        choice = ("triton", tile)
        try:
            first = product.run(choice)
            right = error_of(first, product.truth) <= allowed and torch.equal(first, product.run(choice))
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
        prog="python -m fastgen.kernels.tune_masked_conv2d",
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
        print("tune_masked_conv2d: torch finds no CUDA GPU, and only a GPU can be measured", file=sys.stderr)
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
        for product in products(problem, device).values():
            precision = kernels.precision_of(torch.empty(0, dtype=problem.dtype, device=device))
            tiles = candidates(chip_of(device), product.layer, precision)
            rows[product.layer.key] = search(product, device, tiles, precision == "tf32")
        save(gpu, rows, versions)
    print(describe(gpu))
    return 0


if __name__ == "__main__":
    sys.exit(main())
