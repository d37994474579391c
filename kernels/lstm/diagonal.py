"""The diagonal LSTM in one launch: a program walks all diagonals of its images, forward and backward.

Letters: M rows of a tile, each a row of an image; U units (padded to a power of two); H x W pixels of an image.

Skewing is an index: at step t a tile's row i stands at column t - i. The output is the state: the states of the left
and the upper neighbour are pixels that the program has written a step ago. They are read as one joined tile (M, 2U),
behind a barrier of the program's threads and before anything else of the next step. Cell states stay in registers,
weights in shared memory. A row that has reached the end of its image begins with the next one at once, so that K images
take K * W + H - 1 steps and no row idles between them. Backward is the same walk from the last pixel to the first,
where the gradient of the gates is the state.

Weights are the left factor of the products. Loads, gates and stores then share a layout, and the sums alone change
theirs, so that a step takes 4 to 8 barriers; in the backward, loads must come behind the products for that.

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
    add_gates,
    cell_backward,
    cell_forward,
    gates_of,
    load_saved,
    load_terms,
    load_weights,
    product,
    store_gates,
    widened,
)
from fastgen.kernels.lstm.choice import ScanLaunch, TileLaunch, choose, constants_of, empty_results
from fastgen.kernels.lstm.entries import scan_entries
from fastgen.kernels.lstm.tiles import backward_by_tiles, forward_by_tiles


@triton.jit
def pixel_of(image, row, place, batch, height, width, LEFTWARD: tl.constexpr):
    """Where a row stands on its walk: its column, its offset in pixels, and whether there is a pixel."""
    x = width - 1 - place if LEFTWARD else place
    pixel = (image.to(tl.int64) * height + row) * width + x
    return x, pixel, (place >= 0) & (image < batch) & (row >= 0) & (row < height)


@triton.jit
def next_place(image, place, width, IMAGES: tl.constexpr):
    """A row that has reached the end of its image begins with the next image of the program."""
    ends = place == width - 1
    return tl.where(ends, image + tl.num_programs(0) * IMAGES, image), tl.where(ends, 0, place + 1)


@triton.jit
def load_state(state_ptr, pixel, to_row, to_column, has_row, has_column, units, GATES: tl.constexpr, U: tl.constexpr):
    """(M, 2 * GATES * U): GATES * units numbers of the pixel in the row before, and of that in the column before."""
    k = tl.arange(0, 2 * GATES * U)
    of_row = (k < GATES * U)[None, :]
    channel, inside = k // U % GATES * units + k % U, k % U < units
    near = tl.where(of_row, (pixel + to_row)[:, None], (pixel + to_column)[:, None])
    seen = tl.where(of_row, has_row[:, None], has_column[:, None]) & inside[None, :]
    return tl.load(state_ptr + near * (GATES * units) + channel[None, :], seen, other=0.0)


@triton.jit(do_not_specialize=("batch", "steps"))
def diagonal_lstm_forward_kernel(
    gates_ptr,  # (B, 4h, H, W), strides below
    weight_ptr,  # (4h, 2, h) contiguous
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
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
    IMAGES: tl.constexpr,
    LANES: tl.constexpr,
    U: tl.constexpr,
):
    M: tl.constexpr = IMAGES * LANES
    strides = (gates_image_stride, gates_unit_stride, gates_row_stride, gates_column_stride)
    to_column = 1 if REVERSE else -1
    m = tl.arange(0, M)
    u = tl.arange(0, U)
    n = tl.arange(0, 4 * U)
    weights = load_weights(weight_ptr, n % 4 * units + n // 4, n // 4 < units, units, 2, U)
    image = tl.program_id(0) * IMAGES + m // LANES
    row = m % LANES
    place = -row
    x, pixel, active = pixel_of(image, row, place, batch, height, width, REVERSE)
    terms = load_terms(gates_ptr, strides, units, image, row, x, active, u)
    cell = tl.zeros((M, U), tl.float32)
    state = tl.zeros((M, 2 * U), hidden_ptr.dtype.element_ty)  # the first pixel has no neighbour
    for _ in range(steps):
        mask = active[:, None] & (u < units)[None, :]
        begun = place > 0
        at = pixel[:, None] * units + u[None, :]
        activated_at = pixel[:, None] * (4 * units) + u[None, :]

        sums = product(weights, tl.trans(state), tl.zeros((4 * U, M), tl.float32), PRECISION)
        gates = add_gates(terms, gates_of(sums, M, U))
        gates, cell, hidden = cell_forward(gates, tl.where(begun[:, None], cell, 0.0), FAST)
        tl.store(hidden_ptr + at, hidden.to(hidden_ptr.dtype.element_ty), mask)
        image, place = next_place(image, place, width, IMAGES)
        x, pixel, active = pixel_of(image, row, place, batch, height, width, REVERSE)
        tl.debug_barrier()  # all threads have written their states, which the next step reads
        state = load_state(hidden_ptr, pixel, -width, to_column, active & (row > 0), active & (place > 0), units, 1, U)
        if activated_ptr is not None:
            store_gates(activated_ptr + activated_at, units, gates, mask)
            tl.store(cell_ptr + at, cell, mask)
        terms = load_terms(gates_ptr, strides, units, image, row, x, active, u)


@triton.jit(do_not_specialize=("batch", "steps"))
def diagonal_lstm_backward_kernel(
    grad_hidden_ptr,  # (B, h, H, W), strides below
    activated_ptr,  # (B, H, W, 4h) contiguous
    cell_ptr,  # (B, H, W, h) fp32 contiguous
    weight_ptr,  # (h, 2, 4h) contiguous
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
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
    IMAGES: tl.constexpr,
    LANES: tl.constexpr,
    U: tl.constexpr,
):
    M: tl.constexpr = IMAGES * LANES
    LEFTWARD: tl.constexpr = not REVERSE
    AHEAD: tl.constexpr = M * U < 4096  # a larger tile fills the registers
    maps = (grad_hidden_ptr, activated_ptr, cell_ptr)
    strides = (grad_image_stride, grad_unit_stride, grad_row_stride, grad_column_stride)
    to_previous = 1 if REVERSE else -1
    m = tl.arange(0, M)
    u = tl.arange(0, U)
    weights = load_weights(weight_ptr, u, u < units, units, 8, U)
    image = tl.program_id(0) * IMAGES + m // LANES
    row = height - 1 - m % LANES
    place = -(m % LANES)
    x, pixel, active = pixel_of(image, row, place, batch, height, width, LEFTWARD)
    if AHEAD:
        saved = load_saved(maps, strides, units, image, row, x, pixel, to_previous, place < width - 1, active, u)
    grad_cell = tl.zeros((M, U), tl.float32)
    state = tl.zeros((M, 8 * U), grad_gates_ptr.dtype.element_ty)
    for _ in range(steps):
        mask = active[:, None] & (u < units)[None, :]
        begun = place > 0
        at = pixel[:, None] * (4 * units) + u[None, :]
        sums = product(weights, tl.trans(state), tl.zeros((U, M), tl.float32), PRECISION)
        if not AHEAD:
            saved = load_saved(maps, strides, units, image, row, x, pixel, to_previous, place < width - 1, active, u)
        from_layer, cell, previous, o, f, i, g = saved
        grad_hidden = from_layer.to(tl.float32) + tl.trans(sums)
        grad_cell = tl.where(begun[:, None], grad_cell, 0.0)
        grads, grad_cell = cell_backward(grad_hidden, grad_cell, widened((o, f, i, g)), cell, previous, FAST)
        store_gates(grad_gates_ptr + at, units, grads, mask)
        image, place = next_place(image, place, width, IMAGES)
        x, pixel, active = pixel_of(image, row, place, batch, height, width, LEFTWARD)
        tl.debug_barrier()  # all threads have written their gradients, which the next step reads
        below, beside = active & (row < height - 1), active & (place > 0)
        state = load_state(grad_gates_ptr, pixel, width, -to_previous, below, beside, units, 4, U)
        if AHEAD:  # what the next step reads besides gradients is on its way while this one is computed
            saved = load_saved(maps, strides, units, image, row, x, pixel, to_previous, place < width - 1, active, u)


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
    packed = weight.permute(0, 2, 1).contiguous()
    steps = choice.images_of_a_program(batch) * width + height - 1
    sizes = (batch, height, width, units, steps, *gates.stride())
    constants = {"REVERSE": reverse, **constants_of(choice, gates)}
    launch(diagonal_lstm_forward_kernel, (choice.programs,), (gates, packed, *results, *sizes), constants)
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
    packed = weight.permute(1, 2, 0).contiguous()
    steps = choice.images_of_a_program(batch) * width + height - 1
    sizes = (batch, height, width, units, steps, *grad_hidden.stride())
    constants = {"REVERSE": reverse, **constants_of(choice, grad_hidden)}
    pointers = (grad_hidden, activated, cell, packed, grad_gates)
    launch(diagonal_lstm_backward_kernel, (choice.programs,), (*pointers, *sizes), constants)
    return grad_gates


CATALOGUE = scan_entries(diagonal_lstm_forward_kernel, REVERSE=False)
CATALOGUE += scan_entries(diagonal_lstm_backward_kernel, REVERSE=False)
