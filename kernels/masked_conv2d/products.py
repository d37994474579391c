"""The products of a masked convolution, each ready to be run for tensors of one kind: `Convolve` for the result and the
gradient of the input, `WeightGradient`.

All that depends on shapes, strides and dtypes alone is found once, in the constructors; a call allocates its results
and launches. Sizes reach the kernels as plain integers, so that nothing lies on the device between calls.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgen.kernels.common import cdiv, next_power_of_2, prepare
from fastgen.kernels.masked_conv2d import cudnn
from fastgen.kernels.masked_conv2d.backward import masked_conv2d_sum_kernel, masked_conv2d_weight_kernel
from fastgen.kernels.masked_conv2d.config import Choice, Layer, chip_of, choose, has_tma, precision_of
from fastgen.kernels.masked_conv2d.forward import masked_conv2d_kernel, masked_conv2d_pack_kernel
from fastgen.kernels.masked_conv2d.walk import Geometry, Walk, walk_arguments

# Shares of the pixels are cut so that about as many programs run, two on each multiprocessor of a Hopper: every share
# is written and read again, which with more would be more than the maps for few images. A constant: sums do not depend
# on the chip.
PROGRAMS = 256
RUN = 8  # rows of a half of a gate that lie side by side in packed weights, see forward.py
BOX = ("IMAGES", "HEIGHT", "WIDTH")


class Launches:
    """Launches of one kernel in which only the tensors differ."""

    __slots__ = ("arguments", "constants", "grid", "kernel", "ready")

    def __init__(self, kernel: Any, grid: tuple[int, ...], arguments: tuple[int, ...], **constants: Any) -> None:
        self.kernel, self.grid, self.arguments, self.constants = kernel, grid, arguments, constants
        self.ready: Any = None

    def __call__(self, *tensors: Any) -> None:
        arguments = tensors + self.arguments
        if self.ready is None:
            self.ready = prepare(self.kernel, arguments, self.constants)
        self.ready(self.grid, arguments)


class Boxes:
    """Makes tensor descriptors of tensors of one kind, in blocks; Triton's own constructor takes the host longer."""

    __slots__ = ("fields", "kind")

    def __init__(self, like: Tensor, sizes: list[int], strides: list[int], block: list[int]) -> None:
        from triton.tools.tensor_descriptor import TensorDescriptor

        self.kind = TensorDescriptor
        self.fields = {**vars(TensorDescriptor(like, sizes, strides, block)), "base": None}

    def __call__(self, x: Tensor) -> Any:
        made = object.__new__(self.kind)
        made.__dict__.update(self.fields)
        made.base = x
        return made


def boxes_of_map(x: Tensor, box: list[int], channels: int) -> Boxes:
    order = (0, 2, 3, 1)
    return Boxes(x, [x.shape[a] for a in order], [x.stride(a) for a in order], [*box, channels])


def boxes_of_result(x: Tensor, halves: int, box: list[int], channels: int) -> Boxes:
    """Of a channels-last map whose channels are `halves` times as many."""
    batch, all_rows, height, width = x.shape
    rows = all_rows // halves
    strides = [height * width * all_rows, width * all_rows, all_rows, rows, 1]
    return Boxes(x, [batch, height, width, halves, rows], strides, [*box, 1, channels])


