"""The products of a masked convolution, each ready to be run for tensors of one kind: `Convolve` for the result and the
gradient of the input, `WeightGradient`.

All that depends on shapes and dtypes alone is found once, in the constructors, from the tensors of a first call; a call
allocates its results and launches. Sizes reach the kernels as plain integers, so that nothing lies on the device
between calls. Maps are channels-last and dense, weights contiguous, and all lie at multiples of 16 bytes.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastgen.kernels.common import Launches, cdiv, next_power_of_2
from fastgen.kernels.maps import Layout, boxes, channels_last, dense, empties, result_size
from fastgen.kernels.masked_conv2d import cudnn
from fastgen.kernels.masked_conv2d.backward import BIASES, masked_conv2d_sum_kernel, masked_conv2d_weight_kernel
from fastgen.kernels.masked_conv2d.config import Choice, Layer, Tile, chip_of, choose, has_tma, precision_of
from fastgen.kernels.masked_conv2d.forward import INPUTS, masked_conv2d_kernel, masked_conv2d_pack_kernel
from fastgen.kernels.masked_conv2d.walk import Walk, known_walk

# Shares of the pixels are cut so that about as many programs run, two on each multiprocessor of a Hopper: every share
# is written and read again, which with more would be more than the maps for few images. A constant: sums do not depend
# on the chip.
PROGRAMS = 256
RUN = 8  # rows of a half of a gate that lie side by side in packed weights, see forward.py

Made = tuple[Callable[..., Any], tuple[Any, ...]]  # what makes a product, and its tensors

# --- how tensors lie in memory


def box_of(pixels: int, batch: int, height: int, width: int) -> tuple[int, int, int]:
    """(images, rows, columns) of a box of `pixels` pixels, all powers of two, of which the fewest boxes are needed."""
    powers = [1 << i for i in range(pixels.bit_length())]
    shapes = [(pixels // (high * wide), high, wide) for wide in powers for high in powers if high * wide <= pixels]
    # Among equals the widest, whose pixels lie side by side.
    return min(shapes, key=lambda s: (cdiv(batch, s[0]) * cdiv(height, s[1]) * cdiv(width, s[2]), -s[2], -s[1]))


def blocks_of(tile: Tile, batch: int, height: int, width: int) -> tuple[tuple[int, int, int], int, int, int]:
    """How the pixels of a map are divided: (box as the kernels take it, boxes across, boxes down, number of blocks)."""
    if not tile.tma:
        return (tile.M, 0, 0), 1, 1, cdiv(batch * height * width, tile.M)
    box = box_of(tile.M, batch, height, width)
    across, down = cdiv(width, box[2]), cdiv(height, box[1])
    return box, across, down, cdiv(batch, box[0]) * across * down


def unit_of(x: Tensor, *counts: int) -> int:
    """Elements of 16 bytes where all counts are multiples of them, else 1."""
    unit = 16 // x.element_size()
    return 1 if any(n % unit for n in counts) else unit


# --- products


def packing(
    walk: Walk, layout: Layout, dtype: torch.dtype, *, columns: int, first: int = 0, pitch: int, runs: tuple[int, int],
    mirrored: bool = False,
) -> Launches:  # fmt: skip
    """Packs a weight into `columns` columns of a packed tensor from the first on, `pitch` for each tap.

    runs: how many rows of a half of a gate lie side by side, and the number of halves.
    """
    (packed_rows, packed_columns), (outputs, inputs, height, width) = layout[0], walk.shape
    line, size, half = 16 // dtype.itemsize, height * width, outputs // runs[1]
    unit = 1 if inputs * size % line or pitch % line else line
    rows = 16 if unit > 1 else 4
    # One value for most sizes, so that few kernels are compiled. First layers of models, whose kernels are large, have
    # no unit.
    flat = max(256 if unit > 1 else 1024, next_power_of_2(INPUTS.value * size + 7 * line))
    arguments = (
        half if walk.masked else 0, packed_rows, columns // 16, packed_columns // 16, first // 16, pitch // unit, half,
        inputs * size // unit, *runs, size, walk.taps, cdiv(columns, pitch), walk.first, walk.width,
        walk.box[0] * width + walk.box[2], width,
    )  # fmt: skip
    places = (pitch, packed_rows) if mirrored else (packed_rows, pitch)
    grid = cdiv(places[0], rows), cdiv(places[1], INPUTS.value)
    return Launches(masked_conv2d_pack_kernel, grid, arguments, MIRRORED=mirrored, UNIT=unit, FLAT=flat, OUTPUTS=rows)


class Product:
    """What products have in common: a layer, and what was chosen for it.

    Attributes:
        maps, kernels: of its tensors those that have the batch, and those that are weights.
        terms: how many products are added up for a result.
        main: its launches beside packing and adding shares.
    """

    maps: tuple[int, ...]
    kernels: tuple[int, ...] = ()
    terms: int
    main: Launches

    def __init__(
        self, direction: str, walk: Walk, choice: Choice | None, reads: Sequence[Tensor], rows: int, pixels: int,
        gated: bool = False, counts: tuple[int, ...] = (),
    ) -> None:  # fmt: skip
        """reads: maps, of which the first has the layer's channels. counts: of channels, of what else descriptors would
        address. choice: instead of what is chosen."""
        x = reads[0]
        chip, strided = chip_of(x.device), walk.geometry.stride != (1, 1)
        tma = has_tma(chip) and unit_of(x, *counts, *(read.shape[1] for read in reads)) > 1
        kind = direction, chip, x.dtype, precision_of(x), rows, x.shape[1], walk.live, walk.boxed, pixels
        self.walk, self.layer = walk, Layer(*kind, gated=gated, tma=tma, strided=strided)
        self.choice = choice or choose(x.device, self.layer)
        self.by_kernels = self.choice.provider == "triton"

    def columns(self, channels: int, parts: int = 1) -> tuple[int, int]:
        """(columns of a tap, columns of all): whole blocks of each part of the channels, or of all taps together."""
        deep = self.choice.tile.K
        pitch = channels if self.layer.gathers else parts * cdiv(channels, deep) * deep
        return pitch, cdiv(self.walk.taps * pitch, deep) * deep

    def launches(self, kernel: Any, grid: tuple[int, ...], arguments: Any, box: Any, **constants: Any) -> Launches:
        """Of the main kernel, in the tile that was chosen."""
        tile, layer = self.choice.tile, self.layer
        return Launches(
            kernel, grid, arguments, GATHER=layer.gathers, PRECISION=layer.precision, IMAGES=box[0], HEIGHT=box[1],
            WIDTH=box[2], N=tile.N, K=tile.K, num_warps=tile.num_warps, num_stages=tile.num_stages, **constants,
        )  # fmt: skip


class Convolve(Product):
    """activation(conv(x, weight) + conv1x1(other) + biases), plus a residual where there is no activation; with
    `mirrored` the gradient of the input. Results are channels-last.

    size: (C, H, W) of the result. keep: what is kept for the backward, see backward.py; "" for nothing.

    Attributes:
        gradients: plans of the gradients of calls of this kind, see launch.py.
    """

    maps, kernels = (0, 4, 5, 6), (1, 7)

    def __init__(
        self, x, weight, mask, bias=None, condition=None, residual=None, other=None, other_weight=None, *, walk: Walk,
        size: Sequence[int], mirrored: bool = False, activation: str = "none", keep: str = "",
        choice: Choice | None = None,
    ) -> None:  # fmt: skip
        batch, rows, height, width = self.size = (x.shape[0], *size)
        gated = activation == "gated"
        parts = walk.parts if mirrored else 1  # of the channels read
        channels, others = x.shape[1] // parts, 0 if other is None else other.shape[1]
        reads, pixels = [x] if other is None else [x, other], batch * height * width
        direction, counts = "in" if mirrored else "out", (rows, channels)
        super().__init__(direction, walk, choice, reads, 2 * rows if gated else rows, pixels, gated, counts)
        self.mirrored, self.activation, self.keep = mirrored, activation, keep
        self.terms, self.gradients = walk.taps * x.shape[1] + others, {}  # type: tuple[int, dict[Any, Any]]
        self.new_out = empties(x, channels_last(*self.size))
        kept_halves = 2 if keep == "both" else 1
        self.new_kept = empties(x, channels_last(batch, kept_halves * rows, height, width))
        if not self.by_kernels:
            return
        tile, gathers = self.choice.tile, self.layer.gathers
        if gathers:  # all that is read is one part
            channels, parts = x.shape[1], 1
        pitch, columns = self.columns(channels, parts)
        written = tile.N // 2 if gated else tile.N  # channels of a tile
        row_tiles, rest = cdiv(rows, written), cdiv(others, tile.K) * tile.K
        packed = dense(row_tiles * tile.N, columns + rest)
        self.new_packed = empties(x, packed)
        runs = (pitch // parts, parts) if mirrored else (RUN, 2 if gated else 1)
        self.pack = packing(walk, packed, x.dtype, columns=columns, pitch=pitch, runs=runs, mirrored=mirrored)
        self.pack_other = None
        if other is not None:
            pointwise = known_walk(None, other_weight.shape, walk.parts)
            self.pack_other = packing(pointwise, packed, x.dtype, columns=rest, first=columns, pitch=rest, runs=runs)
        unit, out_unit = 1 if gathers else unit_of(x, channels, others), unit_of(x, rows)
        box, across, down, blocks = blocks_of(tile, batch, height, width)
        arguments = (
            0 if bias is None else rows, 0 if residual is None else rows // out_unit,
            0.0 if activation == "relu" else -math.inf, int(mirrored), batch, height, width, *x.shape[2:], across, down,
            *walk.arguments(mirrored), channels // unit, parts, rows // out_unit, others // unit,
        )  # fmt: skip
        self.main = self.launches(
            masked_conv2d_kernel, (blocks * row_tiles,), arguments, box, UNIT=unit, OUT_UNIT=out_unit, GATED=gated,
            KEEP=keep, FAST=x.dtype == torch.bfloat16 and self.layer.chip.startswith("sm_"),
        )  # fmt: skip
        self.boxes: tuple[Any, ...] = ()
        if tile.tma:
            sizes, block = (batch, height, width), (*box, tile.K)
            self.boxes = (
                boxes(x, (batch, *x.shape[2:], x.shape[1]), block), boxes(x, packed[0], (tile.N, tile.K)),
                boxes(x, (*sizes, others), block) if others else None,
                *(boxes(x, (*sizes, halves, rows), (*box, 1, written)) for halves in (1, kept_halves)),
            )  # fmt: skip

    def run(
        self, x, weight, mask, bias=None, condition=None, residual=None, other=None, other_weight=None
    ) -> tuple[Tensor, Tensor | None]:
        if not self.by_kernels:
            return self.by_cudnn(x, weight, mask, bias, condition, residual, other, other_weight)
        packed = self.new_packed()
        self.pack.start(weight, mask, packed)
        if self.pack_other is not None:
            self.pack_other.start(other_weight, mask, packed)
        out = self.new_out()
        kept = self.new_kept() if self.keep else None
        # What is not there is not read; in its place x spares another compilation, but costs a gate registers.
        residual = x if residual is None and self.activation != "gated" else residual
        bias = x if bias is None else bias
        if not self.boxes:
            self.main.start(x, packed, other, bias, condition, residual, out, kept)
            return out, kept
        of_x, of_packed, of_other, of_out, of_kept = self.boxes
        self.main.start(
            of_x(x), of_packed(packed), None if other is None else of_other(other), bias, condition, residual,
            of_out(out), None if kept is None else of_kept(kept),
        )  # fmt: skip
        return out, kept

    def by_cudnn(self, x: Tensor, weight: Tensor, mask: Tensor | None, *added: Tensor | None) -> Any:
        """The sums by cuDNN, what follows them by PyTorch."""
        if self.mirrored:
            return cudnn.input_gradient(x, weight, mask, self.walk, self.size), None
        return cudnn.forward(x, weight, mask, self.walk, self.activation, self.keep, *added)


class WeightGradient(Product):
    """The gradients of the weight and, where `adds_up`, of the bias (O,), from that of the sums."""

    maps = (0, 1)

    def __init__(
        self, grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor | None, *, walk: Walk, adds_up: bool,
        choice: Choice | None = None,
    ) -> None:  # fmt: skip
        batch, all_rows, height, width = grad.shape
        self.adds_up, self.terms = adds_up, batch * height * width
        super().__init__("weight", walk, choice, [x, grad], all_rows, self.terms)
        if not self.by_kernels:
            return
        tile, channels, rows = self.choice.tile, x.shape[1], all_rows // walk.parts
        pitch, columns = self.columns(channels)
        pairs = cdiv(all_rows, tile.N) * (columns // tile.K)
        box, across, down, blocks = blocks_of(tile, batch, height, width)
        # 512 pixels a share at least: what a share of 128 x 128 sums writes is then half of what it loads.
        steps = cdiv(blocks, max(1, min(PROGRAMS // pairs, self.terms // 512)))
        self.shares = shares = cdiv(blocks, steps)
        self.new_out, self.new_bias = empties(x, dense(*walk.shape)), empties(x, dense(all_rows))
        self.new_partial = empties(x, dense(shares, all_rows, columns + BIASES.value), torch.float32)
        unit, grad_unit = 1 if self.layer.gathers else unit_of(x, channels), unit_of(grad, rows)
        arguments = (
            int(adds_up), batch, height, width, *x.shape[2:], across, down, steps, channels // unit, rows // grad_unit,
            walk.parts, *walk.arguments(False),
        )  # fmt: skip
        kernel, grid = masked_conv2d_weight_kernel, (pairs, shares)
        self.main = self.launches(kernel, grid, arguments, box, UNIT=unit, GRAD_UNIT=grad_unit)
        self.boxes = tile.tma and [
            boxes(x, (batch, *t.shape[2:], t.shape[1]), (*box, side)) for t, side in ((grad, tile.N), (x, tile.K))
        ]
        size = walk.shape[2] * walk.shape[3]
        flat = max(256, next_power_of_2(size))
        inputs = flat // size  # of a program
        inputs = inputs // 8 * 8 or inputs
        arguments = (
            all_rows if walk.masked else 0, shares, all_rows, columns // 16,
            min(columns // tile.K, BIASES.value) if adds_up else 0, channels * size, pitch, inputs, size,
            walk.taps, walk.first, walk.width, walk.box[0], walk.box[2], walk.shape[3],
        )  # fmt: skip
        grid = (cdiv(all_rows, 8), cdiv(channels, inputs))
        self.sum = Launches(masked_conv2d_sum_kernel, grid, arguments, FLAT=flat, OUTPUTS=8)

    def run(self, grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if not self.by_kernels:
            return self.by_cudnn(grad, x, weight, mask)
        out, bias, shares = self.new_out(), self.new_bias() if self.adds_up else None, self.new_partial()
        read = (self.boxes[0](grad), self.boxes[1](x)) if self.boxes else (grad, x)
        self.main.start(*read, shares)
        self.sum.start(shares, mask, out, out if bias is None else bias)
        return out, bias

    def by_cudnn(self, grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        gradient = cudnn.weight_gradient(grad, x, weight, mask, self.walk)
        return gradient, grad.sum((0, 2, 3)) if self.adds_up else None


def products_of(
    x: Tensor, weight: Tensor, mask: Tensor | None, geometry: Any, activation: str, keep: str = ""
) -> dict[str, Made]:
    """The products of a layer by `Layer.direction`. The gradient of the sums is not initialized."""
    walk = known_walk(mask, weight.shape, 2 if activation == "gated" else 1, geometry)
    size = result_size(x, weight, geometry)
    grad = x.new_empty_strided(*channels_last(x.shape[0], weight.shape[0], *size))
    out = partial(Convolve, size=(weight.shape[0] // walk.parts, *size), activation=activation, keep=keep)
    return {
        "out": (partial(out, walk=walk), (x, weight, mask)),
        "in": (partial(Convolve, walk=walk, size=x.shape[1:], mirrored=True), (grad, weight, mask)),
        "weight": (partial(WeightGradient, walk=walk, adds_up=True), (grad, x, weight, mask)),
    }
