"""The diagonal LSTM in one launch: a program walks all diagonals of its images, forward and backward.

Letters: M rows of a tile, each a row of an image; U units (padded to a power of two); H x W pixels of an image.

Skewing is an index: at step t a tile's row i stands at column t - i. The output is the state: the states of the left
and the upper neighbour are pixels that the program has written a step ago, read as one joined tile (M, 2U) behind a
barrier of the program's threads. Cell states stay in registers, weights in shared memory. A row that has reached the
end of its image begins with the next one at once, so that K images take K * W + H - 1 steps and no row idles between
them. Backward is the same walk from the last pixel to the first, where the gradient of the gates is the state.

Traffic a pixel, h units of s bytes: forward reads 4h and writes h, and to train 4h more and h floats; backward reads
5h and 2h floats and writes 4h. All of it is bound by H + W - 1 dependent steps, not by rates.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels.lstm_cell import cell_backward, cell_forward, load_gates, offsets, product, store_gates, widened
from fastgen.kernels.lstm_launch import (
    AMD_SIZES,
    SCAN_SIZES,
    ScanLaunch,
    StepLaunch,
    arithmetic,
    choose,
    empty_maps,
    scan_entry,
)
from fastgen.kernels.lstm_step import backward_by_steps, forward_by_steps


@triton.jit
def load_weights(weight_ptr, units, k_stride, u_stride, tap_stride, k, u, U: tl.constexpr):
    """(2U, U) of one gate: k counts (tap, unit), u units of the result."""
    of = k % U
    at = of[:, None] * k_stride + u[None, :] * u_stride + (k // U)[:, None] * tap_stride
    return tl.load(weight_ptr + at, (of < units)[:, None] & (u < units)[None, :], other=0.0)


@triton.jit(do_not_specialize=("batch", "steps"))
def diagonal_lstm_forward_kernel(
    gates_ptr,  # (B, 4h, H, W), strides below
    weight_ptr,  # (4h, h, 2), strides below
    hidden_ptr,  # (B, H, W, h) contiguous, written and read
    activated_ptr,  # (B, H, W, 4h) contiguous, written, or None
    cell_ptr,  # (B, H, W, h) fp32 contiguous, written, or None
    batch,
    height,
    width,
    units,
    steps,
    gates_image_stride,
    gates_unit_stride,
    gates_row_stride,
    gates_column_stride,
    weight_gate_stride,
    weight_unit_stride,
    weight_tap_stride,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
    IMAGES: tl.constexpr,
    LANES: tl.constexpr,
    U: tl.constexpr,
):
    m = tl.arange(0, IMAGES * LANES)
    u = tl.arange(0, U)
    k = tl.arange(0, 2 * U)
    gate = units * weight_gate_stride
    w_o = load_weights(weight_ptr, units, weight_unit_stride, weight_gate_stride, weight_tap_stride, k, u, U)
    w_f = load_weights(weight_ptr + gate, units, weight_unit_stride, weight_gate_stride, weight_tap_stride, k, u, U)
    w_i = load_weights(weight_ptr + 2 * gate, units, weight_unit_stride, weight_gate_stride, weight_tap_stride, k, u, U)
    w_g = load_weights(weight_ptr + 3 * gate, units, weight_unit_stride, weight_gate_stride, weight_tap_stride, k, u, U)
    image = tl.program_id(0) * IMAGES + m // LANES
    row = m % LANES
    column = -row
    cell = tl.zeros((IMAGES * LANES, U), tl.float32)
    mask = ((column >= 0) & (image < batch) & (row < height))[:, None] & (u < units)[None, :]
    x = width - 1 - column if REVERSE else column
    at = offsets(image, row, x, gates_image_stride, gates_row_stride, gates_column_stride, u, gates_unit_stride)
    next_o, next_f, next_i, next_g = load_gates(gates_ptr + at, gates_unit_stride, units, mask)
    for _ in range(steps):
        o, f, i, g = widened((next_o, next_f, next_i, next_g))
        active = (column >= 0) & (image < batch) & (row < height)
        mask = active[:, None] & (u < units)[None, :]
        begun = column > 0
        x = width - 1 - column if REVERSE else column
        pixel = (image.to(tl.int64) * height + row) * width + x

        # The next gates are on their way while this step waits for its states.
        column += 1
        image = tl.where(column == width, image + tl.num_programs(0) * IMAGES, image)
        column = tl.where(column == width, 0, column)
        x = width - 1 - column if REVERSE else column
        at = offsets(image, row, x, gates_image_stride, gates_row_stride, gates_column_stride, u, gates_unit_stride)
        ahead = ((column >= 0) & (image < batch) & (row < height))[:, None] & (u < units)[None, :]
        next_o, next_f, next_i, next_g = load_gates(gates_ptr + at, gates_unit_stride, units, ahead)

        up = (k < U)[None, :]
        left = pixel + 1 if REVERSE else pixel - 1
        near = tl.where(up, (pixel - width)[:, None], left[:, None])
        seen = active[:, None] & tl.where(up, (row > 0)[:, None], begun[:, None]) & (k % U < units)[None, :]
        tl.debug_barrier()  # all threads have written the states of the step before
        state = tl.load(hidden_ptr + near * units + (k % U)[None, :], seen, other=0.0)
        o = product(state, w_o, o, PRECISION)
        f = product(state, w_f, f, PRECISION)
        i = product(state, w_i, i, PRECISION)
        g = product(state, w_g, g, PRECISION)

        cell = tl.where(begun[:, None], cell, 0.0)
        o, f, i, g, cell, hidden = cell_forward(o, f, i, g, cell, FAST)
        at = pixel[:, None] * units + u[None, :]
        tl.store(hidden_ptr + at, hidden.to(hidden_ptr.dtype.element_ty), mask)
        if activated_ptr is not None:
            store_gates(activated_ptr + pixel[:, None] * (4 * units) + u[None, :], units, o, f, i, g, mask)
            tl.store(cell_ptr + at, cell, mask)


@triton.jit
def load_saved(
    grad_hidden_ptr, activated_ptr, cell_ptr, batch, height, width, units,
    image_stride, unit_stride, row_stride, column_stride, image, row, back, u, REVERSE: tl.constexpr,
):  # fmt: skip
    """What the backward reads at a pixel, `back` pixels before its row's end: the gradient of its hidden state, its and
    the previous cell state, its four gates."""
    active = (back >= 0) & (image < batch) & (row >= 0)
    mask = active[:, None] & (u < units)[None, :]
    x = back if REVERSE else width - 1 - back
    pixel = (image.to(tl.int64) * height + row) * width + x
    left = pixel + 1 if REVERSE else pixel - 1
    at = offsets(image, row, x, image_stride, row_stride, column_stride, u, unit_stride)
    grad_hidden = tl.load(grad_hidden_ptr + at, mask, other=0.0)
    cell = tl.load(cell_ptr + pixel[:, None] * units + u[None, :], mask, other=0.0)
    inner = mask & (back < width - 1)[:, None]
    previous = tl.load(cell_ptr + left[:, None] * units + u[None, :], inner, other=0.0)
    o, f, i, g = load_gates(activated_ptr + pixel[:, None] * (4 * units) + u[None, :], 1, units, mask)
    return grad_hidden, cell, previous, o, f, i, g


@triton.jit(do_not_specialize=("batch", "steps"))
def diagonal_lstm_backward_kernel(
    grad_hidden_ptr,  # (B, h, H, W), strides below
    activated_ptr,  # (B, H, W, 4h) contiguous
    cell_ptr,  # (B, H, W, h) fp32 contiguous
    weight_ptr,  # (4h, h, 2), strides below
    grad_gates_ptr,  # (B, H, W, 4h) contiguous, written and read
    batch,
    height,
    width,
    units,
    steps,
    grad_image_stride,
    grad_unit_stride,
    grad_row_stride,
    grad_column_stride,
    weight_gate_stride,
    weight_unit_stride,
    weight_tap_stride,
    REVERSE: tl.constexpr,
    AHEAD: tl.constexpr,
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
    IMAGES: tl.constexpr,
    LANES: tl.constexpr,
    U: tl.constexpr,
):
    m = tl.arange(0, IMAGES * LANES)
    u = tl.arange(0, U)
    k = tl.arange(0, 2 * U)
    # The other way round than forward: k counts (tap, unit of the gate), u the units of the state.
    gate = units * weight_gate_stride
    w_o = load_weights(weight_ptr, units, weight_gate_stride, weight_unit_stride, weight_tap_stride, k, u, U)
    w_f = load_weights(weight_ptr + gate, units, weight_gate_stride, weight_unit_stride, weight_tap_stride, k, u, U)
    w_i = load_weights(weight_ptr + 2 * gate, units, weight_gate_stride, weight_unit_stride, weight_tap_stride, k, u, U)
    w_g = load_weights(weight_ptr + 3 * gate, units, weight_gate_stride, weight_unit_stride, weight_tap_stride, k, u, U)
    image = tl.program_id(0) * IMAGES + m // LANES
    row = height - 1 - m % LANES
    back = -(m % LANES)  # pixels of the row that are done
    grad_cell = tl.zeros((IMAGES * LANES, U), tl.float32)
    if AHEAD:
        saved = load_saved(
            grad_hidden_ptr, activated_ptr, cell_ptr, batch, height, width, units,
            grad_image_stride, grad_unit_stride, grad_row_stride, grad_column_stride, image, row, back, u, REVERSE,
        )  # fmt: skip
    for _ in range(steps):
        if not AHEAD:
            saved = load_saved(
                grad_hidden_ptr, activated_ptr, cell_ptr, batch, height, width, units,
                grad_image_stride, grad_unit_stride, grad_row_stride, grad_column_stride, image, row, back, u, REVERSE,
            )  # fmt: skip
        grad_hidden, cell, previous, o, f, i, g = saved
        grad_hidden = grad_hidden.to(tl.float32)
        o, f, i, g = widened((o, f, i, g))
        active = (back >= 0) & (image < batch) & (row >= 0)
        mask = active[:, None] & (u < units)[None, :]
        begun = back > 0
        x = back if REVERSE else width - 1 - back
        pixel = (image.to(tl.int64) * height + row) * width + x
        back += 1
        image = tl.where(back == width, image + tl.num_programs(0) * IMAGES, image)
        back = tl.where(back == width, 0, back)
        if AHEAD:  # what the next step reads is on its way while this one waits for its gradients
            saved = load_saved(
                grad_hidden_ptr, activated_ptr, cell_ptr, batch, height, width, units,
                grad_image_stride, grad_unit_stride, grad_row_stride, grad_column_stride, image, row, back, u, REVERSE,
            )  # fmt: skip

        below = (k < U)[None, :]
        right = pixel - 1 if REVERSE else pixel + 1
        near = tl.where(below, (pixel + width)[:, None], right[:, None]) * (4 * units) + (k % U)[None, :]
        seen = tl.where(below, (row < height - 1)[:, None], begun[:, None])
        seen = seen & active[:, None] & (k % U < units)[None, :]
        tl.debug_barrier()  # all threads have written the gradients of the step before
        near = grad_gates_ptr + near
        grad_hidden = product(tl.load(near, seen, other=0.0), w_o, grad_hidden, PRECISION)
        grad_hidden = product(tl.load(near + units, seen, other=0.0), w_f, grad_hidden, PRECISION)
        grad_hidden = product(tl.load(near + 2 * units, seen, other=0.0), w_i, grad_hidden, PRECISION)
        grad_hidden = product(tl.load(near + 3 * units, seen, other=0.0), w_g, grad_hidden, PRECISION)

        grad_cell = tl.where(begun[:, None], grad_cell, 0.0)
        o, f, i, g, grad_cell = cell_backward(grad_hidden, grad_cell, o, f, i, g, cell, previous, FAST)
        store_gates(grad_gates_ptr + pixel[:, None] * (4 * units) + u[None, :], units, o, f, i, g, mask)


def diagonal_lstm_forward(
    gates: Tensor, weight: Tensor, reverse: bool, save: bool, launch: ScanLaunch | StepLaunch | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """hidden (B, h, H, W), and to train the activated gates and the cell states, all channels-last.

    Args:
        gates: (B, 4h, H, W), any strides.
        weight: (4h, h, 2), any strides.
        launch: None chooses.
    """
    batch, channels, height, width = gates.shape
    units = weight.shape[1]
    hidden = empty_maps(gates, units, gates.dtype)
    activated = empty_maps(gates, channels, gates.dtype) if save else None
    cell = empty_maps(gates, units, torch.float32) if save else None
    if batch == 0:
        return hidden, activated, cell
    launch = launch or choose(gates, height, units)
    if isinstance(launch, StepLaunch):
        forward_by_steps(gates, weight, hidden, activated, cell, launch, row_scan=False, reverse=reverse)
        return hidden, activated, cell
    images = triton.cdiv(batch, launch.programs * launch.IMAGES)
    diagonal_lstm_forward_kernel[(launch.programs,)](
        gates, weight, hidden, activated, cell, batch, height, width, units, images * width + height - 1,
        *gates.stride(), *weight.stride(), REVERSE=reverse, **arithmetic(gates), IMAGES=launch.IMAGES,
        LANES=launch.LANES, U=launch.U, **launch.options,
    )  # fmt: skip
    return hidden, activated, cell


def diagonal_lstm_backward(
    grad_hidden: Tensor,
    activated: Tensor,
    cell: Tensor,
    weight: Tensor,
    reverse: bool,
    launch: ScanLaunch | StepLaunch | None = None,
) -> Tensor:
    """Gradient of the gates (B, 4h, H, W), channels-last, from what the forward has saved."""
    batch, units, height, width = grad_hidden.shape
    activated, cell = (saved.contiguous(memory_format=torch.channels_last) for saved in (activated, cell))
    grad_gates = empty_maps(grad_hidden, 4 * units, grad_hidden.dtype)
    if batch == 0:
        return grad_gates
    launch = launch or choose(grad_hidden, height, units)
    if isinstance(launch, StepLaunch):
        backward_by_steps(grad_hidden, activated, cell, weight, grad_gates, launch, row_scan=False, reverse=reverse)
        return grad_gates
    images = triton.cdiv(batch, launch.programs * launch.IMAGES)
    diagonal_lstm_backward_kernel[(launch.programs,)](
        grad_hidden, activated, cell, weight, grad_gates, batch, height, width, units, images * width + height - 1,
        *grad_hidden.stride(), *weight.stride(), REVERSE=reverse, AHEAD=launch.ahead, **arithmetic(grad_hidden),
        IMAGES=launch.IMAGES, LANES=launch.LANES, U=launch.U, **launch.options,
    )  # fmt: skip
    return grad_gates


CATALOGUE = [
    scan_entry(kernel, *size, amd=amd, REVERSE=False)
    for kernel in (diagonal_lstm_forward_kernel, diagonal_lstm_backward_kernel)
    for amd, sizes in ((False, SCAN_SIZES), (True, AMD_SIZES))
    for size in sizes
]
