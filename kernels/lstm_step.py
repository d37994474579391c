"""One step of the diagonal or the Row LSTM a launch, for sizes that the single launches do not hold.

A step is a diagonal (`ROW_SCAN` false) or a row; its pixels depend on the step before alone. A program has M pixels of
it and U units, and walks the states of the neighbours in tiles of K. The launches of an image can be captured in a CUDA
graph, which leaves 2 to 4 microseconds a step (estimated, not yet measured).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels.lstm_cell import cell_backward, cell_forward, load_gates, offsets, product, store_gates, widened
from fastgen.kernels.lstm_launch import StepLaunch, arithmetic, entry

VARYING = (
    "step",
    "first",
    "count",
    "pixels",
)  # else a kernel would be compiled for multiples of 16, and for 1, of each


@triton.jit
def pixel_of(m, step, first, count, width, ROW_SCAN: tl.constexpr, REVERSE: tl.constexpr):
    """Image, row and column of the m-th pixel of a step: the column in the order of the scan, and the real one."""
    if ROW_SCAN:
        column = m % count
        row = step + tl.zeros_like(column)
    else:
        row = first + m % count
        column = step - row
    return m // count, row, column, width - 1 - column if REVERSE else column


@triton.jit(do_not_specialize=VARYING)
def lstm_step_forward_kernel(
    gates_ptr,  # (B, 4h, H, W), strides below
    weight_ptr,  # (taps, h, 4h) contiguous
    hidden_ptr,  # (B, H, W, h) contiguous; this step written, earlier ones read
    activated_ptr,  # (B, H, W, 4h) contiguous, written, or None
    cell_ptr,  # fp32, units contiguous, strides below; that of a previous pixel read, this one's written
    step,
    first,  # first row of the diagonal
    count,  # pixels of the step in an image
    pixels,  # in all images
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
    m = tl.program_id(0) * M + tl.arange(0, M)
    u = tl.program_id(1) * U + tl.arange(0, U)
    image, row, column, x = pixel_of(m, step, first, count, width, ROW_SCAN, REVERSE)
    active = m < pixels
    mask = active[:, None] & (u < units)[None, :]
    pixel = (image.to(tl.int64) * height + row) * width + x
    at = offsets(image, row, x, gates_image_stride, gates_row_stride, gates_column_stride, u, gates_unit_stride)
    o, f, i, g = widened(load_gates(gates_ptr + at, gates_unit_stride, units, mask))
    for tap in tl.static_range(TAPS):
        if ROW_SCAN:
            shift = tap - TAPS // 2
            near = pixel - width + shift
            seen = active & (row > 0) & (column + shift >= 0) & (column + shift < width)
        elif tap == 0:
            near = pixel - width
            seen = active & (row > 0)
        else:
            near = pixel + 1 if REVERSE else pixel - 1
            seen = active & (column > 0)
        for start in range(0, units, K):
            k = start + tl.arange(0, K)
            inside = seen[:, None] & (k < units)[None, :]
            state = tl.load(hidden_ptr + near[:, None] * units + k[None, :], inside, other=0.0)
            weight = weight_ptr + (tap * units + k)[:, None] * (4 * units) + u[None, :]
            real = (k < units)[:, None] & (u < units)[None, :]
            o = product(state, tl.load(weight, real, other=0.0), o, PRECISION)
            f = product(state, tl.load(weight + units, real, other=0.0), f, PRECISION)
            i = product(state, tl.load(weight + 2 * units, real, other=0.0), i, PRECISION)
            g = product(state, tl.load(weight + 3 * units, real, other=0.0), g, PRECISION)
    at = image.to(tl.int64) * cell_image_stride + row.to(tl.int64) * cell_row_stride
    at += x.to(tl.int64) * cell_column_stride
    if ROW_SCAN:
        before = at - cell_row_stride
        begun = row > 0
    else:
        before = at + cell_column_stride if REVERSE else at - cell_column_stride
        begun = column > 0
    previous = tl.load(cell_ptr + before[:, None] + u[None, :], mask & begun[:, None], other=0.0)
    o, f, i, g, cell, hidden = cell_forward(o, f, i, g, previous, FAST)
    tl.store(hidden_ptr + pixel[:, None] * units + u[None, :], hidden.to(hidden_ptr.dtype.element_ty), mask)
    tl.store(cell_ptr + at[:, None] + u[None, :], cell, mask)
    if activated_ptr is not None:
        store_gates(activated_ptr + pixel[:, None] * (4 * units) + u[None, :], units, o, f, i, g, mask)


@triton.jit(do_not_specialize=VARYING)
def lstm_step_backward_kernel(
    grad_hidden_ptr,  # (B, h, H, W), strides below
    activated_ptr,  # (B, H, W, 4h) contiguous
    cell_ptr,  # (B, H, W, h) fp32 contiguous
    weight_ptr,  # (taps, 4h, h) contiguous
    grad_gates_ptr,  # (B, H, W, 4h) contiguous; this step written, later ones read
    grad_cell_ptr,  # fp32, (B, H, h), or (B, W, h) by rows, contiguous: of the pixel before, read and written
    step,
    first,
    count,
    pixels,
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
    m = tl.program_id(0) * M + tl.arange(0, M)
    u = tl.program_id(1) * U + tl.arange(0, U)
    image, row, column, x = pixel_of(m, step, first, count, width, ROW_SCAN, REVERSE)
    active = m < pixels
    mask = active[:, None] & (u < units)[None, :]
    pixel = (image.to(tl.int64) * height + row) * width + x
    at = offsets(image, row, x, grad_image_stride, grad_row_stride, grad_column_stride, u, grad_unit_stride)
    grad_hidden = tl.load(grad_hidden_ptr + at, mask, other=0.0).to(tl.float32)
    for tap in tl.static_range(TAPS):
        if ROW_SCAN:
            shift = tap - TAPS // 2
            near = pixel + width - shift
            seen = active & (row < height - 1) & (column - shift >= 0) & (column - shift < width)
        elif tap == 0:
            near = pixel + width
            seen = active & (row < height - 1)
        else:
            near = pixel - 1 if REVERSE else pixel + 1
            seen = active & (column < width - 1)
        for start in range(0, 4 * units, K):
            k = start + tl.arange(0, K)
            inside = seen[:, None] & (k < 4 * units)[None, :]
            state = tl.load(grad_gates_ptr + near[:, None] * (4 * units) + k[None, :], inside, other=0.0)
            weight = weight_ptr + (tap * 4 * units + k)[:, None] * units + u[None, :]
            real = (k < 4 * units)[:, None] & (u < units)[None, :]
            grad_hidden = product(state, tl.load(weight, real, other=0.0), grad_hidden, PRECISION)
    at = pixel[:, None] * units + u[None, :]
    cell = tl.load(cell_ptr + at, mask, other=0.0)
    if ROW_SCAN:
        before, begun, continues = pixel - width, row > 0, row < height - 1
        lane = image.to(tl.int64) * width + column
    else:
        before, begun, continues = (pixel + 1 if REVERSE else pixel - 1), column > 0, column < width - 1
        lane = image.to(tl.int64) * height + row
    previous = tl.load(cell_ptr + before[:, None] * units + u[None, :], mask & begun[:, None], other=0.0)
    lane = grad_cell_ptr + lane[:, None] * units + u[None, :]
    grad_cell = tl.load(lane, mask & continues[:, None], other=0.0)
    at = pixel[:, None] * (4 * units) + u[None, :]
    o, f, i, g = widened(load_gates(activated_ptr + at, 1, units, mask))
    o, f, i, g, grad_cell = cell_backward(grad_hidden, grad_cell, o, f, i, g, cell, previous, FAST)
    store_gates(grad_gates_ptr + at, units, o, f, i, g, mask)
    tl.store(lane, grad_cell, mask)


def steps_of(height: int, width: int, row_scan: bool) -> list[tuple[int, int, int]]:
    """(step, first row, pixels of an image) of every step, in order."""
    if row_scan:
        return [(row, 0, width) for row in range(height)]
    firsts = ((d, max(0, d - width + 1)) for d in range(height + width - 1))
    return [(d, first, min(d + 1, height) - first) for d, first in firsts]


def forward_by_steps(
    gates: Tensor,
    weight: Tensor,
    hidden: Tensor,
    activated: Tensor | None,
    cell: Tensor | None,
    launch: StepLaunch,
    *,
    row_scan: bool,
    reverse: bool = False,
) -> None:
    """Fills hidden (B, h, H, W) and, where they are given, activated and cell, all channels-last."""
    batch, _, height, width = gates.shape
    units, taps = weight.shape[1:]
    packed = weight.permute(2, 1, 0).contiguous()
    if cell is None:  # one row is kept, or one pixel of each row
        kept = gates.new_empty((batch, width if row_scan else height, units), dtype=torch.float32)
        strides = (kept.stride(0), 0, units) if row_scan else (kept.stride(0), units, 0)
    else:
        kept, strides = cell, (height * width * units, width * units, units)
    for step, first, count in steps_of(height, width, row_scan):
        grid = (triton.cdiv(batch * count, launch.M), triton.cdiv(units, launch.U))
        lstm_step_forward_kernel[grid](
            gates, packed, hidden, activated, kept, step, first, count, batch * count, height, width, units,
            *gates.stride(), *strides, TAPS=taps, ROW_SCAN=row_scan, REVERSE=reverse,
            **arithmetic(gates), M=launch.M, U=launch.U, K=launch.K, **launch.options,
        )  # fmt: skip


def backward_by_steps(
    grad_hidden: Tensor,
    activated: Tensor,
    cell: Tensor,
    weight: Tensor,
    grad_gates: Tensor,
    launch: StepLaunch,
    *,
    row_scan: bool,
    reverse: bool = False,
) -> None:
    """Fills grad_gates (B, 4h, H, W), channels-last as activated and cell are."""
    batch, units, height, width = grad_hidden.shape
    taps = weight.shape[2]
    packed = weight.permute(2, 0, 1).contiguous()
    grad_cell = cell.new_empty(batch, width if row_scan else height, units)
    for step, first, count in reversed(steps_of(height, width, row_scan)):
        grid = (triton.cdiv(batch * count, launch.M), triton.cdiv(units, launch.U))
        lstm_step_backward_kernel[grid](
            grad_hidden, activated, cell, packed, grad_gates, grad_cell, step, first, count, batch * count, height,
            width, units, *grad_hidden.stride(), TAPS=taps, ROW_SCAN=row_scan, REVERSE=reverse,
            **arithmetic(grad_hidden), M=launch.M, U=launch.U, K=launch.K, **launch.options,
        )  # fmt: skip


CATALOGUE = [
    entry(
        kernel,
        dtype,
        {"M": pixels, "U": 32, "K": steps, "TAPS": taps, "ROW_SCAN": taps == 3, "REVERSE": False},
        amd=amd,
    )
    for kernel in (lstm_step_forward_kernel, lstm_step_backward_kernel)
    for taps in (2, 3)
    for dtype, pixels, steps in (("bf16", 32, 32), ("fp32", 16, 16), ("tf32", 16, 16))
    for amd in ((False,) if dtype == "tf32" else (False, True))
]
