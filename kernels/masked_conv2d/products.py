"""The products of a masked convolution, each ready to be run for tensors of one kind: `Convolve` for the result and the
gradient of the input, `WeightGradient`.

All that depends on shapes, strides and dtypes alone is found once, in the constructors; a call allocates its results
and launches. Sizes reach the kernels as plain integers, so that nothing lies on the device between calls.
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
from fastgen.kernels.masked_conv2d.backward import masked_conv2d_sum_kernel, masked_conv2d_weight_kernel
from fastgen.kernels.masked_conv2d.config import Choice, Layer, chip_of, choose, has_tma, precision_of
from fastgen.kernels.masked_conv2d.forward import masked_conv2d_kernel, masked_conv2d_pack_kernel
from fastgen.kernels.masked_conv2d.layout import (
    Boxes,
    Launches,
    Layout,
    box_of,
    boxes_of_map,
    boxes_of_result,
    channels_last,
    contiguous,
    pixel_steps,
    unit_of,
)
from fastgen.kernels.masked_conv2d.walk import Geometry, Walk, known_walk, walk_arguments

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

    @property
    def size(self) -> int:
        return self.shape[2] * self.shape[3]

    def layer(self, direction: str, maps: list[Tensor], rows: int, pixels: int, gated: bool, aligned: bool) -> Layer:
        """maps: those that the product reads, of which the first has the layer's channels. aligned: whether what else
        descriptors would address comes in units of 16 bytes."""
        x, step = maps[0], self.geometry.stride[0] * self.geometry.stride[1]
        tma = step == 1 and aligned and x.shape[1] >= 16 and has_tma(chip_of(x.device))
        for read in maps:
            steps = [read.stride(axis) * read.element_size() for axis in (0, 2, 3)]
            tma = (
                tma and read.stride(1) == 1 and read.data_ptr() % 16 == 0 and all(s > 0 and s % 16 == 0 for s in steps)
            )
        return Layer(direction, x.dtype, rows, x.shape[1], self.walk.live, pixels, step, gated, tma)

    def choose(self, layer: Layer, device: torch.device) -> Choice:
        top, bottom, left, right = self.walk.box
        return choose(device, layer, precision_of(device, layer.dtype), (bottom - top) * (right - left))

    def for_cudnn(self, choice: Choice, mask: Tensor | None) -> tuple[Tensor | None, cudnn.Box, Geometry]:
        """(the weight's mask, the box of taps that cuDNN convolves with, the geometry)."""
        box = self.walk.box if choice.provider == "cropped" and self.walk.live else None
        return mask if self.masked else None, box, self.geometry

    def packing(
        self, layout: Layout, dtype: torch.dtype, *, columns: int, first: int, pitch: int, runs: tuple[int, int],
        taps: tuple[int, ...], mirrored: bool,
    ) -> Launches:  # fmt: skip
        """Packs the weight into `columns` columns of a packed tensor from the first on, `pitch` for each tap.

        runs: how many rows of a half of a gate lie side by side, and the number of halves. taps: visited ones, rounds
        of the kernel, the walk's first and width, the corner of its box.
        """
        (packed_rows, packed_columns), (outputs, inputs) = layout[0], self.shape[:2]
        unit, row = 16 // dtype.itemsize, inputs if self.channels_last else inputs * self.size
        unit = 1 if row % unit or pitch % unit else unit
        rows, half = 16 if unit > 1 else 4, outputs // runs[1]
        # One value for most sizes, so that few kernels are compiled. First layers of models, whose kernels are large,
        # have no unit.
        flat = (
            16
            if self.channels_last
            else max(256 if unit > 1 else 1024, next_power_of_2(16 * self.size + 112 // dtype.itemsize))
        )
        arguments = (
            half if self.masked else 0, packed_rows, columns // 16, packed_columns // 16, first // 16, pitch // unit,
            half, inputs * self.size // unit, *runs, self.size, *taps, self.shape[3],
        )  # fmt: skip
        places = (pitch, packed_rows) if mirrored else (packed_rows, pitch)
        return Launches(
            masked_conv2d_pack_kernel, (cdiv(places[0], rows), cdiv(places[1], 16)), arguments, MIRRORED=mirrored,
            CHANNELS_LAST=self.channels_last, UNIT=unit, LAG=16 // dtype.itemsize, FLAT=flat, OUTPUTS=rows, INPUTS=16,
        )  # fmt: skip


def blocks_of(choice: Choice, batch: int, height: int, width: int) -> tuple[dict[str, int], int, int, int]:
    """How the pixels of a map are divided: (constants of the kernel, boxes across, boxes down, number of blocks)."""
    box, across, down = (choice.tile.M, 0, 0), 1, 1
    blocks = cdiv(batch * height * width, choice.tile.M)
    if choice.tile.tma:
        box = box_of(choice.tile.M, batch, height, width)
        across, down = cdiv(width, box[2]), cdiv(height, box[1])
        blocks = cdiv(batch, box[0]) * across * down
    return dict(zip(("IMAGES", "HEIGHT", "WIDTH"), box, strict=True)), across, down, blocks


class Convolve:
    """activation(conv(x, weight) + conv1x1(other) + biases) + residual, or with `mirrored` the gradient of the input.

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
        aligned = not (rows * x.element_size() % 16 or channels * x.element_size() % 16)
        read = [x] if other is None else [x, other]
        all_rows = 2 * rows if gated else rows
        layer = weights.layer("in" if mirrored else "out", read, all_rows, batch * height * width, gated, aligned)
        self.layer, self.weights, self.mirrored, self.activation, self.keep = layer, weights, mirrored, activation, keep
        self.terms = walk.taps * x.shape[1] + others
        self.layout = channels_last(*self.size)
        self.kept_layout = channels_last(batch, 2 * rows if keep == "both" else rows, height, width)
        self.kept_dtype = torch.bool if keep == "sign" else x.dtype
        self.choice = choice = choice or weights.choose(layer, x.device)
        if choice.provider != "triton" or batch * rows * height * width == 0:
            return
        tile = choice.tile
        written = tile.N // 2 if gated else tile.N  # channels of a tile
        row_tiles, part_blocks = cdiv(rows, written), cdiv(channels, tile.K)
        if layer.gathers:  # all that is read is one part
            channels, part_blocks, parts = x.shape[1], 1, 1
        pitch = channels if layer.gathers else parts * part_blocks * tile.K
        columns = cdiv(walk.taps * pitch, tile.K) * tile.K
        packed_columns = columns + cdiv(others, tile.K) * tile.K
        self.packed = contiguous(row_tiles * tile.N, packed_columns)
        corner = walk.box[0] * weights.shape[3] + walk.box[2]
        runs = (pitch // parts, parts) if mirrored else (RUN, 2 if gated else 1)
        pack = partial(Weights.packing, layout=self.packed, dtype=x.dtype, runs=runs, mirrored=mirrored)
        taps = (walk.taps, cdiv(columns, pitch), walk.first, walk.width, corner)
        self.pack, self.pack_other = pack(weights, columns=columns, first=0, pitch=pitch, taps=taps), None
        if other_weight is not None:
            rest, pointwise = packed_columns - columns, Weights(other_weight.shape, walk, weights.geometry, False)
            self.pack_other = pack(pointwise, columns=rest, first=columns, pitch=rest, taps=(1, 1, 0, 1, 0))
        unit = 1 if layer.gathers else unit_of(x, channels)
        if other is not None and unit != unit_of(other, others):
            unit = 1
        out_unit = 16 // x.element_size() if rows * x.element_size() % 16 == 0 else 1
        if residual is not None:
            out_unit = unit_of(residual, rows)
        box, across, down, blocks = blocks_of(choice, batch, height, width)
        arguments = (
            0 if bias is None else rows, 0 if residual is None else rows // out_unit,
            0.0 if activation == "relu" else -math.inf, int(mirrored), batch, height, width, *x.shape[2:], across, down,
            *((1, 1) if mirrored else weights.geometry.stride), *walk_arguments(walk, weights.geometry, mirrored),
            channels // unit, part_blocks, parts, rows // out_unit, row_tiles, columns, packed_columns // 16,
            others // unit, *pixel_steps(x, unit), *pixel_steps(other, unit), *pixel_steps(residual, out_unit),
            x.stride(1) if layer.gathers else 1,
            1 if residual is None or residual.shape[1] == 1 else residual.stride(1),
        )  # fmt: skip
        self.run = Launches(
            masked_conv2d_kernel, (blocks * row_tiles,), arguments, GATHER=layer.gathers, UNIT=unit,
            OUT_UNIT=out_unit, GATED=gated, KEEP=keep, PRECISION=precision_of(x.device, x.dtype),
            FAST=x.dtype == torch.bfloat16 and chip_of(x.device).startswith("sm_"), **box, N=tile.N, K=tile.K,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        self.boxes: tuple[Any, ...] = ()
        if tile.tma:
            block = tuple(box.values())
            out, kept = self.results(x)
            kept_boxes = boxes_of_result(kept, 2 if keep == "both" else 1, block, written) if gated and keep else None
            packed_boxes = Boxes(x, *self.packed, [tile.N, tile.K])
            other_boxes = None if other is None else boxes_of_map(other, block, tile.K)
            out_boxes = boxes_of_result(out, 1, block, written)
            self.boxes = (boxes_of_map(x, block, tile.K), packed_boxes, other_boxes, out_boxes, kept_boxes)

    def results(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Uninitialized: (B, C, H, W), and what is kept."""
        out = x.new_empty_strided(*self.layout)
        return out, x.new_empty_strided(*self.kept_layout, dtype=self.kept_dtype) if self.keep else out

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
            other = other if other is None else other_boxes(other)
            to_kept = to_kept if kept_boxes is None else kept_boxes(kept)
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


def sum_of(
    shares: int, columns: int, pitch: int, shape: Sequence[int], taps: tuple[int, ...] = (1, 0, 1, 0, 0),
    masked: bool = False,
) -> Launches:  # fmt: skip
    """Launches that add (shares, O, columns) and bring the columns, `pitch` for each tap, into a shape (O, I, kh, kw).

    taps: the walk's number of taps, its first and its width, and where its box begins, (top, left).
    """
    outputs, inputs, height, width = shape
    size, flat = height * width, max(256, next_power_of_2(height * width))
    part = flat // size  # inputs of a program
    part = part // 8 * 8 or part
    arguments = (outputs if masked else 0, shares, outputs, columns, inputs * size, pitch, part, size, *taps, width)
    grid = (cdiv(outputs, 8), cdiv(inputs, part))
    return Launches(masked_conv2d_sum_kernel, grid, arguments, FLAT=flat, OUTPUTS=8)


class WeightGradient:
    """The gradient of the weight from that of the sums, channels side by side, and partial sums of that over pixels.

    adds_up: also the latter, (shares, 1, O) float32, where the kernel runs; else, and for cuDNN, None. Needs a dense
    channels-last gradient.
    """

    maps = (0, 1)
    kernels = ()

    def __init__(
        self, grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor | None, *, weights: Weights, adds_up: bool,
        choice: Choice | None = None,
    ) -> None:  # fmt: skip
        walk = weights.walk
        batch, all_rows, height, width = grad.shape
        pixels, channels = batch * height * width, x.shape[1]
        self.layer = layer = weights.layer("weight", [x, grad], all_rows, pixels, False, True)
        self.weights, self.terms = weights, pixels
        self.choice = choice = choice or weights.choose(layer, x.device)
        self.adds_up = adds_up and choice.provider == "triton"
        if choice.provider != "triton":
            return
        tile = choice.tile
        row_tiles, tap_blocks = cdiv(all_rows, tile.N), 1 if layer.gathers else cdiv(channels, tile.K)
        pitch = channels if layer.gathers else tap_blocks * tile.K
        all_blocks = cdiv(walk.taps * pitch, tile.K)
        pairs, columns = row_tiles * all_blocks, all_blocks * tile.K
        box, across, down, blocks = blocks_of(choice, batch, height, width)
        # 512 pixels a share at least: what a share of 128 x 128 sums writes is then half of what it loads.
        steps = cdiv(blocks, max(1, min(PROGRAMS // pairs, pixels // 512)))
        shares = cdiv(blocks, steps)
        self.out, self.partial = contiguous(*weights.shape), contiguous(shares, all_rows, columns)
        self.sums = contiguous(shares * all_blocks, 1, all_rows)
        unit, grad_unit = 1 if layer.gathers else unit_of(x, channels), unit_of(grad, all_rows // walk.parts)
        arguments = (
            int(self.adds_up), batch, height, width, *x.shape[2:], across, down, *weights.geometry.stride, steps,
            channels // unit, tap_blocks, all_rows // walk.parts // grad_unit, walk.parts, row_tiles, columns // 16,
            *walk_arguments(walk, weights.geometry, False), *pixel_steps(grad, grad_unit), *pixel_steps(x, unit),
            x.stride(1) if layer.gathers else 1,
        )  # fmt: skip
        self.run = Launches(
            masked_conv2d_weight_kernel, (pairs, shares), arguments, GATHER=layer.gathers, UNIT=unit,
            GRAD_UNIT=grad_unit, PRECISION=precision_of(x.device, x.dtype), **box, N=tile.N, K=tile.K,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        block = tuple(box.values())
        self.boxes = (boxes_of_map(grad, block, tile.N), boxes_of_map(x, block, tile.K)) if tile.tma else None
        taps = (walk.taps, walk.first, walk.width, walk.box[0], walk.box[2])
        self.sum = sum_of(shares, columns, pitch, weights.shape, taps, weights.masked)

    def __call__(self, grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.choice.provider != "triton":
            return self.by_cudnn(grad, x, weight, mask)
        out = x.new_empty_strided(*self.out)
        partial_sums = x.new_empty_strided(*self.partial, dtype=torch.float32)
        sums = x.new_empty_strided(*self.sums, dtype=torch.float32) if self.adds_up else None
        read = (self.boxes[0](grad), self.boxes[1](x)) if self.boxes else (grad, x)
        self.run(*read, grad, partial_sums, partial_sums if sums is None else sums)
        self.sum(partial_sums, mask, out)
        return out, sums

    def by_cudnn(self, grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        gradient = cudnn.weight_gradient(grad, x, weight, *self.weights.for_cudnn(self.choice, mask))
        return gradient, grad.sum((0, 2, 3))[None, None] if self.adds_up else None


def products_of(
    x: Tensor, weight: Tensor, mask: Tensor | None, geometry: Geometry, activation: str, keep: str
) -> dict[str, tuple[Any, tuple[Tensor | None, ...]]]:
    """By `Layer.direction`: what makes each product of a layer, and its tensors. The gradient of the sums is not
    initialized."""
    walk = known_walk(mask, weight.shape, 2 if activation == "gated" else 1)
    weights = Weights(weight.shape, walk, geometry, channels_last=not weight.is_contiguous())
    size = result_size(x, weight, geometry)
    grad = x.new_empty_strided(*channels_last(x.shape[0], weight.shape[0], *size))
    made: Any = {"weights": weights, "size": (weight.shape[0] // walk.parts, *size)}
    return {
        "out": (partial(Convolve, **made, activation=activation, keep=keep), (x, weight, mask)),
        "in": (partial(Convolve, weights=weights, size=tuple(x.shape[1:]), mirrored=True), (grad, weight, mask)),
        "weight": (partial(WeightGradient, weights=weights, adds_up=activation == "none"), (grad, x, weight, mask)),
    }
