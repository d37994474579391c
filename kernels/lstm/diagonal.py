"""The diagonal LSTM in one launch: a program walks all diagonals of its images, forward and backward.

Letters: M lanes of a program, each a row of an image; U units (padded to a power of two); H x W pixels of an image.
Arguments: `fastgen.kernels.lstm.cell`.

Skewing is an index: at step t row i of an image stands at column t - i. A pixel's left neighbour was computed one step
ago by its own lane, its upper neighbour by the lane before. States and cell states therefore stay in registers, lanes
pass them on by `tl.gather`, and a step writes nothing but results. Weights stay in shared memory. A row that has
reached the end of its image begins with the next one at once, so that K images take K * W + H - 1 steps and no row
idles between them.

The backward is the same walk from the last pixel to the first. The gradients of a pixel's gates, times the weights of
both neighbours, are what it adds to the gradients of those: one product of width 2U. The lane keeps the part of the
left neighbour, and the next lane takes that of the upper one. A pixel's cell state is the one that the step before
has read as its previous one.

Weights are the left factor of the products. Loads, gates and stores then share a layout, and only the sums and what
lanes pass on change theirs: a step takes 8 to 10 barriers.

Sizes whose weights or tiles do not fit go by `fastgen.kernels.lstm.tiles`.

Traffic a pixel, h units of s bytes: forward reads 4h and writes h, and to train 4h more and h floats; backward reads
5h and h floats and writes 4h. All of it is bound by H + W - 1 dependent steps, not by rates.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels.common import Launches, product
from fastgen.kernels.lstm.calls import Call, Check, Choice, new_map, new_results, run_backward, run_forward
from fastgen.kernels.lstm.cell import (
    add_gates,
    cell_backward,
    cell_forward,
    gates_of,
    joined_gates,
    load_saved,
    load_terms,
    store_gates,
    widened,
)
from fastgen.kernels.lstm.choice import TileLaunch, choose, constants_of
from fastgen.kernels.lstm.entries import scan_entries
from fastgen.kernels.lstm.tiles import backward_by_tiles, forward_by_tiles


@triton.jit
def pixel_of(image, row, place, batch, height, width, LEFTWARD: tl.constexpr):
    """Where a row stands on its walk: its column, its offset in pixels, and whether there is a pixel."""
    x = width - 1 - place if LEFTWARD else place
    pixel = (image.to(tl.int64) * height + row) * width + x
    return x, pixel, (place >= 0) & (image < batch) & (row >= 0) & (row < height)


@triton.jit
def load_joined_weights(weight_ptr, units, U: tl.constexpr):
    """(4U, 2U): rows count units and the gates of each, columns units of the neighbours and the two of each."""
    n = tl.arange(0, 4 * U)[:, None]
    k = tl.arange(0, 2 * U)[None, :]
    inside = (n // 4 < units) & (k < 2 * units)
    return tl.load(weight_ptr + (n % 4 * units + n // 4) * (2 * units) + k, inside, other=0.0)


@triton.jit
def next_place(image, place, width, IMAGES: tl.constexpr):
    """A row that has reached the end of its image begins with the next image of the program."""
    ends = place == width - 1
    return tl.where(ends, image + tl.num_programs(0) * IMAGES, image), tl.where(ends, 0, place + 1)


@triton.jit
def from_lane_before(tile, takes):
    """Each lane's numbers of a tile (M, U) are those of the lane before, where it `takes` them, else 0."""
    M: tl.constexpr = tile.shape[0]
    lane = tl.maximum(tl.arange(0, M) - 1, 0)
    return tl.where(takes[:, None], tl.gather(tile, tl.broadcast_to(lane[:, None], tile.shape), 0), 0.0)


