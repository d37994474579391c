"""The diagonal and the Row LSTM by tiles, for any size: a launch a scan, a launch a step, or a scan shared by programs.

A step is a diagonal (`ROW_SCAN` false) or a row; its pixels depend on the step before alone. They are cut into tiles of
M pixels and U units, which walk the states of their neighbours in parts of K. All state lies in global memory, that is
in the caches. How steps become launches (`TileLaunch`) is then a matter of speed alone:

- A program scans its images in one launch, tile after tile; its threads wait for each other after a step.
- A step is a launch and a tile a program. The launches of an image can be captured in a CUDA graph, which leaves 2 to 4
  microseconds a step (estimated, not yet measured).
- Several programs scan a group of images in one launch: each takes its part of a step's tiles, then waits for the
  others. All must run at the same time: the launch is cooperative, which fails where the chip has no room for all. The
  wait is bounded: a program that does not arrive is an error, a device-side assertion, and never a hang.

The last is not chosen until a GPU has measured that it is faster. `python -m benchmarks diagonal_lstm` has all three.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels.common import cdiv, prepare
from fastgen.kernels.lstm.cell import (
    cell_backward,
    cell_forward,
    load_gates,
    load_saved,
    load_terms,
    offsets,
    product,
    products,
    store_gates,
    widened,
)
from fastgen.kernels.lstm.choice import TileLaunch, constants_of
from fastgen.kernels.lstm.entries import tile_entries

COUNTERS = tl.constexpr(32)  # ints from the counter of one group to that of the next: each has a cache line
VARYING = ("begin", "end", "patience", "batch", "images")  # else compiled anew for 1, and for multiples of 16, of each


@triton.jit
def pixels_of(step, height, width, ROW_SCAN: tl.constexpr):
    """How many pixels a step has in an image."""
    return width if ROW_SCAN else tl.minimum(tl.minimum(step + 1, height + width - 1 - step), tl.minimum(height, width))


@triton.jit
def place(m, step, first_image, images, height, width, ROW_SCAN: tl.constexpr, REVERSE: tl.constexpr):
    """Where the m-th pixel of a step lies: image, row, column in the order of the scan, column x, offset in pixels;
    whether it is one, and whether one has come before whose cell state it takes."""
    top = step if ROW_SCAN else tl.maximum(step - width + 1, 0)
    count = pixels_of(step, height, width, ROW_SCAN)
    image = first_image + m // count
    row = top + (tl.zeros_like(m) if ROW_SCAN else m % count)
    column = m % count if ROW_SCAN else step - row
    x = width - 1 - column if REVERSE else column
    pixel = (image.to(tl.int64) * height + row) * width + x
    return image, row, column, x, pixel, m < images * count, row > 0 if ROW_SCAN else column > 0


@triton.jit
def state_of(tap, TAPS: tl.constexpr, ROW_SCAN: tl.constexpr):
    """How far above a pixel, and to its right in the order of the scan, the state of a tap lies."""
    return 1 if ROW_SCAN else 1 - tap, tap - TAPS // 2 if ROW_SCAN else -tap


@triton.jit
def finish_step(arrivals_ptr, expected, patience):
    """Waits for the program's threads; with arrivals_ptr, until programs have arrived there `expected` times in all.

    What they have written before can then be read.
    """
    tl.debug_barrier()
    if arrivals_ptr is not None:
        arrivals_ptr += tl.program_id(1) * COUNTERS
        arrived = tl.atomic_add(arrivals_ptr, 1) + 1
        looks = 0
        while (arrived < expected) & (looks < patience):
            arrived = tl.atomic_add(arrivals_ptr, 0, sem="acquire")
            looks += 1
        tl.device_assert(arrived >= expected, "a program of the scan was lost")
        tl.debug_barrier()


@triton.jit(do_not_specialize=VARYING)
def lstm_tiles_forward_kernel(
    gates_ptr,  # (B, 4h, H, W), strides below
    weight_ptr,  # (taps, h, 4h) contiguous
    hidden_ptr,  # (B, H, W, h) contiguous, written and read
    activated_ptr,  # (B, H, W, 4h) contiguous, written, or None
    cell_ptr,  # fp32, units contiguous, strides below, written and read
    arrivals_ptr,  # (groups, COUNTERS) int32 zeros, or None where no program waits for another
    begin,  # the steps of this launch
    end,
    patience,  # looks at the arrivals before a program counts as lost
    batch,
    images,  # of a group of programs: program_id(1) is the group
    height,
    width,
    units,
    gates_image_stride,
    gates_unit_stride,
    gates_row_stride,
    gates_column_stride,
    cell_image_stride,
    cell_row_stride,  # 0 where only the latest row is kept
    cell_column_stride,  # 0 where only the latest column is kept
    TAPS: tl.constexpr,
    ROW_SCAN: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
    M: tl.constexpr,
    U: tl.constexpr,
    K: tl.constexpr,
):
    strides = (gates_image_stride, gates_unit_stride, gates_row_stride, gates_column_stride)
    cell_strides = (cell_image_stride, 1, cell_row_stride, cell_column_stride)
    to_previous = -cell_row_stride if ROW_SCAN else cell_column_stride if REVERSE else -cell_column_stride
    first_image = tl.program_id(1) * images
    images = tl.minimum(images, batch - first_image)
    parts = tl.cdiv(units, K)
    for step in range(begin, end):
        tiles = tl.cdiv(images * pixels_of(step, height, width, ROW_SCAN), M)
        for tile in range(tl.program_id(0), tiles * tl.cdiv(units, U), tl.num_programs(0)):
            m = tile % tiles * M + tl.arange(0, M)
            u = tile // tiles * U + tl.arange(0, U)
            image, row, column, x, pixel, active, begun = place(
                m, step, first_image, images, height, width, ROW_SCAN, REVERSE
            )
            mask = active[:, None] & (u < units)[None, :]
            # Neither waits for the states: both are on their way while those are multiplied.
            terms = load_terms(gates_ptr, strides, units, image, row, x, active, u)
            cell_at = cell_ptr + offsets(cell_strides, image, row, x, u)
            cell = tl.load(cell_at + to_previous, mask & begun[:, None], other=0.0)
            o = tl.zeros((M, U), tl.float32)
            f, i, g = o, o, o
            for part in range(TAPS * parts):
                tap = part // parts
                k = part % parts * K + tl.arange(0, K)
                up, right = state_of(tap, TAPS, ROW_SCAN)
                near = pixel - up * width + (-right if REVERSE else right)
                seen = active & (row >= up) & (column + right >= 0) & (column + right < width)
                state = hidden_ptr + near[:, None] * units + k[None, :]
                state = tl.load(state, seen[:, None] & (k < units)[None, :], other=0.0)
                weights = weight_ptr + (tap * units + k)[:, None] * (4 * units) + u[None, :]
                weights = load_gates(weights, 1, units, (k < units)[:, None] & (u < units)[None, :])
                o, f, i, g = products(state, weights, (o, f, i, g), PRECISION)
            from_o, from_f, from_i, from_g = widened(terms)
            gates, cell, hidden = cell_forward((o + from_o, f + from_f, i + from_i, g + from_g), cell, FAST)
            tl.store(hidden_ptr + pixel[:, None] * units + u[None, :], hidden.to(hidden_ptr.dtype.element_ty), mask)
            tl.store(cell_at, cell, mask)
            if activated_ptr is not None:
                store_gates(activated_ptr + pixel[:, None] * (4 * units) + u[None, :], units, gates, mask)
        finish_step(arrivals_ptr, (step + 1 - begin) * tl.num_programs(0), patience)


@triton.jit(do_not_specialize=VARYING)
def lstm_tiles_backward_kernel(
    grad_hidden_ptr,  # (B, h, H, W), strides below
    activated_ptr,  # (B, H, W, 4h) contiguous
    cell_ptr,  # (B, H, W, h) fp32 contiguous
    weight_ptr,  # (taps, 4h, h) contiguous
    grad_gates_ptr,  # (B, H, W, 4h) contiguous, written and read
    grad_cell_ptr,  # fp32, (B, H, h), or (B, W, h) by rows, contiguous: of the pixel before, written and read
    arrivals_ptr,  # as in the forward
    begin,  # the steps of this launch, counted from the last one
    end,
    patience,
    batch,
    images,
    height,
    width,
    units,
    grad_image_stride,
    grad_unit_stride,
    grad_row_stride,
    grad_column_stride,
    TAPS: tl.constexpr,
    ROW_SCAN: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
    M: tl.constexpr,
    U: tl.constexpr,
    K: tl.constexpr,
):
    maps = (grad_hidden_ptr, activated_ptr, cell_ptr)
    strides = (grad_image_stride, grad_unit_stride, grad_row_stride, grad_column_stride)
    to_previous = -width if ROW_SCAN else 1 if REVERSE else -1
    last = height - 1 if ROW_SCAN else height + width - 2
    first_image = tl.program_id(1) * images
    images = tl.minimum(images, batch - first_image)
    parts = tl.cdiv(4 * units, K)
    for back in range(begin, end):
        step = last - back
        tiles = tl.cdiv(images * pixels_of(step, height, width, ROW_SCAN), M)
        for tile in range(tl.program_id(0), tiles * tl.cdiv(units, U), tl.num_programs(0)):
            m = tile % tiles * M + tl.arange(0, M)
            u = tile // tiles * U + tl.arange(0, U)
            image, row, column, x, pixel, active, begun = place(
                m, step, first_image, images, height, width, ROW_SCAN, REVERSE
            )
            mask = active[:, None] & (u < units)[None, :]
            from_layer, cell, previous, o, f, i, g = load_saved(
                maps, strides, units, image, row, x, pixel, to_previous, begun, active, u
            )
            lane = image.to(tl.int64) * width + column if ROW_SCAN else image.to(tl.int64) * height + row
            lane = grad_cell_ptr + lane[:, None] * units + u[None, :]
            continues = row < height - 1 if ROW_SCAN else column < width - 1
            grad_cell = tl.load(lane, mask & continues[:, None], other=0.0)
            grad_hidden = tl.zeros((M, U), tl.float32)
            for part in range(TAPS * parts):
                tap = part // parts
                k = part % parts * K + tl.arange(0, K)  # units of all four gates
                down, left = state_of(tap, TAPS, ROW_SCAN)
                near = pixel + down * width + (left if REVERSE else -left)
                seen = active & (row + down < height) & (column - left >= 0) & (column - left < width)
                grad = grad_gates_ptr + near[:, None] * (4 * units) + k[None, :]
                grad = tl.load(grad, seen[:, None] & (k < 4 * units)[None, :], other=0.0)
                weight = weight_ptr + (tap * 4 * units + k)[:, None] * units + u[None, :]
                weight = tl.load(weight, (k < 4 * units)[:, None] & (u < units)[None, :], other=0.0)
                grad_hidden = product(grad, weight, grad_hidden, PRECISION)
            grad_hidden += from_layer.to(tl.float32)
            grads, grad_cell = cell_backward(grad_hidden, grad_cell, widened((o, f, i, g)), cell, previous, FAST)
            store_gates(grad_gates_ptr + pixel[:, None] * (4 * units) + u[None, :], units, grads, mask)
            tl.store(lane, grad_cell, mask)
        finish_step(arrivals_ptr, (back + 1 - begin) * tl.num_programs(0), patience)


def launches_of(choice: TileLaunch, sizes: list[int], batch: int, units: int) -> Iterator[tuple[Any, ...]]:
    """(grid, begin, end, images of a group) of every launch; sizes: pixels of an image in each step."""
    if choice.groups:
        images = cdiv(batch, choice.groups)
        yield (choice.programs, cdiv(batch, images)), 0, len(sizes), images
        return
    for step, count in enumerate(sizes):
        yield (cdiv(batch * count, choice.M) * cdiv(units, choice.U), 1), step, step + 1, batch


def walk(kernel: Any, pointers: tuple[Tensor | None, ...], maps: Tensor, strides: tuple[int, ...], choice: TileLaunch,
         *, units: int, row_scan: bool, **constants: Any) -> None:  # fmt: skip
    """Launches `kernel` for all steps; maps (B, ..., H, W) is the argument that the first of its strides are of."""
    batch, height, width = maps.shape[0], *maps.shape[2:]
    # A diagonal's number of pixels is the same from both ends.
    diagonals = height + width - 1
    sizes = [width] * height if row_scan else [min(d + 1, height, width, diagonals - d) for d in range(diagonals)]
    arrivals = None
    if choice.programs > 1:
        arrivals = torch.zeros(choice.groups, COUNTERS.value, dtype=torch.int32, device=maps.device)
    constants = {"ROW_SCAN": row_scan, **constants_of(choice, maps), **constants}
    first, last = (*pointers, arrivals), (height, width, units, *maps.stride(), *strides)
    step = None
    for grid, begin, end, images in launches_of(choice, sizes, batch, units):
        args = (*first, begin, end, choice.patience, batch, images, *last)
        step = step or prepare(kernel, args, constants)  # all steps are of one kind: what differs is in VARYING
        step(grid, args)


def forward_by_tiles(
    gates: Tensor,
    weight: Tensor,
    hidden: Tensor,
    activated: Tensor | None,
    cell: Tensor | None,
    choice: TileLaunch,
    *,
    row_scan: bool,
    reverse: bool = False,
) -> None:
    """Fills hidden (B, h, H, W) and, where they are given, activated and cell, all channels-last."""
    batch, _, height, width = gates.shape
    units, taps = weight.shape[1:]
    packed = weight.permute(2, 1, 0).contiguous()
    strides = (height * width * units, width * units, units)
    if cell is None:  # one row is kept, or one pixel of each row
        lanes = width if row_scan else height
        cell = gates.new_empty((batch, lanes, units), dtype=torch.float32)
        strides = (lanes * units, 0, units) if row_scan else (lanes * units, units, 0)
    walk(
        lstm_tiles_forward_kernel, (gates, packed, hidden, activated, cell), gates, strides, choice,
        units=units, row_scan=row_scan, REVERSE=reverse, TAPS=taps, K=choice.K,
    )  # fmt: skip


def backward_by_tiles(
    grad_hidden: Tensor,
    activated: Tensor,
    cell: Tensor,
    weight: Tensor,
    grad_gates: Tensor,
    choice: TileLaunch,
    *,
    row_scan: bool,
    reverse: bool = False,
) -> None:
    """Fills grad_gates (B, 4h, H, W), channels-last as activated and cell are."""
    batch, units, height, width = grad_hidden.shape
    packed = weight.permute(2, 0, 1).contiguous()
    grad_cell = cell.new_empty(batch, width if row_scan else height, units)
    walk(
        lstm_tiles_backward_kernel, (grad_hidden, activated, cell, packed, grad_gates, grad_cell), grad_hidden, (),
        choice, units=units, row_scan=row_scan, REVERSE=reverse, TAPS=weight.shape[2], K=2 * choice.K,
    )  # fmt: skip


CATALOGUE = tile_entries(lstm_tiles_forward_kernel, 1) + tile_entries(lstm_tiles_backward_kernel, 2)
