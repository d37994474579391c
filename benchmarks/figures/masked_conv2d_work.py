"""What a masked convolution costs, counted from its launches; and the time that follows from it. Needs no GPU.

python -m benchmarks.figures.masked_conv2d_work [--full] [--chip sm_90]    multiply-adds and bytes of every layer
python -m benchmarks.figures.masked_conv2d_work --rows benchmarks/results  the prediction beside measured times
"""

import argparse
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases.masked_conv2d import LAYERS, Layer, name_of
from benchmarks.harness import rows
from fastgen.ops import causal_mask


@dataclass(frozen=True)
class Launch:
    """A kernel of a layer: bytes to and from memory where caches keep what neighbours share, and multiply-adds, the
    padding of channels, columns and pixels included."""

    name: str
    bytes: int
    multiply_adds: int = 0
    tile: str = ""


@dataclass(frozen=True)
class Work:
    """What a layer costs, counted.

    Multiply-adds of the forward: of live weights, and of a dense convolution. Bytes kept for the backward beside input,
    weight and result, and kept by eager PyTorch. Bytes that the gradient takes on its way through the activation and
    into the products, as if no cache helped: by a pass, and on loading; and which way is taken.
    """

    live: int
    dense: int
    kept: int
    kept_eager: int
    by_pass: int
    on_load: int
    way: str
    forward: tuple[Launch, ...]
    backward: tuple[Launch, ...]

    def milliseconds(self, mode: str, copy_gb_s: float, matmul_tflop_s: float) -> float:
        """The model's prediction from measured rates: each kernel takes the longer of its bytes and operations."""
        launches = {"fwd": self.forward, "bwd": self.backward, "full": self.forward + self.backward}[mode]
        rates = copy_gb_s * 1e6, matmul_tflop_s * 1e9
        return sum(max(one.bytes / rates[0], 2 * one.multiply_adds / rates[1]) for one in launches)


