"""The diagonal and the Row LSTM by tiles, for sizes of which a program cannot hold weights and states, a launch a scan.

A step computes a diagonal of each image, or with ROW_SCAN a row: pixels that depend on the step before, and not on each
other. A program scans its images side by side. It cuts the pixels of a step into tiles of M pixels and U units, and
computes tile after tile. The gates of a tile are products of weights with the hidden states of its neighbours, a
neighbour a tap, added up in parts of K units. States are written to memory, and read from the cache in the next step;
after a step the threads wait until all have written.

The floor of a program's traffic: in each step all weights, which exceed shared memory; of each pixel its terms, what is
saved, its state once. Counted with images of 16 x 16, float32, to train, 1.02 to 1.09 of it is moved by the diagonal
LSTM and 1.05 to 1.18 by the Row LSTM, as a state is read once a tap and once a tile of units. Where the pixels of a
step fill several tiles, weights are read once a tile: a larger one does not fit the registers.

Barriers a step, counted in the same way at 64 and 128 units: in float32 on sm_90, diagonal 5 and 13 forward, 11 and 19
backward; row 7 and 13, 15 and 27. On other chips weights and states pass through shared memory, two barriers a part:
diagonal 13 and 41, 21 and 37; row 17 and 57, 29 and 53. Half of the 99 KiB that three of these chips have holds a part
of 32 channels forward and of 64 backward, as the next one is on its way in the other half; only sm_80 has room for
more. At 64 units 128 channels would fit the backward, in 13 and 17 barriers, but spill up to 72 bytes. Fragments do not
help there: tensor cores take states from registers, too, so that each 16 channels of them are converted, in two
barriers (71 forward at 128 units); where the compiler copies states asynchronously, it passes weights through shared
memory as well, and needs as much of it.
In bfloat16 at 128 units a part has 32 channels forward and 128 backward, which wait 21 and 23 times on sm_80, the Row
LSTM's 29 and 31; a larger part forward spills, and of a larger one backward the next could not be fetched meanwhile.

Arguments: `fastgen.kernels.lstm.cell` and, of products, `fastgen.kernels.lstm.neighbours`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels.common import Launches, cdiv
from fastgen.kernels.lstm.calls import Call, new_map, new_results
from fastgen.kernels.lstm.cell import (
    add_gates,
    cell_backward,
    cell_forward,
    gates_of,
    load_saved,
    load_terms,
    offsets,
    store_gates,
    widened,
)
from fastgen.kernels.lstm.choice import TileLaunch, constants_of
from fastgen.kernels.lstm.entries import tile_entries
from fastgen.kernels.lstm.neighbours import in_fragments, sums_of_fragments, sums_of_parts
from fastgen.kernels.maps import empties


@triton.jit
def pixels_of(step, height, width, ROW_SCAN: tl.constexpr):
    """How many pixels a step has in an image."""
    return width if ROW_SCAN else tl.minimum(tl.minimum(step + 1, height + width - 1 - step), tl.minimum(height, width))


@triton.jit
def place(m, step, first_image, images, height, width, ROW_SCAN: tl.constexpr, REVERSE: tl.constexpr):
    """The m-th pixel of a step: its image, row, column in the order of the scan, column x in memory and offset in
    pixels; whether there is such a pixel; and whether it has a previous one, whose cell state it takes."""
    top = step if ROW_SCAN else tl.maximum(step - width + 1, 0)
    count = pixels_of(step, height, width, ROW_SCAN)
    image = first_image + m // count
    row = top + (tl.zeros_like(m) if ROW_SCAN else m % count)
    column = m % count if ROW_SCAN else step - row
    x = width - 1 - column if REVERSE else column
    pixel = (image.to(tl.int64) * height + row) * width + x
    return image, row, column, x, pixel, m < images * count, row > 0 if ROW_SCAN else column > 0


@triton.jit(do_not_specialize=("batch", "images"))
def lstm_tiles_forward_kernel(
    gates_ptr,
    weight_ptr,  # (4h, taps, h), or those of rows (h, 4) in fragments
    hidden_ptr,  # written and read
    activated_ptr,
    cell_ptr,  # never None, of the strides below, written and read
    batch,
    images,  # of a program
    height, width, units,
    gates_image_stride, gates_unit_stride, gates_row_stride, gates_column_stride,
    cell_image_stride,
    cell_row_stride,  # 0 where only the latest row is kept
    cell_column_stride,  # 0 where only the latest column is kept
    TAPS: tl.constexpr, ROW_SCAN: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
    M: tl.constexpr, U: tl.constexpr, K: tl.constexpr, TOGETHER: tl.constexpr, PARTS: tl.constexpr,
    CHUNK: tl.constexpr, WHOLE: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    strides = (gates_image_stride, gates_unit_stride, gates_row_stride, gates_column_stride)
    cell_strides = (cell_image_stride, 1, cell_row_stride, cell_column_stride)
    to_previous = -cell_row_stride if ROW_SCAN else cell_column_stride if REVERSE else -cell_column_stride
    first_image = tl.program_id(0) * images
    images = tl.minimum(images, batch - first_image)
    for step in range(height if ROW_SCAN else height + width - 1):
        tiles = tl.cdiv(images * pixels_of(step, height, width, ROW_SCAN), M)
        for tile in range(tiles * tl.cdiv(units, U)):
            m = tile % tiles * M + tl.arange(0, M)
            u = tile // tiles * U + tl.arange(0, U)
            if U == 128:
                # Cell states, float32, are stored four at a time: in the layout of the terms if those are, too.
                u = tl.max_contiguous(u, 4)
            image, row, column, x, pixel, active, begun = place(
                m, step, first_image, images, height, width, ROW_SCAN, REVERSE
            )
            mask = active[:, None] & (u < units)[None, :]
            # Neither waits for the states: both are on their way while those are multiplied.
            terms = load_terms(gates_ptr, strides, units, image, row, x, active, u)
            cell_at = cell_ptr + offsets(cell_strides, image, row, x, u)
            if CHUNK <= 8:
                cell = tl.load(cell_at + to_previous, mask & begun[:, None], other=0.0)
            at = (pixel, row, column, active, height, width)
            if CHUNK > 0:
                weights_at = weight_ptr + tile // tiles * (4 * U * TAPS * PARTS * K)
                sums = sums_of_fragments(
                    hidden_ptr, units, at, weights_at, 4 * U, M, K, PARTS, CHUNK, WHOLE, WARPS, TAPS, ROW_SCAN,
                    REVERSE, False, PRECISION,
                )  # fmt: skip
            else:
                n = tile // tiles * (4 * U) + tl.arange(0, 4 * U)  # units and their gates
                weight_row = weight_ptr + (n % 4 * units + n // 4) * (TAPS * units)
                sums = sums_of_parts(
                    hidden_ptr, units, at, weight_row, n // 4 < units, M, K, TOGETHER, TAPS, ROW_SCAN, REVERSE, False,
                    PRECISION,
                )  # fmt: skip
            if CHUNK > 8:  # which fill the registers
                cell = tl.load(cell_at + to_previous, mask & begun[:, None], other=0.0)
            gates = add_gates(terms, gates_of(sums, M, U))
            gates, cell, hidden = cell_forward(gates, cell, FAST)
            tl.store(hidden_ptr + pixel[:, None] * units + u[None, :], hidden.to(hidden_ptr.dtype.element_ty), mask)
            tl.store(cell_at, cell, mask)
            if activated_ptr is not None:
                store_gates(activated_ptr + pixel[:, None] * (4 * units) + u[None, :], units, gates, mask)
        tl.debug_barrier()  # all threads have written their states, which the next step reads


@triton.jit(do_not_specialize=("batch", "images"))
def lstm_tiles_backward_kernel(
    grad_hidden_ptr,
    activated_ptr,
    cell_ptr,
    weight_ptr,  # (h, taps, 4h), or in fragments
    grad_gates_ptr,  # written and read
    grad_cell_ptr,  # fp32, (B, H, h), of a row scan (B, W, h): of each lane's previous pixel, written and read
    batch, images, height, width, units,
    grad_image_stride, grad_unit_stride, grad_row_stride, grad_column_stride,
    TAPS: tl.constexpr, ROW_SCAN: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
    M: tl.constexpr, U: tl.constexpr, K: tl.constexpr, TOGETHER: tl.constexpr, PARTS: tl.constexpr,
    CHUNK: tl.constexpr, WHOLE: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    maps = (grad_hidden_ptr, activated_ptr, cell_ptr)
    strides = (grad_image_stride, grad_unit_stride, grad_row_stride, grad_column_stride)
    to_previous = -width if ROW_SCAN else 1 if REVERSE else -1
    last = height - 1 if ROW_SCAN else height + width - 2
    first_image = tl.program_id(0) * images
    images = tl.minimum(images, batch - first_image)
    for back in range(last + 1):
        step = last - back
        tiles = tl.cdiv(images * pixels_of(step, height, width, ROW_SCAN), M)
        for tile in range(tiles * tl.cdiv(units, U)):
            m = tile % tiles * M + tl.arange(0, M)
            u = tile // tiles * U + tl.arange(0, U)
            image, row, column, x, pixel, active, begun = place(
                m, step, first_image, images, height, width, ROW_SCAN, REVERSE
            )
            mask = active[:, None] & (u < units)[None, :]
            lane = image.to(tl.int64) * width + column if ROW_SCAN else image.to(tl.int64) * height + row
            lane = grad_cell_ptr + lane[:, None] * units + u[None, :]
            continues = row < height - 1 if ROW_SCAN else column < width - 1
            grad_cell = tl.load(lane, mask & continues[:, None], other=0.0)
            at = (pixel, row, column, active, height, width)
            if CHUNK > 0:
                weights_at = weight_ptr + tile // tiles * (U * TAPS * PARTS * K)
                sums = sums_of_fragments(
                    grad_gates_ptr, 4 * units, at, weights_at, U, M, K, PARTS, CHUNK, WHOLE, WARPS, TAPS,
                    ROW_SCAN, REVERSE, True, PRECISION,
                )  # fmt: skip
            else:
                weight_row = weight_ptr + u * (TAPS * 4 * units)
                sums = sums_of_parts(
                    grad_gates_ptr, 4 * units, at, weight_row, u < units, M, K, TOGETHER, TAPS, ROW_SCAN, REVERSE,
                    True, PRECISION,
                )  # fmt: skip
            # Loaded before the products, these would take their layout: seven tiles are converted instead of one.
            from_layer, cell, previous, o, f, i, g = load_saved(
                maps, strides, units, image, row, x, pixel, to_previous, begun, 0.0, active, active, u
            )
            grad_hidden = from_layer.to(tl.float32) + tl.trans(sums)
            grads, grad_cell = cell_backward(grad_hidden, grad_cell, widened((o, f, i, g)), cell, previous, FAST)
            store_gates(grad_gates_ptr + pixel[:, None] * (4 * units) + u[None, :], units, grads, mask)
            tl.store(lane, grad_cell, mask)
        tl.debug_barrier()  # all threads have written their gradients, which the next step reads


def launches_of(kernel: Any, maps: Tensor, strides: tuple[int, ...], choice: TileLaunch, weight: Tensor, row_scan: bool,
                reverse: bool) -> Launches:  # fmt: skip
    """maps (B, channels, H, W): the tensor whose strides the kernel takes first."""
    batch, height, width = maps.shape[0], *maps.shape[2:]
    images = max(1, cdiv(batch, choice.programs))
    sizes = (batch, images, height, width, weight.shape[1], *maps.stride(), *strides)
    options = {"ROW_SCAN": row_scan, "REVERSE": reverse, "TAPS": weight.shape[2], **constants_of(choice, maps)}
    return Launches(kernel, (cdiv(batch, images),), sizes, **options)


def forward_by_tiles(
    gates: Tensor, weight: Tensor, choice: TileLaunch, save: bool, *, row_scan: bool, reverse: bool = False
) -> Call:
    batch, _, height, width = gates.shape
    units, taps = weight.shape[1:]

    def packed(weight: Tensor) -> Tensor:
        if choice.CHUNK:
            by_unit = weight.view(4, units, units, taps).permute(1, 0, 3, 2)
            return in_fragments(by_unit, 4 * choice.U, choice.PARTS, choice.K, choice.num_warps)
        return weight.mT.contiguous()

    hidden, activated, cell = new_results(gates, save)
    strides = (height * width * units, width * units, units)
    if cell is None:  # one row is kept, or one pixel of each row
        lanes = width if row_scan else height
        cell = empties(gates, ((batch, lanes, units), (lanes * units, units, 1)), torch.float32)
        strides = (lanes * units, 0, units) if row_scan else (lanes * units, units, 0)
    launches = launches_of(lstm_tiles_forward_kernel, gates, strides, choice, weight, row_scan, reverse)
    return Call(packed, (hidden, activated, cell), launches)


def backward_by_tiles(
    grad_hidden: Tensor, weight: Tensor, choice: TileLaunch, *, row_scan: bool, reverse: bool = False
) -> Call:
    batch, units, height, width = grad_hidden.shape

    def packed(weight: Tensor) -> Tensor:
        by_unit = weight.permute(1, 2, 0)
        if choice.CHUNK:
            return in_fragments(by_unit.unsqueeze(1), choice.U, choice.PARTS, choice.K, choice.num_warps)
        return by_unit.contiguous()

    lanes = width if row_scan else height
    grad_cell = empties(grad_hidden, ((batch, lanes, units), (lanes * units, units, 1)), torch.float32)
    launches = launches_of(lstm_tiles_backward_kernel, grad_hidden, (), choice, weight, row_scan, reverse)
    return Call(packed, (new_map(grad_hidden, 4 * units), grad_cell), launches)


CATALOGUE = tile_entries(lstm_tiles_forward_kernel, backward=False) + tile_entries(
    lstm_tiles_backward_kernel, backward=True
)
