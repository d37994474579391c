"""The products of a masked convolution, each ready to be run for tensors of one kind: `Convolve` for the result and the
gradient of the input, `WeightGradient`.

All that depends on shapes and dtypes alone is found once, in the constructors; a call allocates its results and
launches. Sizes reach the kernels as plain integers, so that nothing lies on the device between calls. Maps are
channels-last and dense, and all tensors lie at multiples of 16 bytes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastgen.kernels.common import Launches, cdiv, next_power_of_2
from fastgen.kernels.maps import Layout, empties, result_size
from fastgen.kernels.masked_conv2d import cudnn
from fastgen.kernels.masked_conv2d.backward import BIASES, masked_conv2d_sum_kernel, masked_conv2d_weight_kernel
from fastgen.kernels.masked_conv2d.config import Choice, Layer, Tile, chip_of, choose, has_tma, precision_of
from fastgen.kernels.masked_conv2d.forward import INPUTS, masked_conv2d_kernel, masked_conv2d_pack_kernel
from fastgen.kernels.masked_conv2d.walk import Geometry, Walk, known_walk

# Shares of the pixels are cut so that about as many programs run, two on each multiprocessor of a Hopper: every share
# is written and read again, which with more would be more than the maps for few images. A constant: sums do not depend
# on the chip.
PROGRAMS = 256
RUN = 8  # rows of a half of a gate that lie side by side in packed weights, see forward.py
POINTWISE = Geometry((1, 1), (0, 0), (1, 1))

# --- how tensors lie in memory


def dense(*size: int) -> Layout:
    return size, tuple(math.prod(size[axis + 1 :]) for axis in range(len(size)))


def channels_last(batch: int, channels: int, height: int, width: int) -> Layout:
    return (batch, channels, height, width), (height * width * channels, 1, width * channels, channels)


def boxes(like: Tensor, size: Sequence[int], block: Sequence[int]) -> Callable[[Tensor], Any]:
    """Makes tensor descriptors, in blocks, of dense tensors with the dtype of `like`. Only their base differs: what is
    common is their class's, as Triton's constructor takes the host ten times as long."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    def init(self: Any, base: Tensor) -> None:
        self.base = base

    whole = TensorDescriptor(like, list(size), list(dense(*size)[1]), list(block))
    return type("Boxes", (TensorDescriptor,), {**vars(whole), "base": None, "__init__": init})


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


@dataclass(frozen=True)
class Weights:
    """A weight (O, I, kh, kw) as a product sees it: all but its values."""

    shape: torch.Size
    walk: Walk
    geometry: Geometry
    masked: bool = True  # where False, the mask of a call is another weight's

    @classmethod
    def of(cls, weight: Tensor, walk: Walk, geometry: Any) -> "Weights":
        return cls(weight.shape, walk, Geometry(*geometry))

    @classmethod
    def pointwise(cls, weight: Tensor, parts: int) -> "Weights":
        """Of a 1x1 convolution without a mask."""
        return cls(weight.shape, known_walk(None, weight.shape, parts), POINTWISE, masked=False)

    @property
    def size(self) -> int:
        return self.shape[2] * self.shape[3]

    def layer(self, direction: str, maps: Sequence[Tensor], rows: int, pixels: int, gated: bool, *counts: int) -> Layer:
        """maps: those that the product reads, of which the first has the layer's channels. counts: of channels, of
        what else descriptors would address."""
        x, walk = maps[0], self.walk
        tma = has_tma(chip_of(x.device)) and unit_of(x, *counts, *(read.shape[1] for read in maps)) > 1
        strided = self.geometry.stride != (1, 1)
        return Layer(direction, x.dtype, rows, x.shape[1], walk.live, walk.boxed, pixels, gated, tma, strided)

    def cropped(self, weight: Tensor, mask: Tensor | None) -> cudnn.Cropped:
        return cudnn.Cropped(weight, mask if self.masked else None, self.walk, self.geometry)

    def packing(
        self, layout: Layout, dtype: torch.dtype, *, columns: int, first: int, pitch: int, runs: tuple[int, int],
        mirrored: bool,
    ) -> Launches:  # fmt: skip
        """Packs the weight into `columns` columns of a packed tensor from the first on, `pitch` for each tap.

        runs: how many rows of a half of a gate lie side by side, and the number of halves.
        """
        (packed_rows, packed_columns), (outputs, inputs), walk = layout[0], self.shape[:2], self.walk
        line = 16 // dtype.itemsize
        unit = 1 if inputs * self.size % line or pitch % line else line
        rows, half = 16 if unit > 1 else 4, outputs // runs[1]
        # One value for most sizes, so that few kernels are compiled. First layers of models, whose kernels are large,
        # have no unit.
        flat = max(256 if unit > 1 else 1024, next_power_of_2(INPUTS.value * self.size + 7 * line))
        arguments = (
            half if self.masked else 0, packed_rows, columns // 16, packed_columns // 16, first // 16, pitch // unit,
            half, inputs * self.size // unit, *runs, self.size, walk.taps, cdiv(columns, pitch), walk.first, walk.width,
            walk.box[0] * self.shape[3] + walk.box[2], self.shape[3],
        )  # fmt: skip
        places = (pitch, packed_rows) if mirrored else (packed_rows, pitch)
        return Launches(
            masked_conv2d_pack_kernel, (cdiv(places[0], rows), cdiv(places[1], INPUTS.value)), arguments,
            MIRRORED=mirrored, UNIT=unit, FLAT=flat, OUTPUTS=rows,
        )  # fmt: skip


