"""The diagonal LSTM in one launch: a program walks all diagonals of its images, forward and backward.

Letters: M rows of a tile, each a row of an image; U units (padded to a power of two); H x W pixels of an image.

Skewing is an index: at step t a tile's row i stands at column t - i. The output is the state: the states of the left
and the upper neighbour are pixels that the program has written a step ago, read as one joined tile (M, 2U) behind a
barrier of the program's threads. Cell states stay in registers, weights in shared memory. A row that has reached the
end of its image begins with the next one at once, so that K images take K * W + H - 1 steps and no row idles between
them. Backward is the same walk from the last pixel to the first, where the gradient of the gates is the state.

Sizes whose weights or tiles do not fit go by `fastgen.kernels.lstm.tiles`.

Traffic a pixel, h units of s bytes: forward reads 4h and writes h, and to train 4h more and h floats; backward reads
5h and 2h floats and writes 4h. All of it is bound by H + W - 1 dependent steps, not by rates.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels.common import empty_map, launch
from fastgen.kernels.lstm.cell import (
    cell_backward,
    cell_forward,
    load_saved,
    load_terms,
    product,
    products,
    store_gates,
    widened,
)
from fastgen.kernels.lstm.choice import ScanLaunch, TileLaunch, choose, constants_of, empty_results
from fastgen.kernels.lstm.entries import scan_entries
from fastgen.kernels.lstm.tiles import backward_by_tiles, forward_by_tiles


@triton.jit
def load_weights(weight_ptr, units, gate_stride, k_stride, u_stride, tap_stride, U: tl.constexpr):
    """(2U, U) of every gate, gate_stride apart: the rows count (tap, unit), by k_stride, the columns units of the
    result."""
    k = tl.arange(0, 2 * U)
    u = tl.arange(0, U)
    of = k % U
    at = weight_ptr + of[:, None] * k_stride + u[None, :] * u_stride + (k // U)[:, None] * tap_stride
    real = (of < units)[:, None] & (u < units)[None, :]
    w_o = tl.load(at, real, other=0.0)
    w_f = tl.load(at + gate_stride, real, other=0.0)
    w_i = tl.load(at + 2 * gate_stride, real, other=0.0)
    w_g = tl.load(at + 3 * gate_stride, real, other=0.0)
    return w_o, w_f, w_i, w_g


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
    strides = (gates_image_stride, gates_unit_stride, gates_row_stride, gates_column_stride)
    m = tl.arange(0, IMAGES * LANES)
    u = tl.arange(0, U)
    k = tl.arange(0, 2 * U)
    weights = load_weights(
        weight_ptr, units, units * weight_gate_stride, weight_unit_stride, weight_gate_stride, weight_tap_stride, U
    )
    image = tl.program_id(0) * IMAGES + m // LANES
    row = m % LANES
    column = -row
    x = width - 1 - column if REVERSE else column
    active = (column >= 0) & (image < batch) & (row < height)
    cell = tl.zeros((IMAGES * LANES, U), tl.float32)
    terms = load_terms(gates_ptr, strides, units, image, row, x, active, u)
    for _ in range(steps):
        gates = widened(terms)
        pixel = (image.to(tl.int64) * height + row) * width + x
        begun = column > 0
        mask = active[:, None] & (u < units)[None, :]

        up = (k < U)[None, :]
        near = tl.where(up, (pixel - width)[:, None], (pixel + 1 if REVERSE else pixel - 1)[:, None])
        seen = active[:, None] & tl.where(up, (row > 0)[:, None], begun[:, None]) & (k % U < units)[None, :]

        # The next terms are on their way while this step waits for its states.
        column += 1
        image = tl.where(column == width, image + tl.num_programs(0) * IMAGES, image)
        column = tl.where(column == width, 0, column)
        x = width - 1 - column if REVERSE else column
        active = (column >= 0) & (image < batch) & (row < height)
        terms = load_terms(gates_ptr, strides, units, image, row, x, active, u)

        tl.debug_barrier()  # all threads have written the states of the step before
        state = tl.load(hidden_ptr + near * units + (k % U)[None, :], seen, other=0.0)
        gates = products(state, weights, gates, PRECISION)
        gates, cell, hidden = cell_forward(gates, tl.where(begun[:, None], cell, 0.0), FAST)
        at = pixel[:, None] * units + u[None, :]
        tl.store(hidden_ptr + at, hidden.to(hidden_ptr.dtype.element_ty), mask)
        if activated_ptr is not None:
            store_gates(activated_ptr + pixel[:, None] * (4 * units) + u[None, :], units, gates, mask)
            tl.store(cell_ptr + at, cell, mask)


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
    maps = (grad_hidden_ptr, activated_ptr, cell_ptr)
    strides = (grad_image_stride, grad_unit_stride, grad_row_stride, grad_column_stride)
    to_previous = 1 if REVERSE else -1
    m = tl.arange(0, IMAGES * LANES)
    u = tl.arange(0, U)
    k = tl.arange(0, 2 * U)
    # The other way round than forward: their rows count units of the gate, their columns those of the state.
    weights = load_weights(
        weight_ptr, units, units * weight_gate_stride, weight_gate_stride, weight_unit_stride, weight_tap_stride, U
    )
    image = tl.program_id(0) * IMAGES + m // LANES
    row = height - 1 - m % LANES
    back = -(m % LANES)  # pixels of the row that are done
    x = back if REVERSE else width - 1 - back
    pixel = (image.to(tl.int64) * height + row) * width + x
    active = (back >= 0) & (image < batch) & (row >= 0)
    grad_cell = tl.zeros((IMAGES * LANES, U), tl.float32)
    if AHEAD:
        saved = load_saved(maps, strides, units, image, row, x, pixel, to_previous, back < width - 1, active, u)
    for _ in range(steps):
        if not AHEAD:
            saved = load_saved(maps, strides, units, image, row, x, pixel, to_previous, back < width - 1, active, u)
        grad_hidden, cell, previous, o, f, i, g = saved
        grad_hidden = grad_hidden.to(tl.float32)
        gates = widened((o, f, i, g))
        begun = back > 0
        mask = active[:, None] & (u < units)[None, :]
        own = grad_gates_ptr + pixel[:, None] * (4 * units) + u[None, :]

        below = (k < U)[None, :]
        near = tl.where(below, (pixel + width)[:, None], (pixel - 1 if REVERSE else pixel + 1)[:, None])
        near = grad_gates_ptr + near * (4 * units) + (k % U)[None, :]
        seen = tl.where(below, (row < height - 1)[:, None], begun[:, None])
        seen = seen & active[:, None] & (k % U < units)[None, :]

        back += 1
        image = tl.where(back == width, image + tl.num_programs(0) * IMAGES, image)
        back = tl.where(back == width, 0, back)
        x = back if REVERSE else width - 1 - back
        pixel = (image.to(tl.int64) * height + row) * width + x
        active = (back >= 0) & (image < batch) & (row >= 0)
        if AHEAD:  # what the next step reads is on its way while this one waits for its gradients
            saved = load_saved(maps, strides, units, image, row, x, pixel, to_previous, back < width - 1, active, u)

        tl.debug_barrier()  # all threads have written the gradients of the step before
        grad_hidden = product(tl.load(near, seen, other=0.0), weights[0], grad_hidden, PRECISION)
        grad_hidden = product(tl.load(near + units, seen, other=0.0), weights[1], grad_hidden, PRECISION)
        grad_hidden = product(tl.load(near + 2 * units, seen, other=0.0), weights[2], grad_hidden, PRECISION)
        grad_hidden = product(tl.load(near + 3 * units, seen, other=0.0), weights[3], grad_hidden, PRECISION)
        grad_cell = tl.where(begun[:, None], grad_cell, 0.0)
        grads, grad_cell = cell_backward(grad_hidden, grad_cell, gates, cell, previous, FAST)
        store_gates(own, units, grads, mask)


def forward(
    gates: Tensor, weight: Tensor, reverse: bool, *, save: bool, choice: ScanLaunch | TileLaunch | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """hidden (B, h, H, W), and to train the activated gates and the cell states, all channels-last.

    Args:
        gates: (B, 4h, H, W), any strides.
        weight: (4h, h, 2), any strides.
        choice: None chooses.
    """
    batch, _, height, width = gates.shape
    units = weight.shape[1]
    hidden, activated, cell = results = empty_results(gates, save)
    if batch == 0:
        return results
    choice = choice or choose(gates, height, units)
    if isinstance(choice, TileLaunch):
        forward_by_tiles(gates, weight, hidden, activated, cell, choice, row_scan=False, reverse=reverse)
        return results
    steps = choice.images_of_a_program(batch) * width + height - 1
    sizes = (batch, height, width, units, steps, *gates.stride(), *weight.stride())
    constants = {"REVERSE": reverse, **constants_of(choice, gates)}
    launch(diagonal_lstm_forward_kernel, (choice.programs,), (gates, weight, *results, *sizes), constants)
    return results


def backward(
    grad_hidden: Tensor,
    activated: Tensor,
    cell: Tensor,
    weight: Tensor,
    reverse: bool,
    *,
    choice: ScanLaunch | TileLaunch | None = None,
) -> Tensor:
    """Gradient of the gates (B, 4h, H, W), channels-last, from what the forward has saved."""
    batch, units, height, width = grad_hidden.shape
    activated, cell = (saved.contiguous(memory_format=torch.channels_last) for saved in (activated, cell))
    grad_gates = empty_map(grad_hidden, 4 * units, height, width)
    if batch == 0:
        return grad_gates
    choice = choice or choose(grad_hidden, height, units)
    if isinstance(choice, TileLaunch):
        backward_by_tiles(grad_hidden, activated, cell, weight, grad_gates, choice, row_scan=False, reverse=reverse)
        return grad_gates
    steps = choice.images_of_a_program(batch) * width + height - 1
    sizes = (batch, height, width, units, steps, *grad_hidden.stride(), *weight.stride())
    constants = {"REVERSE": reverse, "AHEAD": choice.ahead, **constants_of(choice, grad_hidden)}
    pointers = (grad_hidden, activated, cell, weight, grad_gates)
    launch(diagonal_lstm_backward_kernel, (choice.programs,), (*pointers, *sizes), constants)
    return grad_gates


CATALOGUE = scan_entries(diagonal_lstm_forward_kernel, REVERSE=False)
CATALOGUE += scan_entries(diagonal_lstm_backward_kernel, REVERSE=False)