def work(layer: Layer, dtype: torch.dtype, chip: str) -> Work:
    """With bias and all gradients, by the default configuration of the chip; needs no GPU."""
    from fastgen.kernels import masked_conv2d_config as config
    from fastgen.kernels.masked_conv2d_grad import shares_of
    from fastgen.kernels.masked_conv2d_plan import Blocks, Geometry, build
    from fastgen.kernels.masked_conv2d_tma import box_of

    batch, of, to, n, kernel, mask_type, activation = layer
    e, parts = dtype.itemsize, 2 if activation == "gated" else 1
    mask = causal_mask(mask_type, to, of, kernel)
    results, pixels, taps, live = to // parts, batch * n * n, int(mask[0, 0].sum()), int(mask.sum())
    geometry = Geometry((1, 1), (kernel // 2,) * 2, (1, 1))

    def product(direction: str, saved: str, halves: int, moved: int) -> tuple[Launch, int]:
        """A product that moves as many bytes, and how often it loads an element of the gradient."""
        written, channels = (of, to // halves) if direction == "in" else (to // halves, of)
        gather = config.gathers(channels, direction == "in", 1)
        tma = direction != "weight" and saved == "none" and not gather and config.has_tma(chip)
        shape = (direction, dtype, written, halves, channels, taps, pixels, 1, tma and channels * e % 16 == 0, saved)
        one = config.Layer(*shape)
        tile = config.default_tile(chip, one, "tf32" if dtype == torch.float32 else "ieee")
        plan = build(mask, Blocks(tile.N, tile.K, halves, gather, direction == "in"), geometry, torch.device("cpu"))
        positions = -(-pixels // tile.M) * tile.M
        if tile.tma:
            boxes = zip((batch, n, n), box_of(tile.M, batch, n, n), strict=True)
            positions = tile.M * math.prod(-(-whole // side) for whole, side in boxes)
        if direction == "weight":  # its shares are written, and read again by the sum
            moved += 2 * 4 * shares_of(pixels, tile, plan.pairs)[0] * to * plan.columns.shape[1]
        name = f"{tile.M}x{tile.N}{'(x2)' if halves == 2 else ''}x{tile.K}{' TMA' if tile.tma else ''}"
        adds = plan.pairs * tile.K * tile.N * halves * positions
        return Launch(direction, moved, adds, name), 0 if direction == "out" else config.meets(one, tile)

    saved = {"relu": "relu", "gated": "valve", "none": "none"}[activation]
    maps = {"relu": 2, "valve": 3, "none": 1}[saved]
    element = e * pixels * results  # a map of the results
    kept = element if parts == 2 else 0
    pack = Launch("pack", (2 * e + 1) * live)
    out, _ = product("out", "none", parts, e * (pixels * of + live) + element + kept)

    def products(form: str, halves: int, loaded: int) -> tuple[list[Launch], int, int]:
        """Both of the backward, which load as many maps; how often they load them, in all and for the weight."""
        of_x, first = product("in", form, halves, loaded * element + e * (pixels * of + live))
        of_weight, second = product("weight", form, halves, loaded * element + e * (pixels * of + live))
        return [pack, of_x, of_weight], first + second, second

    after_pass, times, for_weight = products("none", 1, parts)
    direct, direct_times, _ = products(saved, parts, maps)
    by_pass, on_load = (maps + parts + times * parts) * element, direct_times * maps * element
    if activation == "none":
        way = "adds up" if for_weight == 1 else "sums"
        backward = after_pass if for_weight == 1 else [Launch("sums", element), *after_pass]
    elif results % 16 == 0 and config.on_load(saved, e, direct_times):
        way, backward = "on load", direct
    else:
        way, backward = "pass", [Launch("pass", (maps + parts) * element), *after_pass]
    counts = (live * pixels, mask.numel() * pixels, kept, 2 * kept)
    return Work(*counts, by_pass, on_load, way, (pack, out), tuple(backward))


def _row(*cells: Any) -> str:
    return "| " + " | ".join(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells) + " |"


def _table(*names: str) -> list[str]:
    return [_row(*names), "|" + "---|" * len(names)]


def table(size: str, chip: str) -> str:
    """Two tables: the forward and the backward of every layer."""
    forward = _table("layer", "dtype", "tile", "live", "visited", "dense", "dense / visited", "moved", "packed", "kept",
                     "kept by eager")  # fmt: skip
    backward = _table("layer", "dtype", "tiles", "visited", "moved", "way", "loads with a pass", "loads without")
    for layer, dtype in itertools.product(LAYERS[size], (torch.bfloat16, torch.float32)):
        found = work(layer, dtype, chip)
        names = name_of(layer), str(dtype).removeprefix("torch.")
        pack, out = found.forward
        amounts = [count / 1e9 for count in (found.live, out.multiply_adds, found.dense)]
        sizes = [count / 1e6 for count in (out.bytes, pack.bytes, found.kept, found.kept_eager)]
        forward.append(_row(*names, out.tile, *amounts, f"{found.dense / out.multiply_adds:.2f}", *sizes))
        tiles = ", ".join(launch.tile for launch in found.backward if launch.tile)
        adds, moved = (sum(getattr(one, what) for one in found.backward) for what in ("multiply_adds", "bytes"))
        loads = (found.by_pass / 1e6, found.on_load / 1e6) if layer[-1] != "none" else ("-", "-")
        backward.append(_row(*names, tiles, adds / 1e9, moved / 1e6, found.way, *loads))
    head = f"Counted for {chip}, not measured. 10^9 multiply-adds, the padding of tiles in `visited`; 10^6 bytes."
    notes = [
        "Forward. moved: by the product, where caches keep what neighbours share; packed: beside that, by the packing",
        "of weights. kept: for the backward, beside input, weight and result.",
        "",
        *forward,
        "",
        "Backward, all gradients, the bias's included. way: through the activation by a pass, or on loading; without",
        "one, a kernel sums for the bias, or the product for the weight adds up. loads: of a gradient and its way",
        "through the activation, as if no cache helped; the fewer are taken.",
    ]
    return "\n".join([head, "", *notes, "", *backward])


def beside(measured: list[dict[str, Any]], chip: str) -> str:
    """The model's prediction, from each row's own measured rates, beside the time that was measured for fastgen."""
    lines = _table("GPU", "layer", "dtype", "mode", "predicted ms", "measured ms", "predicted / measured")
    layers = {name_of(layer): layer for size in LAYERS for layer in LAYERS[size]}
    for row in measured:
        known = row["op"] == "masked_conv2d" and row["shape"] in layers and row["provider"] == "fastgen"
        if not known or not row["gpu"] or not row["ms_p50"]:
            continue
        found = work(layers[row["shape"]], getattr(torch, row["dtype"]), chip)
        predicted = found.milliseconds(row["mode"], row["copy_gb_s"], row["matmul_tflop_s"])
        names = row["gpu"], row["shape"], row["dtype"], row["mode"]
        lines.append(_row(*names, predicted, float(row["ms_p50"]), f"{predicted / row['ms_p50']:.2f}"))
    return "\n".join(lines) if len(lines) > 2 else "No row of a GPU: not yet measured."


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Counts, measures nothing.")
    parser.add_argument("--full", action="store_true", help="more layers")
    parser.add_argument("--chip", default="sm_90", help="sm_80, sm_90, gfx942, ... (default %(default)s)")
    parser.add_argument("--rows", type=Path, help="saved rows (a file or folder): the prediction beside their times")
    arguments = parser.parse_args(argv)
    if arguments.rows:
        print(beside(rows.load(arguments.rows), arguments.chip))
    else:
        print(table("gpu-full" if arguments.full else "gpu", arguments.chip))


if __name__ == "__main__":
    main()
