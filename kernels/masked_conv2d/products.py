"""The three products of a masked convolution, each ready to be run for tensors of one kind: `Convolve` for the result and
the gradient of the input, `WeightGradient`.

All that depends on shapes, strides and dtypes alone is found once, in the constructors; a call allocates its results
and launches. Sizes reach the kernels as plain integers, so that nothing lies on the device between calls.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgen.kernels.common import cdiv, prepare
from fastgen.kernels.masked_conv2d import cudnn
from fastgen.kernels.masked_conv2d.backward import (
    masked_conv2d_weight_kernel,
    masked_conv2d_weight_sum_kernel,
    masked_conv2d_weight_tma_kernel,
)
from fastgen.kernels.masked_conv2d.config import Choice, Layer, chip_of, choose, has_tma, precision_of
from fastgen.kernels.masked_conv2d.forward import (
    masked_conv2d_kernel,
    masked_conv2d_pack_kernel,
    masked_conv2d_tma_kernel,
)
from fastgen.kernels.masked_conv2d.walk import Geometry, Walk, walk_arguments

# Shares of the pixels are cut so that about as many programs run, two on each multiprocessor of a Hopper: every share
# is written and read again, which with more would be more than the maps for few images. A constant: sums do not depend
# on the chip.
PROGRAMS = 256


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
    """Tensor descriptors of maps (B, C, H, W) in boxes of pixels and channels; `whole`: its dimensions and steps."""

    __slots__ = ("kind", "known")

    def __init__(self, x: Tensor, sizes: list[int], strides: list[int], block: list[int]) -> None:
        from triton.tools.tensor_descriptor import TensorDescriptor

        self.kind = TensorDescriptor
        self.known = {**vars(TensorDescriptor(x, sizes, strides, block)), "base": None}

    def __call__(self, x: Tensor) -> Any:
        made = object.__new__(self.kind)
        made.__dict__.update(self.known)
        made.base = x
        return made


def boxes_of_map(x: Tensor, box: tuple[int, int, int], channels: int) -> Boxes:
    order = (0, 2, 3, 1)
    return Boxes(x, [x.shape[a] for a in order], [x.stride(a) for a in order], [*box, channels])


def descriptors_fit(x: Tensor) -> bool:
    """Whether the accelerator can address a map (B, C, H, W): channels side by side, all else in units of 16 bytes."""
    steps = [x.stride(axis) * x.element_size() for axis in (0, 2, 3)]
    return x.stride(1) == 1 and all(step > 0 and step % 16 == 0 for step in steps) and x.data_ptr() % 16 == 0


def box_of(pixels: int, batch: int, height: int, width: int) -> tuple[int, int, int]:
    """(images, rows, columns) of a box of `pixels` pixels, all powers of two, of which the fewest boxes are needed."""
    shapes = []
    wide = 1
    while wide <= pixels:
        high = 1
        while wide * high <= pixels:
            shapes.append((pixels // (wide * high), high, wide))
            high *= 2
        wide *= 2
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


@dataclass(frozen=True)
class Weights:
    """A weight (O, I, kh, kw) as a product sees it: all but its values."""

    shape: torch.Size
    strides: tuple[int, ...]
    mask_strides: tuple[int, ...] | None
    walk: Walk
    geometry: Geometry

    @property
    def step(self) -> int:
        return self.geometry.stride[0] * self.geometry.stride[1]

    @property
    def boxed(self) -> int:
        top, bottom, left, right = self.walk.box
        return (bottom - top) * (right - left)


class Convolve:
    """activation(conv(x, weight) + conv1x1(other) + biases) + residual, or with `mirrored` the gradient of the input.

    Constructed with the tensors of a first call; results are channels-last. `choice` instead of what is chosen.
    """

    def __init__(
        self,
        x: Tensor,
        weights: Weights,
        size: tuple[int, ...],
        *,
        mirrored: bool = False,
        activation: str = "none",
        keep: str = "",
        residual: Tensor | None = None,
        other: Tensor | None = None,
        other_strides: tuple[int, ...] = (),
        choice: Choice | None = None,
    ) -> None:
        batch, rows, height, width = size
        walk, geometry = weights.walk, weights.geometry
        gated = activation == "gated"
        parts = walk.parts if mirrored else 1  # of the channels read
        layer = Layer(
            "in" if mirrored else "out", x.dtype, 2 * rows if gated else rows, x.shape[1], walk.live,
            batch * height * width, weights.step, gated, False,
        )  # fmt: skip
        fits = not layer.gathers and weights.step == 1 and has_tma(chip_of(x.device)) and descriptors_fit(x)
        aligned = not (rows * x.element_size() % 16 or x.shape[1] // parts * x.element_size() % 16)
        fits = fits and aligned and (other is None or descriptors_fit(other))
        layer = Layer(**{**vars(layer), "tma": fits})
        precision = precision_of(x.device, x.dtype)
        self.layer, self.weights, self.mirrored = layer, weights, mirrored
        self.activation, self.keep = activation, keep
        self.choice = choice = choice or choose(x.device, layer, precision, weights.boxed)
        self.size, self.strides = size, (height * width * rows, 1, width * rows, rows)
        kept = {"": 0, "both": 2 * rows}.get(keep, rows)
        self.kept_size = (batch, kept, height, width)
        self.kept_strides = (height * width * kept, 1, width * kept, kept)
        if choice.provider != "triton" or batch * rows * height * width == 0:
            return
        tile = choice.tile
        run = 0 if not gated else 8 if tile.tma else 1
        columns = rows * 2 if gated else rows
        row_tiles = cdiv(rows, tile.N // 2) if gated else cdiv(rows, tile.N)
        row_pad = row_tiles * tile.N
        channels = x.shape[1] // parts
        part_blocks = cdiv(channels, tile.K)
        if layer.gathers:  # all that is read is one part
            channels, part_blocks, parts = x.shape[1], 1, 1
        pitch = channels if layer.gathers else parts * part_blocks * tile.K
        columns = cdiv(walk.taps * pitch, tile.K) * tile.K
        others = 0 if other is None else other.shape[1]
        packed_columns = columns + cdiv(others, tile.K) * tile.K
        self.packed = (row_pad, packed_columns)
        kernel_height, kernel_width = weights.shape[2:]
        of_part = weights.shape[0] // 2 if gated else 0

        def packing(strides: tuple[int, ...], mask: tuple[int, ...] | None, shape: tuple[int, ...], into: tuple[int, ...],
                    taps: tuple[int, ...]) -> Launches:  # fmt: skip
            numbers: list[int] = []
            for steps in (strides, mask or (0,) * 4):
                row, channel = (steps[1], steps[0]) if mirrored else (steps[0], steps[1])
                numbers += [of_part * row, row, channel, steps[2], steps[3]]
            grid = (cdiv(row_pad, 16), cdiv(into[0], 64))
            sizes = (rows, row_pad, into[0], packed_columns, *into[1:])
            return Launches(masked_conv2d_pack_kernel, grid, (*sizes, *numbers, *taps), RUN=run, ROWS=16, COLUMNS=64)

        into = (columns, 0, pitch, pitch // parts, channels)
        taps = (walk.taps, walk.first, walk.width, walk.box[0], walk.box[2])
        self.pack = packing(weights.strides, weights.mask_strides, (kernel_height, kernel_width), into, taps)
        self.pack_other = None
        if other is not None:
            rest = packed_columns - columns
            self.pack_other = packing(other_strides, None, (1, 1), (rest, columns, rest, rest, others), (1, 0, 1, 0, 0))
        out_unit = unit_of(residual, rows) if residual is not None else 1
        if residual is None and (rows * x.element_size()) % 16 == 0:
            out_unit = 16 // x.element_size()
        ends = (0,) * 3 if residual is None else pixel_steps(residual, out_unit)
        residual_channel = 1 if residual is None or residual.shape[1] == 1 else residual.stride(1)
        constants: dict[str, Any] = {
            "MIRRORED": mirrored, "OUT_UNIT": out_unit, "ACTIVATION": activation, "KEEP": keep, "PRECISION": precision,
            "FAST": x.dtype == torch.bfloat16 and chip_of(x.device).startswith("sm_"), "N": tile.N, "K": tile.K,
            "num_warps": tile.num_warps, "num_stages": tile.num_stages,
        }  # fmt: skip
        walked = walk_arguments(walk, geometry, mirrored)
        self.boxes: tuple[Any, ...] = ()
        if tile.tma:
            box = box_of(tile.M, batch, height, width)
            across, down = cdiv(width, box[2]), cdiv(height, box[1])
            arguments = (
                batch, height, width, across, down, *walked, channels, part_blocks, parts, rows // out_unit, row_tiles,
                columns, others, *ends, residual_channel,
            )  # fmt: skip
            constants |= dict(zip(("IMAGES", "HEIGHT", "WIDTH"), box, strict=True))
            grid = (cdiv(batch, box[0]) * down * across * row_tiles,)
            self.run = Launches(masked_conv2d_tma_kernel, grid, arguments, **constants)
            stored = tile.N // 2 if gated else tile.N
            packed = x.new_empty(self.packed)
            out, map_of_kept = self.results(x)
            kept_boxes = None
            if keep == "valve":
                kept_boxes = boxes_of_map(map_of_kept, box, stored)
            if keep == "both":
                sizes, steps = (
                    [batch, height, width, 2, rows],
                    [2 * rows * height * width, 2 * rows * width, 2 * rows, rows, 1],
                )
                kept_boxes = Boxes(map_of_kept, sizes, steps, [*box, 1, stored])
            self.boxes = (
                boxes_of_map(x, box, tile.K), Boxes(packed, list(self.packed), [packed_columns, 1], [tile.N, tile.K]),
                None if other is None else boxes_of_map(other, box, tile.K), boxes_of_map(out, box, stored), kept_boxes,
            )  # fmt: skip
            return
        unit = 1 if layer.gathers else unit_of(x, channels)
        if other is not None and unit != unit_of(other, others):
            unit = 1
        steps = (0,) * 3 if other is None else pixel_steps(other, unit)
        pixels = batch * height * width
        arguments = (
            pixels, height, width, x.shape[2], x.shape[3], *(geometry.stride if not mirrored else (1, 1)), *walked,
            channels // unit, part_blocks, parts, rows // out_unit, row_tiles, columns, packed_columns // 16,
            others // unit, *pixel_steps(x, unit), *steps, *ends, x.stride(1) if layer.gathers else 1, residual_channel,
        )  # fmt: skip
        constants |= {"GATHER": layer.gathers, "UNIT": unit, "M": tile.M}
        self.run = Launches(masked_conv2d_kernel, (cdiv(pixels, tile.M) * row_tiles,), arguments, **constants)

    def results(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Uninitialized: (B, C, H, W), and what is kept."""
        out = torch.empty_strided(self.size, self.strides, dtype=x.dtype, device=x.device)
        if not self.keep:
            return out, out
        dtype = torch.bool if self.keep == "sign" else x.dtype
        return out, torch.empty_strided(self.kept_size, self.kept_strides, dtype=dtype, device=x.device)

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        mask: Tensor | None,
        bias: Tensor | None = None,
        condition: Tensor | None = None,
        residual: Tensor | None = None,
        other: Tensor | None = None,
        other_weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if self.choice.provider != "triton":
            return self.by_cudnn(x, weight, mask, bias, condition, residual, other, other_weight)
        out, kept = self.results(x)
        packed = torch.empty_strided(self.packed, (self.packed[1], 1), dtype=x.dtype, device=x.device)
        self.pack(weight, mask, packed)
        if self.pack_other is not None:
            self.pack_other(other_weight, None, packed)
        if not self.boxes:
            self.run(x, packed, other, bias, condition, residual, out, kept if self.keep else None)
            return out, kept
        of_x, of_packed, of_other, of_out, of_kept = self.boxes
        self.run(
            of_x(x), of_packed(packed), None if of_other is None else of_other(other), bias, condition, residual,
            of_out(out), None if of_kept is None else of_kept(kept), kept if self.keep == "sign" else None,
        )  # fmt: skip
        return out, kept

    def by_cudnn(self, x, weight, mask, bias, condition, residual, other, other_weight) -> tuple[Tensor, Tensor]:
        """The sums by cuDNN, the finish by PyTorch."""
        box = self.weights.walk.box if self.choice.provider == "cropped" and self.weights.walk.live else None
        if self.mirrored:
            of_x = cudnn.input_gradient(x, self.size, weight, mask, box, self.weights.geometry)
            return of_x.contiguous(memory_format=torch.channels_last), of_x
        return cudnn.forward(
            x, weight, mask, box, self.weights.geometry, bias, condition, residual, other, other_weight,
            self.activation, self.keep,
        )  # fmt: skip