class Convolve:
    """activation(conv(x, weight) + conv1x1(other) + biases), plus a residual where there is no activation; with
    `mirrored` the gradient of the input.

    Constructed with the tensors of a first call; results are channels-last. `choice` instead of what is chosen.

    Attributes:
        size: (B, C, H, W) of the result.
        keep: what is kept for the backward, see backward.py; "" for nothing.
        terms: how many products are added up for a result.
        gradients: plans of the gradients of calls of this kind, see launch.py.
    """

    maps = (0, 4, 5, 6)  # of its tensors those that have the batch
    kernels = (1, 7)

    def __init__(
        self, x: Tensor, weight: Tensor, mask: Tensor | None, bias: Tensor | None = None,
        condition: Tensor | None = None, residual: Tensor | None = None, other: Tensor | None = None,
        other_weight: Tensor | None = None, *, weights: Weights, size: Sequence[int], mirrored: bool = False,
        activation: str = "none", keep: str = "", choice: Choice | None = None,
    ) -> None:  # fmt: skip
        batch, rows, height, width = self.size = (x.shape[0], *size)
        walk, gated = weights.walk, activation == "gated"
        parts = walk.parts if mirrored else 1  # of the channels read
        channels, others = x.shape[1] // parts, 0 if other is None else other.shape[1]
        read = [x] if other is None else [x, other]
        all_rows = 2 * rows if gated else rows
        direction, pixels = "in" if mirrored else "out", batch * height * width
        self.layer = layer = weights.layer(direction, read, all_rows, pixels, gated, rows, channels)
        self.weights, self.mirrored, self.activation, self.keep = weights, mirrored, activation, keep
        self.terms, self.gradients = walk.taps * x.shape[1] + others, {}  # type: tuple[int, dict[Any, Any]]
        self.new_out = empties(x, channels_last(*self.size))
        self.new_kept = empties(x, channels_last(batch, 2 * rows if keep == "both" else rows, height, width))
        self.choice = choice = choice or choose(x, layer)
        if choice.provider != "triton":
            return
        tile = choice.tile
        written = tile.N // 2 if gated else tile.N  # channels of a tile
        row_tiles = cdiv(rows, written)
        if layer.gathers:  # all that is read is one part
            pitch, channels, parts = x.shape[1], x.shape[1], 1
        else:
            pitch = parts * cdiv(channels, tile.K) * tile.K
        columns = cdiv(walk.taps * pitch, tile.K) * tile.K
        packed_columns = columns + cdiv(others, tile.K) * tile.K
        packed = dense(row_tiles * tile.N, packed_columns)
        self.new_packed = empties(x, packed)
        runs = (pitch // parts, parts) if mirrored else (RUN, 2 if gated else 1)
        pack = partial(Weights.packing, layout=packed, dtype=x.dtype, runs=runs, mirrored=mirrored)
        self.pack, self.pack_other = pack(weights, columns=columns, first=0, pitch=pitch), None
        if other_weight is not None:
            pointwise, rest = Weights.pointwise(other_weight, walk.parts), packed_columns - columns
            self.pack_other = pack(pointwise, columns=rest, first=columns, pitch=rest)
        unit, out_unit = 1 if layer.gathers else unit_of(x, channels, others), unit_of(x, rows)
        box, across, down, blocks = blocks_of(tile, batch, height, width)
        arguments = (
            0 if bias is None else rows, 0 if residual is None else rows // out_unit,
            0.0 if activation == "relu" else -math.inf, int(mirrored), batch, height, width, *x.shape[2:], across, down,
            *walk.arguments(weights.geometry, mirrored), channels // unit, parts, rows // out_unit, others // unit,
        )  # fmt: skip
        self.product = Launches(
            masked_conv2d_kernel, (blocks * row_tiles,), arguments, GATHER=layer.gathers, UNIT=unit, OUT_UNIT=out_unit,
            GATED=gated, KEEP=keep, FAST=x.dtype == torch.bfloat16 and chip_of(x.device).startswith("sm_"),
            PRECISION=precision_of(x), IMAGES=box[0], HEIGHT=box[1], WIDTH=box[2], N=tile.N, K=tile.K,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        self.boxes: tuple[Any, ...] = ()
        if tile.tma:
            sizes, block = (batch, height, width), (*box, tile.K)
            of_x = boxes(x, (batch, *x.shape[2:], x.shape[1]), block)
            of_packed = boxes(x, packed[0], (tile.N, tile.K))
            of_other = boxes(x, (*sizes, others), block) if others else None
            of_out, of_kept = (boxes(x, (*sizes, n, rows), (*box, 1, written)) for n in (1, 2 if keep == "both" else 1))
            self.boxes = (of_x, of_packed, of_other, of_out, of_kept)

    def run(
        self, x: Tensor, weight: Tensor, mask: Tensor | None, bias: Tensor | None = None,
        condition: Tensor | None = None, residual: Tensor | None = None, other: Tensor | None = None,
        other_weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        if self.choice.provider != "triton":
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
            self.product.start(x, packed, other, bias, condition, residual, out, kept)
            return out, kept
        of_x, of_packed, of_other, of_out, of_kept = self.boxes
        self.product.start(
            of_x(x), of_packed(packed), None if other is None else of_other(other), bias, condition, residual,
            of_out(out), None if kept is None else of_kept(kept),
        )  # fmt: skip
        return out, kept

    def by_cudnn(self, x: Tensor, weight: Tensor, mask: Tensor | None, *added: Tensor | None) -> Any:
        """The sums by cuDNN, what follows them by PyTorch."""
        cropped = self.weights.cropped(weight, mask)
        if self.mirrored:
            return cudnn.input_gradient(x, self.size, cropped), None
        return cudnn.forward(x, cropped, self.activation, self.keep, *added)


class WeightGradient:
    """The gradients of the weight and, where `adds_up`, of the bias (O,), from that of the sums."""

    maps = (0, 1)
    kernels = ()

    def __init__(
        self, grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor | None, *, weights: Weights, adds_up: bool,
        choice: Choice | None = None,
    ) -> None:  # fmt: skip
        walk = weights.walk
        batch, all_rows, height, width = grad.shape
        pixels, channels = batch * height * width, x.shape[1]
        self.layer = layer = weights.layer("weight", [x, grad], all_rows, pixels, False)
        self.weights, self.terms, self.adds_up = weights, pixels, adds_up
        self.choice = choice = choice or choose(x, layer)
        if choice.provider != "triton":
            return
        tile = choice.tile
        pitch = channels if layer.gathers else cdiv(channels, tile.K) * tile.K
        columns = cdiv(walk.taps * pitch, tile.K) * tile.K
        pairs = cdiv(all_rows, tile.N) * (columns // tile.K)
        box, across, down, blocks = blocks_of(tile, batch, height, width)
        # 512 pixels a share at least: what a share of 128 x 128 sums writes is then half of what it loads.
        steps = cdiv(blocks, max(1, min(PROGRAMS // pairs, pixels // 512)))
        self.shares = shares = cdiv(blocks, steps)
        self.new_out, self.new_bias = empties(x, dense(*weights.shape)), empties(x, dense(all_rows))
        self.new_partial = empties(x, dense(shares, all_rows, columns + BIASES.value), torch.float32)
        rows = all_rows // walk.parts
        unit, grad_unit = 1 if layer.gathers else unit_of(x, channels), unit_of(grad, rows)
        arguments = (
            int(adds_up), batch, height, width, *x.shape[2:], across, down, steps, channels // unit, rows // grad_unit,
            walk.parts, *walk.arguments(weights.geometry, False),
        )  # fmt: skip
        self.product = Launches(
            masked_conv2d_weight_kernel, (pairs, shares), arguments, GATHER=layer.gathers, UNIT=unit,
            GRAD_UNIT=grad_unit, PRECISION=precision_of(x), IMAGES=box[0], HEIGHT=box[1], WIDTH=box[2], N=tile.N,
            K=tile.K, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        self.boxes = tile.tma and [
            boxes(x, (batch, *t.shape[2:], t.shape[1]), (*box, side)) for t, side in ((grad, tile.N), (x, tile.K))
        ]
        size, flat = weights.size, max(256, next_power_of_2(weights.size))
        inputs = flat // size  # of a program
        inputs = inputs // 8 * 8 or inputs
        sum_arguments = (
            all_rows if weights.masked else 0, shares, all_rows, columns // 16,
            min(columns // tile.K, BIASES.value) if adds_up else 0, channels * size, pitch, inputs, size,
            walk.taps, walk.first, walk.width, walk.box[0], walk.box[2], weights.shape[3],
        )  # fmt: skip
        grid = (cdiv(all_rows, 8), cdiv(channels, inputs))
        self.sum = Launches(masked_conv2d_sum_kernel, grid, sum_arguments, FLAT=flat, OUTPUTS=8)

    def run(self, grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.choice.provider != "triton":
            return self.by_cudnn(grad, x, weight, mask)
        out, bias, shares = self.new_out(), self.new_bias() if self.adds_up else None, self.new_partial()
        read = (self.boxes[0](grad), self.boxes[1](x)) if self.boxes else (grad, x)
        self.product.start(*read, shares)
        self.sum.start(shares, mask, out, out if bias is None else bias)
        return out, bias

    def by_cudnn(self, grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        gradient = cudnn.weight_gradient(grad, x, weight, self.weights.cropped(weight, mask))
        return gradient, grad.sum((0, 2, 3)) if self.adds_up else None


def products_of(
    x: Tensor, weight: Tensor, mask: Tensor | None, geometry: Geometry, activation: str, keep: str
) -> dict[str, tuple[Any, tuple[Tensor | None, ...]]]:
    """By `Layer.direction`: what makes each product of a layer, and its tensors. The gradient of the sums is not
    initialized."""
    walk = known_walk(mask, weight.shape, 2 if activation == "gated" else 1)
    weights = Weights.of(weight, walk, geometry)
    size = result_size(x, weight, geometry)
    grad = x.new_empty_strided(*channels_last(x.shape[0], weight.shape[0], *size))
    made: Any = {"weights": weights, "size": (weight.shape[0] // walk.parts, *size)}
    return {
        "out": (partial(Convolve, **made, activation=activation, keep=keep), (x, weight, mask)),
        "in": (partial(Convolve, weights=weights, size=x.shape[1:], mirrored=True), (grad, weight, mask)),
        "weight": (partial(WeightGradient, weights=weights, adds_up=True), (grad, x, weight, mask)),
    }