def box_of(pixels: int, batch: int, height: int, width: int) -> tuple[int, int, int]:
    """(images, rows, columns) of a box of `pixels` pixels, all powers of two, of which the fewest boxes are needed."""
    powers = [1 << i for i in range(pixels.bit_length())]
    shapes = [(pixels // (high * wide), high, wide) for wide in powers for high in powers if high * wide <= pixels]
    # Among equals the widest, whose pixels lie side by side.
    return min(shapes, key=lambda s: (cdiv(batch, s[0]) * cdiv(height, s[1]) * cdiv(width, s[2]), -s[2], -s[1]))


def side_by_side(x: Tensor) -> bool:
    """Whether the kernels can read a map (B, C, H, W) as it lies."""
    return x.stride(1) == 1 or x.shape[1] == 1


def unit_of(x: Tensor, *counts: int) -> int:
    """Elements of 16 bytes where all strides of the pixels, counts and the address are multiples of them, else 1."""
    unit = 16 // x.element_size()
    steps = (x.stride(axis) for axis in (0, 2, 3) if x.shape[axis] > 1)
    return 1 if x.data_ptr() % 16 or any(n % unit for n in (*steps, *counts)) else unit


def pixel_steps(x: Tensor, unit: int) -> tuple[int, ...]:
    return tuple(0 if x.shape[axis] == 1 else x.stride(axis) // unit for axis in (0, 2, 3))


# Sizes and strides are found once for `new_empty_strided`, which takes the host a third of what `torch.empty` takes.
Layout = tuple[tuple[int, ...], tuple[int, ...]]


def channels_last(batch: int, channels: int, height: int, width: int) -> Layout:
    return (batch, channels, height, width), (height * width * channels, 1, width * channels, channels)


def contiguous(*size: int) -> Layout:
    return size, tuple(math.prod(size[axis + 1 :]) for axis in range(len(size)))


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
        for one in maps:
            steps = [one.stride(axis) * one.element_size() for axis in (0, 2, 3)]
            tma = tma and one.stride(1) == 1 and one.data_ptr() % 16 == 0 and all(s > 0 and s % 16 == 0 for s in steps)
        return Layer(direction, x.dtype, rows, x.shape[1], self.walk.live, pixels, step, gated, tma)

    def choose(self, layer: Layer, device: torch.device) -> Choice:
        top, bottom, left, right = self.walk.box
        return choose(device, layer, precision_of(device, layer.dtype), (bottom - top) * (right - left))

    def box(self, choice: Choice) -> tuple[int, int, int, int] | None:
        """What cuDNN convolves with; None: all."""
        return self.walk.box if choice.provider == "cropped" and self.walk.live else None

    def unit(self, dtype: torch.dtype, *counts: int) -> int:
        """Elements of 16 bytes where an output's weights and the counts are multiples of them, else 1."""
        unit = 16 // dtype.itemsize
        row = self.shape[1] if self.channels_last else self.shape[1] * self.size
        return unit if all(n % unit == 0 for n in (row, *counts)) else 1

    def flat(self, unit: int) -> int:
        """`FLAT` of the packing; one value for most kernel sizes, so that few are compiled: the first layers of models,
        which have large kernels, have no unit."""
        return 16 if self.channels_last else max(256 if unit > 1 else 1024, next_power_of_2(16 * self.size))


def blocks_of(choice: Choice, batch: int, height: int, width: int) -> tuple[dict[str, int], int, int, int]:
    """How the pixels of a map are divided: (constants of the kernel, boxes across, boxes down, number of blocks)."""
    pixels = choice.tile.M
    if not choice.tile.tma:
        return dict(zip(BOX, (pixels, 0, 0), strict=True)), 1, 1, cdiv(batch * height * width, pixels)
    box = box_of(pixels, batch, height, width)
    across, down = cdiv(width, box[2]), cdiv(height, box[1])
    return dict(zip(BOX, box, strict=True)), across, down, cdiv(batch, box[0]) * across * down


class Convolve:
    """activation(conv(x, weight) + conv1x1(other) + biases) + residual, or with `mirrored` the gradient of the input.

    Constructed with the tensors of a first call, weights and mask contiguous; results are channels-last. `choice`
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
        taps = (walk.taps, cdiv(columns, pitch), walk.first, walk.width, walk.box[0] * weights.shape[3] + walk.box[2])
        halves = (pitch // parts, parts) if mirrored else (RUN, 2 if gated else 1)
        self.pack = self._packing(weights, columns, 0, pitch, halves, taps)
        self.pack_other = None
        if other_weight is not None:
            rest, pointwise = packed_columns - columns, Weights(other_weight.shape, walk, weights.geometry, False)
            self.pack_other = self._packing(pointwise, rest, columns, rest, halves, (1, 1, 0, 1, 0))
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
            channels // unit, part_blocks, parts, rows // out_unit,
            row_tiles, columns, packed_columns // 16, others // unit, *pixel_steps(x, unit),
            *((0,) * 3 if other is None else pixel_steps(other, unit)),
            *((0,) * 3 if residual is None else pixel_steps(residual, out_unit)), x.stride(1) if layer.gathers else 1,
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
            block = list(box.values())
            out, kept = self.results(x)
            of_kept = boxes_of_result(kept, 2 if keep == "both" else 1, block, written) if gated and keep else None
            of_packed = Boxes(x, list(self.packed[0]), list(self.packed[1]), [tile.N, tile.K])
            of_other = None if other is None else boxes_of_map(other, block, tile.K)
            of_out = boxes_of_result(out, 1, block, written)
            self.boxes = (boxes_of_map(x, block, tile.K), of_packed, of_other, of_out, of_kept)

    def _packing(self, weights: Weights, columns: int, first: int, pitch: int, halves: Any, taps: Any) -> Launches:
        """Of a weight into as many columns from the first on, `pitch` for each tap."""
        outputs, inputs = weights.shape[:2]
        packed_rows, packed_columns = self.packed[0]
        unit = weights.unit(self.layer.dtype, pitch)
        rows = 16 if unit > 1 else 4
        places = (pitch, packed_rows) if self.mirrored else (packed_rows, pitch)
        arguments = (
            outputs // halves[1] if weights.masked else 0, packed_rows, columns // 16, packed_columns // 16,
            first // 16, pitch // unit, outputs // halves[1], inputs * weights.size // unit, *halves, weights.size,
            *taps, weights.shape[3],
        )  # fmt: skip
        return Launches(
            masked_conv2d_pack_kernel, (cdiv(places[0], rows), cdiv(places[1], 16)), arguments,
            MIRRORED=self.mirrored, CHANNELS_LAST=weights.channels_last, UNIT=unit, FLAT=weights.flat(unit),
            OUTPUTS=rows, INPUTS=16,
        )  # fmt: skip

    def results(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Uninitialized: (B, C, H, W), and what is kept."""
        out = x.new_empty_strided(*self.layout)
        if not self.keep:
            return out, out
        return out, x.new_empty_strided(*self.kept_layout, dtype=self.kept_dtype)

    def __call__(
        self, x: Tensor, weight: Tensor, mask: Tensor | None, bias: Tensor | None = None,
        condition: Tensor | None = None, residual: Tensor | None = None, other: Tensor | None = None,
        other_weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        if self.choice.provider != "triton":
            return self.by_cudnn(x, weight, mask, bias, condition, residual, other, other_weight)
        out, kept = self.results(x)
        packed = x.new_empty_strided(*self.packed)
        self.pack(weight, mask, packed)
        if self.pack_other is not None:
            self.pack_other(other_weight, mask, packed)
        read: tuple[Any, ...] = (x, packed, other)
        written: tuple[Any, ...] = (out, kept if self.keep else None)
        if self.boxes:
            of_x, of_packed, of_other, of_out, of_kept = self.boxes
            read = (of_x(x), of_packed(packed), None if of_other is None else of_other(other))
            written = (of_out(out), written[1] if of_kept is None else of_kept(kept))
        # What is not there is not read; in its place x spares another compilation, but costs a gate registers.
        absent = None if self.activation == "gated" else x
        self.run(*read, x if bias is None else bias, condition, absent if residual is None else residual, *written)
        return out, kept

    def by_cudnn(
        self, x, weight, mask, bias=None, condition=None, residual=None, other=None, other_weight=None
    ) -> tuple[Tensor, Tensor]:
        """The sums by cuDNN, the finish by PyTorch."""
        box, mask = self.weights.box(self.choice), mask if self.weights.masked else None
        if self.mirrored:
            of_x = cudnn.input_gradient(x, self.size, weight, mask, box, self.weights.geometry)
            return of_x.contiguous(memory_format=torch.channels_last), of_x
        return cudnn.forward(
            x, weight, mask, box, self.weights.geometry, bias, condition, residual, other, other_weight,
            self.activation, self.keep,
        )  # fmt: skip


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
        self.boxes: tuple[Any, ...] = ()
        if tile.tma:
            self.boxes = tuple(
                boxes_of_map(one, list(box.values()), side) for one, side in ((grad, tile.N), (x, tile.K))
            )
        taps = (walk.taps, walk.first, walk.width, walk.box[0], walk.box[2])
        self.sum = sum_of(shares, columns, pitch, weights.shape, taps, weights.masked)

    def __call__(self, grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.choice.provider != "triton":
            return self.by_cudnn(grad, x, weight, mask)
        out = x.new_empty_strided(*self.out)
        partial = x.new_empty_strided(*self.partial, dtype=torch.float32)
        sums = x.new_empty_strided(*self.sums, dtype=torch.float32) if self.adds_up else None
        of_grad, of_x = (self.boxes[0](grad), self.boxes[1](x)) if self.boxes else (grad, x)
        self.run(of_grad, of_x, grad, partial, partial if sums is None else sums)
        self.sum(partial, mask, out)
        return out, sums

    def by_cudnn(self, grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        box, mask = self.weights.box(self.choice), mask if self.weights.masked else None
        of_weight = cudnn.weight_gradient(grad, x, weight, mask, box, self.weights.geometry)
        return of_weight, grad.sum((0, 2, 3))[None, None] if self.adds_up else None