class WeightGradient:
    """The gradient of the weight from that of the sums, channels side by side, and partial sums of that over pixels.

    adds_up: also the latter, (1, shares, O) float32, where the kernel runs; else, and for cuDNN, None. Needs a dense
    channels-last gradient.
    """

    def __init__(self, grad: Tensor, x: Tensor, weights: Weights, *, adds_up: bool, choice: Choice | None = None):
        walk, geometry = weights.walk, weights.geometry
        batch, all_rows, height, width = grad.shape
        pixels = batch * height * width
        rows, channels = all_rows // walk.parts, x.shape[1]
        layer = Layer("weight", x.dtype, all_rows, channels, walk.live, pixels, weights.step, False, False)
        fits = not layer.gathers and weights.step == 1 and has_tma(chip_of(x.device))
        layer = Layer(**{**vars(layer), "tma": fits and descriptors_fit(x) and descriptors_fit(grad)})
        precision = precision_of(x.device, x.dtype)
        self.layer, self.weights = layer, weights
        self.choice = choice = choice or choose(x.device, layer, precision, weights.boxed)
        self.adds_up = adds_up and choice.provider == "triton"
        if choice.provider != "triton":
            return
        tile = choice.tile
        row_tiles = cdiv(all_rows, tile.N)
        blocks = 1 if layer.gathers else cdiv(channels, tile.K)
        pitch = channels if layer.gathers else blocks * tile.K
        all_blocks = cdiv(walk.taps * pitch, tile.K)
        pairs = row_tiles * all_blocks
        box = box_of(tile.M, batch, height, width)
        across, down = cdiv(width, box[2]), cdiv(height, box[1])
        whole = cdiv(batch, box[0]) * across * down if tile.tma else cdiv(pixels, tile.M)
        # 512 pixels a share at least: what a share of 128 x 128 sums writes is then half of what it loads.
        steps = cdiv(whole, max(1, min(PROGRAMS // pairs, pixels // 512)))
        shares = cdiv(whole, steps)
        self.partial, self.sums = (shares, all_rows, all_blocks * tile.K), (1, shares * all_blocks, all_rows)
        walked = walk_arguments(walk, geometry, False)
        grad_unit = unit_of(grad, rows)
        share = (blocks, rows // grad_unit, walk.parts, row_tiles, all_blocks * tile.K // 16, *walked)
        constants = {"GRAD_UNIT": grad_unit, "PRECISION": precision, "N": tile.N, "K": tile.K}
        constants |= {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        grid = (pairs, shares)
        self.boxes: tuple[Any, ...] = ()
        if tile.tma:
            constants |= dict(zip(("IMAGES", "HEIGHT", "WIDTH"), box, strict=True))
            arguments = (batch, across, down, height, width, steps, channels, *share)
            self.run = Launches(masked_conv2d_weight_tma_kernel, grid, arguments, **constants)
            self.boxes = (boxes_of_map(grad, box, tile.N), boxes_of_map(x, box, tile.K))
        else:
            unit = 1 if layer.gathers else unit_of(x, channels)
            constants |= {"GATHER": layer.gathers, "UNIT": unit, "M": tile.M}
            arguments = (
                pixels, height, width, x.shape[2], x.shape[3], *geometry.stride, steps, channels // unit, *share,
                *pixel_steps(grad, grad_unit), *pixel_steps(x, unit), x.stride(1) if layer.gathers else 1,
            )  # fmt: skip
            self.run = Launches(masked_conv2d_weight_kernel, grid, arguments, **constants)
        shape = weights.shape
        arguments = (
            shares, all_rows, all_blocks * tile.K // 16, *shape[1:], walk.taps, walk.first, walk.width, walk.box[0],
            walk.box[2], pitch,
        )  # fmt: skip
        self.sum = Launches(masked_conv2d_weight_sum_kernel, (cdiv(shape.numel(), 256),), arguments, BLOCK=256)

    def __call__(self, grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.choice.provider != "triton":
            box = self.weights.walk.box if self.choice.provider == "cropped" and self.weights.walk.live else None
            return cudnn.weight_gradient(grad, x, weight, mask, box, self.weights.geometry), None
        out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        partial = torch.empty(self.partial, dtype=torch.float32, device=x.device)
        sums = torch.empty(self.sums, dtype=torch.float32, device=x.device) if self.adds_up else None
        if self.boxes:
            of_grad, of_x = self.boxes
            self.run(of_grad(grad), of_x(x), partial, sums, grad if self.adds_up else None)
        else:
            self.run(grad, x, partial, sums)
        self.sum(partial, None if mask is None else mask.contiguous(), out)
        return out, sums
