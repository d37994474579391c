"""The products of a masked convolution, each ready to be run for tensors of one kind: `Convolve` for the result and the
gradient of the input, `WeightGradient`.

All that depends on shapes and dtypes alone is found once, in the constructors; a call allocates its results and
launches. Sizes reach the kernels as plain integers, so that nothing lies on the device between calls. Maps are
channels-last and dense.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastgen.kernels.common import cdiv, next_power_of_2
from fastgen.kernels.maps import result_size
from fastgen.kernels.masked_conv2d import cudnn
from fastgen.kernels.masked_conv2d.backward import BIASES, masked_conv2d_sum_kernel, masked_conv2d_weight_kernel
from fastgen.kernels.masked_conv2d.config import Choice, Layer, chip_of, choose, has_tma, precision_of
from fastgen.kernels.masked_conv2d.forward import masked_conv2d_kernel, masked_conv2d_pack_kernel
from fastgen.kernels.masked_conv2d.layout import (
    Boxes,
    Launches,
    Layout,
    blocks_of,
    boxes_of,
    boxes_of_result,
    channels_last,
    dense,
    unit_of,
)
from fastgen.kernels.masked_conv2d.walk import POINTWISE, Geometry, Walk, known_walk, walk_arguments

# Shares of the pixels are cut so that about as many programs run, two on each multiprocessor of a Hopper: every share
# is written and read again, which with more would be more than the maps for few images. A constant: sums do not depend
# on the chip.
PROGRAMS = 256
RUN = 8  # rows of a half of a gate that lie side by side in packed weights, see forward.py


@dataclass(frozen=True)
class Weights:
    """A weight (O, I, kh, kw) as a product sees it: all but its values."""

    shape: torch.Size
    walk: Walk
    geometry: Geometry
    masked: bool = True  # where False, the mask of a call is another weight's
    channels_last: bool = False  # as it lies in memory; else contiguous

    @classmethod
    def of(cls, weight: Tensor, walk: Walk, geometry: Any) -> "Weights":
        return cls(weight.shape, walk, Geometry(*geometry), channels_last=not weight.is_contiguous())

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
        x, chip = maps[0], chip_of(maps[0].device)
        tma = has_tma(chip) and x.shape[1] >= 16 and all(unit_of(read, read.shape[1], *counts) > 1 for read in maps)
        return Layer(direction, x.dtype, rows, x.shape[1], self.walk.live, pixels, gated, tma)

    def choose(self, layer: Layer, device: torch.device) -> Choice:
        top, bottom, left, right = self.walk.box
        boxed = (bottom - top) * (right - left)
        return choose(device, layer, precision_of(device, layer.dtype), boxed, self.geometry.stride)

    def for_cudnn(self, choice: Choice, mask: Tensor | None) -> tuple[Tensor | None, cudnn.Box, Geometry]:
        """(the weight's mask, the box of taps that cuDNN convolves with, the geometry)."""
        box = self.walk.box if choice.provider == "cropped" and self.walk.live else None
        return mask if self.masked else None, box, self.geometry

    def packing(
        self, layout: Layout, dtype: torch.dtype, *, columns: int, first: int, pitch: int, runs: tuple[int, int],
        mirrored: bool,
    ) -> Launches:  # fmt: skip
        """Packs the weight into `columns` columns of a packed tensor from the first on, `pitch` for each tap.

        runs: how many rows of a half of a gate lie side by side, and the number of halves.
        """
        (packed_rows, packed_columns), (outputs, inputs), walk = layout[0], self.shape[:2], self.walk
        unit, row = 16 // dtype.itemsize, inputs if self.channels_last else inputs * self.size
        unit = 1 if row % unit or pitch % unit else unit
        rows, half, flat = 16 if unit > 1 else 4, outputs // runs[1], 16
        if not self.channels_last:
            # One value for most sizes, so that few kernels are compiled. First layers of models, whose kernels are
            # large, have no unit.
            flat = max(256 if unit > 1 else 1024, next_power_of_2(16 * self.size + 112 // dtype.itemsize))
        arguments = (
            half if self.masked else 0, packed_rows, columns // 16, packed_columns // 16, first // 16, pitch // unit,
            half, inputs * self.size // unit, *runs, self.size, walk.taps, cdiv(columns, pitch), walk.first, walk.width,
            walk.box[0] * self.shape[3] + walk.box[2], self.shape[3],
        )  # fmt: skip
        places = (pitch, packed_rows) if mirrored else (packed_rows, pitch)
        return Launches(
            masked_conv2d_pack_kernel, (cdiv(places[0], rows), cdiv(places[1], 16)), arguments, MIRRORED=mirrored,
            CHANNELS_LAST=self.channels_last, UNIT=unit, LAG=16 // dtype.itemsize, FLAT=flat, OUTPUTS=rows, INPUTS=16,
        )  # fmt: skip


class Convolve:
    """activation(conv(x, weight) + conv1x1(other) + biases), plus a residual where there is no activation; with
    `mirrored` the gradient of the input.

    Constructed with the tensors of a first call, laid out as launch.py says; results are channels-last. `choice`
    instead of what is chosen.

    Attributes:
        size: (B, C, H, W) of the result.
        keep: what is kept for the backward, see backward.py; "" for nothing.
        terms: how many products are added up for a result.
    """

    maps = (0, 4, 5, 6)  # of its tensors those that have the batch
    kernels = (1, 7)

    def __init__(
        self, x: Tensor, weight: Tensor, mask: Tensor | None, bias: Tensor | None = None,
        condition: Tensor | None = None, residual: Tensor | None = None, other: Tensor | None = None,
        other_weight: Tensor | None = None, *, weights: Weights, size: tuple[int, ...], mirrored: bool = False,
        activation: str = "none", keep: str = "", choice: Choice | None = None,
    ) -> None:  # fmt: skip
        batch, rows, height, width = self.size = (x.shape[0], *size)
        walk, gated = weights.walk, activation == "gated"
        parts = walk.parts if mirrored else 1  # of the channels read
        channels, others = x.shape[1] // parts, 0 if other is None else other.shape[1]
        read = [x] if other is None else [x, other]
        all_rows = 2 * rows if gated else rows
        direction = "in" if mirrored else "out"
        layer = weights.layer(direction, read, all_rows, batch * height * width, gated, rows, channels)
        self.layer, self.weights, self.mirrored, self.activation, self.keep = layer, weights, mirrored, activation, keep
        self.terms = walk.taps * x.shape[1] + others
        self.layout = channels_last(*self.size)
        self.kept_layout = channels_last(batch, 2 * rows if keep == "both" else rows, height, width)
        self.choice = choice = choice or weights.choose(layer, x.device)
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
        self.packed = dense(row_tiles * tile.N, packed_columns)
        runs = (pitch // parts, parts) if mirrored else (RUN, 2 if gated else 1)
        pack = partial(Weights.packing, layout=self.packed, dtype=x.dtype, runs=runs, mirrored=mirrored)
        self.pack, self.pack_other = pack(weights, columns=columns, first=0, pitch=pitch), None
        if other_weight is not None:
            pointwise, rest = Weights.pointwise(other_weight, walk.parts), packed_columns - columns
            self.pack_other = pack(pointwise, columns=rest, first=columns, pitch=rest)
        unit = 1 if layer.gathers else min(unit_of(one, channels, others) for one in read)
        out_unit = unit_of(x if residual is None else residual, rows)
        box, across, down, blocks = blocks_of(tile, batch, height, width)
        arguments = (
            0 if bias is None else rows, 0 if residual is None else rows // out_unit,
            0.0 if activation == "relu" else -math.inf, int(mirrored), batch, height, width, *x.shape[2:], across, down,
            *walk_arguments(walk, weights.geometry, mirrored), channels // unit, parts, rows // out_unit,
            others // unit,
        )  # fmt: skip
        self.run = Launches(
            masked_conv2d_kernel, (blocks * row_tiles,), arguments, GATHER=layer.gathers, UNIT=unit,
            OUT_UNIT=out_unit, GATED=gated, KEEP=keep, PRECISION=precision_of(x.device, x.dtype),
            FAST=x.dtype == torch.bfloat16 and chip_of(x.device).startswith("sm_"), IMAGES=box[0], HEIGHT=box[1],
            WIDTH=box[2], N=tile.N, K=tile.K, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        self.boxes: tuple[Any, ...] = ()
        if tile.tma:
            out, kept = self.results(x)
            kept_boxes = boxes_of_result(kept, 2 if keep == "both" else 1, box, written) if keep else None
            packed_boxes = Boxes(x, self.packed[0], [tile.N, tile.K])
            other_boxes = None if other is None else boxes_of(other, box, tile.K)
            out_boxes = boxes_of_result(out, 1, box, written)
            self.boxes = (boxes_of(x, box, tile.K), packed_boxes, other_boxes, out_boxes, kept_boxes)

    def results(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Uninitialized: (B, C, H, W), and what is kept."""
        out = x.new_empty_strided(*self.layout)
        return out, x.new_empty_strided(*self.kept_layout) if self.keep else out

    def __call__(
        self, x: Tensor, weight: Tensor, mask: Tensor | None, bias: Tensor | None = None,
        condition: Tensor | None = None, residual: Tensor | None = None, other: Tensor | None = None,
        other_weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        if self.choice.provider != "triton":
            return self.by_cudnn(x, weight, mask, bias, condition, residual, other, other_weight)
        read_x: Any = x
        packed: Any = x.new_empty_strided(*self.packed)
        self.pack(weight, mask, packed)
        if self.pack_other is not None:
            self.pack_other(other_weight, mask, packed)
        out, kept = self.results(x)
        to_out: Any = out
        to_kept: Any = kept if self.keep else None
        if self.boxes:
            x_boxes, packed_boxes, other_boxes, out_boxes, kept_boxes = self.boxes
            read_x, packed, to_out = x_boxes(x), packed_boxes(packed), out_boxes(out)
            other = None if other is None else other_boxes(other)
            to_kept = kept_boxes(kept) if self.keep else None
        # What is not there is not read; in its place x spares another compilation, but costs a gate registers.
        residual = x if residual is None and self.activation != "gated" else residual
        self.run(read_x, packed, other, x if bias is None else bias, condition, residual, to_out, to_kept)
        return out, kept

    def by_cudnn(
        self, x, weight, mask, bias=None, condition=None, residual=None, other=None, other_weight=None
    ) -> tuple[Tensor, Tensor]:
        """The sums by cuDNN, what follows them by PyTorch."""
        how = self.weights.for_cudnn(self.choice, mask)
        if self.mirrored:
            gradient = cudnn.input_gradient(x, self.size, weight, *how)
            return gradient, gradient
        added = (bias, condition, residual, other, other_weight)
        return cudnn.forward(x, weight, *how, *added, self.activation, self.keep)


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
        self.choice = choice = choice or weights.choose(layer, x.device)
        if choice.provider != "triton":
            return
        tile = choice.tile
        pitch = channels if layer.gathers else cdiv(channels, tile.K) * tile.K
        columns = cdiv(walk.taps * pitch, tile.K) * tile.K
        pairs = cdiv(all_rows, tile.N) * (columns // tile.K)
        box, across, down, blocks = blocks_of(tile, batch, height, width)
        # 512 pixels a share at least: what a share of 128 x 128 sums writes is then half of what it loads.
        steps = cdiv(blocks, max(1, min(PROGRAMS // pairs, pixels // 512)))
        shares = cdiv(blocks, steps)
        self.out, self.bias, self.partial = (
            dense(*weights.shape), dense(all_rows), dense(shares, all_rows, columns + BIASES.value)
        )  # fmt: skip
        rows = all_rows // walk.parts
        unit, grad_unit = 1 if layer.gathers else unit_of(x, channels), unit_of(grad, rows)
        arguments = (
            int(adds_up), batch, height, width, *x.shape[2:], across, down, steps, channels // unit, rows // grad_unit,
            walk.parts, *walk_arguments(walk, weights.geometry, False),
        )  # fmt: skip
        self.run = Launches(
            masked_conv2d_weight_kernel, (pairs, shares), arguments, GATHER=layer.gathers, UNIT=unit,
            GRAD_UNIT=grad_unit, PRECISION=precision_of(x.device, x.dtype), IMAGES=box[0], HEIGHT=box[1], WIDTH=box[2],
            N=tile.N, K=tile.K, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        self.boxes = (boxes_of(grad, box, tile.N), boxes_of(x, box, tile.K)) if tile.tma else None
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

    def __call__(self, grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.choice.provider != "triton":
            return self.by_cudnn(grad, x, weight, mask)
        out, bias = x.new_empty_strided(*self.out), x.new_empty_strided(*self.bias) if self.adds_up else None
        partial_sums = x.new_empty_strided(*self.partial, dtype=torch.float32)
        read = (self.boxes[0](grad), self.boxes[1](x)) if self.boxes else (grad, x)
        self.run(*read, partial_sums)
        self.sum(partial_sums, mask, out, out if bias is None else bias)
        return out, bias

    def by_cudnn(self, grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        gradient = cudnn.weight_gradient(grad, x, weight, *self.weights.for_cudnn(self.choice, mask))
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
        "in": (partial(Convolve, weights=weights, size=tuple(x.shape[1:]), mirrored=True), (grad, weight, mask)),
        "weight": (partial(WeightGradient, weights=weights, adds_up=True), (grad, x, weight, mask)),
    }