@triton.jit(do_not_specialize=("batch", "steps"))
def diagonal_lstm_forward_kernel(
    gates_ptr,
    weight_ptr,  # (4, h, h, 2): gate, unit, unit of the neighbour, neighbour (upper, left)
    hidden_ptr,
    activated_ptr,
    cell_ptr,
    batch, height, width, units, steps,
    gates_image_stride, gates_unit_stride, gates_row_stride, gates_column_stride,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr, IMAGES: tl.constexpr, LANES: tl.constexpr,
    U: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = IMAGES * LANES
    strides = (gates_image_stride, gates_unit_stride, gates_row_stride, gates_column_stride)
    m = tl.arange(0, M)
    u = tl.arange(0, U)
    weights = load_joined_weights(weight_ptr, units, U)
    image = tl.program_id(0) * IMAGES + m // LANES
    row = m % LANES
    place = -row
    x, pixel, active = pixel_of(image, row, place, batch, height, width, REVERSE)
    terms = load_terms(gates_ptr, strides, units, image, row, x, active, u)
    cell = tl.zeros((M, U), tl.float32)
    state = tl.zeros((M, 2 * U), hidden_ptr.dtype.element_ty)
    for _ in range(steps):
        mask = active[:, None] & (u < units)[None, :]
        begun = place > 0
        at = pixel[:, None] * units + u[None, :]
        activated_at = pixel[:, None] * (4 * units) + u[None, :]

        sums = product(weights, tl.trans(state), tl.zeros((4 * U, M), tl.float32), PRECISION)
        gates = add_gates(terms, gates_of(sums, M, U))
        gates, cell, hidden = cell_forward(gates, tl.where(begun[:, None], cell, 0.0), FAST)
        hidden = hidden.to(hidden_ptr.dtype.element_ty)
        tl.store(hidden_ptr + at, hidden, mask)
        if activated_ptr is not None:
            store_gates(activated_ptr + activated_at, units, gates, mask)
            tl.store(cell_ptr + at, cell, mask)
        image, place = next_place(image, place, width, IMAGES)
        x, pixel, active = pixel_of(image, row, place, batch, height, width, REVERSE)
        upper = from_lane_before(hidden, active & (row > 0))
        left = tl.where((place > 0)[:, None], hidden, 0.0)
        state = tl.reshape(tl.join(upper, left), (M, 2 * U))
        terms = load_terms(gates_ptr, strides, units, image, row, x, active, u)


@triton.jit(do_not_specialize=("batch", "steps"))
def diagonal_lstm_backward_kernel(
    grad_hidden_ptr,
    activated_ptr,
    cell_ptr,
    weight_ptr,  # as in the forward
    grad_gates_ptr,
    batch, height, width, units, steps,
    grad_image_stride, grad_unit_stride, grad_row_stride, grad_column_stride,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr, IMAGES: tl.constexpr, LANES: tl.constexpr,
    U: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = IMAGES * LANES
    LEFTWARD: tl.constexpr = not REVERSE
    maps = (grad_hidden_ptr, activated_ptr, cell_ptr)
    strides = (grad_image_stride, grad_unit_stride, grad_row_stride, grad_column_stride)
    to_previous = 1 if REVERSE else -1
    m = tl.arange(0, M)
    u = tl.arange(0, U)
    weights = tl.trans(load_joined_weights(weight_ptr, units, U))
    image = tl.program_id(0) * IMAGES + m // LANES
    row = height - 1 - m % LANES
    place = -(m % LANES)
    x, pixel, active = pixel_of(image, row, place, batch, height, width, LEFTWARD)
    previous = tl.zeros((M, U), tl.float32)
    saved = load_saved(
        maps, strides, units, image, row, x, pixel, to_previous, place < width - 1, previous, place == 0, active, u
    )
    grad_cell = tl.zeros((M, U), tl.float32)
    state = tl.zeros((M, 4 * U), grad_gates_ptr.dtype.element_ty)
    for _ in range(steps):
        mask = active[:, None] & (u < units)[None, :]
        begun = place > 0
        sums = product(weights, tl.trans(state), tl.zeros((2 * U, M), tl.float32), PRECISION)
        to_upper, to_left = tl.split(tl.permute(tl.reshape(sums, (U, 2, M)), (2, 0, 1)))
        from_layer, cell, previous, o, f, i, g = saved
        grad_hidden = from_layer.to(tl.float32) + tl.where(begun[:, None], to_left, 0.0)
        grad_hidden += from_lane_before(to_upper, active & (row < height - 1))
        grad_cell = tl.where(begun[:, None], grad_cell, 0.0)
        grads, grad_cell = cell_backward(grad_hidden, grad_cell, widened((o, f, i, g)), cell, previous, FAST)
        store_gates(grad_gates_ptr + pixel[:, None] * (4 * units) + u[None, :], units, grads, mask)
        state = joined_gates(grads, M, U).to(state.dtype)
        image, place = next_place(image, place, width, IMAGES)
        x, pixel, active = pixel_of(image, row, place, batch, height, width, LEFTWARD)
        saved = load_saved(  # of the next step, on their way while its products are computed
            maps, strides, units, image, row, x, pixel, to_previous, place < width - 1, previous, place == 0, active, u
        )


def _plan_forward(gates: Tensor, weight: Tensor, choice: Choice, save: bool, reverse: bool) -> Call:
    batch, _, height, width = gates.shape
    units = weight.shape[1]
    launch = choice(gates, height, units) if callable(choice) else choice
    if isinstance(launch, TileLaunch):
        return forward_by_tiles(gates, weight, launch, save, row_scan=False, reverse=reverse)
    steps = launch.images_of_a_program(batch) * width + height - 1
    sizes = (batch, height, width, units, steps, *gates.stride())
    constants = {"REVERSE": reverse, **constants_of(launch, gates)}
    launches = Launches(diagonal_lstm_forward_kernel, (launch.programs,), sizes, **constants)
    return Call(Tensor.contiguous, new_results(gates, save), launches)


def _plan_backward(
    grad_hidden: Tensor, weight: Tensor, activated: Tensor, cell: Tensor, choice: Choice, reverse: bool
) -> Call:
    batch, units, height, width = grad_hidden.shape
    launch = choice(grad_hidden, height, units, backward=True) if callable(choice) else choice
    if isinstance(launch, TileLaunch):
        return backward_by_tiles(grad_hidden, weight, launch, row_scan=False, reverse=reverse)
    steps = launch.images_of_a_program(batch) * width + height - 1
    sizes = (batch, height, width, units, steps, *grad_hidden.stride())
    constants = {"REVERSE": reverse, **constants_of(launch, grad_hidden)}
    launches = Launches(diagonal_lstm_backward_kernel, (launch.programs,), sizes, **constants)
    return Call(Tensor.contiguous, (new_map(grad_hidden, 4 * units),), launches)


def forward(
    gates: Tensor,
    weight: Tensor,
    reverse: bool,
    *,
    save: bool,
    choice: Choice | None = None,
    check: Check | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """`run_forward` with weight (4h, h, 2); choice: None is `choose`."""
    return run_forward(_plan_forward, check, gates, weight, choice or choose, save, reverse)


def backward(
    grad_hidden: Tensor, activated: Tensor, cell: Tensor, weight: Tensor, reverse: bool, *,
    choice: Choice | None = None,
) -> Tensor:  # fmt: skip
    """`run_backward`."""
    return run_backward(_plan_backward, grad_hidden, activated, cell, weight, choice or choose, reverse)


CATALOGUE = scan_entries(diagonal_lstm_forward_kernel, backward=False, REVERSE=False)
CATALOGUE += scan_entries(diagonal_lstm_backward_kernel, backward=True, REVERSE=False)
