"""The Row LSTM in one launch: a program walks the rows of its images, a row a step, forward and backward.

Each of a program's lanes has a column of an image. A pixel takes the hidden states of its neighbours in the row above,
a neighbour a tap. These are the output of the step before: once all threads have written it (a barrier), each reads it
back from the cache, shifted by the tap. A pixel takes the cell state of the pixel right above it, which its own lane
has kept in registers. The weights of all taps do not fit shared memory together: each step reads them from the cache.
The forward multiplies those of TOGETHER taps at once, as threads wait for each other up to four times a product: a step
of three taps takes 5 to 9 barriers, and 9 (sm_90) to 15 with 64 units.

Arguments: `fastgen.kernels.lstm.cell`.
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
    load_saved,
    load_terms,
    load_weights,
    store_gates,
    widened,
)
from fastgen.kernels.lstm.choice import TileLaunch, choose, constants_of, taps_together
from fastgen.kernels.lstm.entries import scan_entries
from fastgen.kernels.lstm.tiles import backward_by_tiles, forward_by_tiles


@triton.jit(do_not_specialize=("batch", "steps"))
def row_lstm_forward_kernel(
    gates_ptr,
    weight_ptr,  # (4h, taps, h)
    hidden_ptr,  # written and read
    activated_ptr,
    cell_ptr,
    batch, height, width, units,
    taps,  # not a constant: an unrolled loop would load the weights of all taps at once, and spill
    steps,
    gates_image_stride, gates_unit_stride, gates_row_stride, gates_column_stride,
    PRECISION: tl.constexpr, FAST: tl.constexpr, IMAGES: tl.constexpr, LANES: tl.constexpr, U: tl.constexpr,
    TOGETHER: tl.constexpr,  # taps whose products are one: threads wait for each other at each product
):  # fmt: skip
    strides = (gates_image_stride, gates_unit_stride, gates_row_stride, gates_column_stride)
    M: tl.constexpr = IMAGES * LANES
    m = tl.arange(0, M)
    u = tl.arange(0, U)
    n = tl.arange(0, 4 * U)  # units and their gates
    k = tl.arange(0, TOGETHER * U)  # taps and the units of each
    column = m % LANES
    image = tl.program_id(0) * IMAGES + m // LANES
    active = (image < batch) & (column < width)
    cell = tl.zeros((M, U), tl.float32)
    terms = load_terms(gates_ptr, strides, units, image, tl.zeros_like(m), column, active, u)
    for step in range(steps):
        row = step % height
        pixel = (image.to(tl.int64) * height + row) * width + column
        reads = active & (row + tl.zeros_like(m) > 0)  # a mask of numbers and tensors is none to the interpreter
        mask = active[:, None] & (u < units)[None, :]

        tl.debug_barrier()  # all threads have written the states of the row above
        sums = tl.zeros((4 * U, M), tl.float32)
        for first in range(0, taps, TOGETHER):
            tap = first + k // U
            real = ((k % U < units) & (tap < taps))[None, :]
            beside = column[:, None] + (tap - taps // 2)[None, :]
            above = (pixel - width - column)[:, None] + beside
            seen = reads[:, None] & (beside >= 0) & (beside < width) & real
            state = tl.load(hidden_ptr + above * units + (k % U)[None, :], seen, other=0.0)
            at = (n % 4 * units + n // 4)[:, None] * (taps * units) + (tap * units + k % U)[None, :]
            weights = tl.load(weight_ptr + at, (n // 4 < units)[:, None] & real, other=0.0)
            sums = product(weights, tl.trans(state), sums, PRECISION)
        gates = add_gates(terms, gates_of(sums, M, U))
        gates, cell, hidden = cell_forward(gates, tl.where(row == 0, 0.0, cell), FAST)
        at = pixel[:, None] * units + u[None, :]
        tl.store(hidden_ptr + at, hidden.to(hidden_ptr.dtype.element_ty), mask)
        if activated_ptr is not None:
            store_gates(activated_ptr + pixel[:, None] * (4 * units) + u[None, :], units, gates, mask)
            tl.store(cell_ptr + at, cell, mask)
        # The next terms are on their way while the next products are computed.
        image += tl.where(row == height - 1, tl.num_programs(0) * IMAGES, 0)
        active = (image < batch) & (column < width)
        after = (step + 1) % height + tl.zeros_like(m)
        terms = load_terms(gates_ptr, strides, units, image, after, column, active, u)


@triton.jit
def load_saved_row(maps, strides, units, height, width, image, row, column, u, batch):
    """`load_saved` for the pixels of one row."""
    row += tl.zeros_like(column)
    pixel = (image.to(tl.int64) * height + row) * width + column
    active = (image < batch) & (column < width)
    return load_saved(maps, strides, units, image, row, column, pixel, -width, row > 0, 0.0, active, active, u)


@triton.jit(do_not_specialize=("batch", "steps"))
def row_lstm_backward_kernel(
    grad_hidden_ptr,
    activated_ptr,
    cell_ptr,
    weight_ptr,  # (taps, h, 4h)
    grad_gates_ptr,  # written and read
    batch, height, width, units, taps, steps,
    grad_image_stride, grad_unit_stride, grad_row_stride, grad_column_stride,
    PRECISION: tl.constexpr, FAST: tl.constexpr, IMAGES: tl.constexpr, LANES: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    maps = (grad_hidden_ptr, activated_ptr, cell_ptr)
    strides = (grad_image_stride, grad_unit_stride, grad_row_stride, grad_column_stride)
    M: tl.constexpr = IMAGES * LANES
    AHEAD: tl.constexpr = M * U < 4096  # a larger tile fills the registers
    m = tl.arange(0, M)
    u = tl.arange(0, U)
    k = tl.arange(0, 4 * U)
    column = m % LANES
    grad_cell = tl.zeros((M, U), tl.float32)
    image = tl.program_id(0) * IMAGES + m // LANES
    if AHEAD:
        saved = load_saved_row(maps, strides, units, height, width, image, height - 1, column, u, batch)
    for step in range(steps):
        row = height - 1 - step % height
        active = (image < batch) & (column < width)
        mask = active[:, None] & (u < units)[None, :]
        pixel = (image.to(tl.int64) * height + row) * width + column
        tl.debug_barrier()  # all threads have written the gradients of the row below
        sums = tl.zeros((U, M), tl.float32)
        for tap in range(taps):
            shift = tap - taps // 2
            seen = active & (row + tl.zeros_like(m) < height - 1) & (column - shift >= 0) & (column - shift < width)
            below = (pixel + width - shift)[:, None] * (4 * units) + (k // U * units + k % U)[None, :]
            state = tl.load(grad_gates_ptr + below, seen[:, None] & (k % U < units)[None, :], other=0.0)
            weights = load_weights(weight_ptr + tap * (4 * units * units), u, u < units, units, 4, U)
            sums = product(weights, tl.trans(state), sums, PRECISION)
        if not AHEAD:
            saved = load_saved_row(maps, strides, units, height, width, image, row, column, u, batch)
        from_layer, cell, previous, o, f, i, g = saved
        grad_hidden = from_layer.to(tl.float32) + tl.trans(sums)
        grad_cell = tl.where(row == height - 1, 0.0, grad_cell)
        grads, grad_cell = cell_backward(grad_hidden, grad_cell, widened((o, f, i, g)), cell, previous, FAST)
        store_gates(grad_gates_ptr + pixel[:, None] * (4 * units) + u[None, :], units, grads, mask)
        image += tl.where(row == 0, tl.num_programs(0) * IMAGES, 0)
        if AHEAD:  # what the next step reads besides gradients is on its way while its products are computed
            after = height - 1 - (step + 1) % height
            saved = load_saved_row(maps, strides, units, height, width, image, after, column, u, batch)


def _plan_forward(gates: Tensor, weight: Tensor, choice: Choice, save: bool) -> Call:
    batch, _, height, width = gates.shape
    units, taps = weight.shape[1:]
    launch = choice(gates, width, units, taps) if callable(choice) else choice
    if isinstance(launch, TileLaunch):
        return forward_by_tiles(gates, weight, launch, save, row_scan=True)
    sizes = (batch, height, width, units, taps, launch.images_of_a_program(batch) * height, *gates.stride())
    constants = {"TOGETHER": taps_together(launch, taps), **constants_of(launch, gates)}
    launches = Launches(row_lstm_forward_kernel, (launch.programs,), sizes, **constants)
    return Call(lambda weight: weight.mT.contiguous(), new_results(gates, save), launches)


def _plan_backward(grad_hidden: Tensor, weight: Tensor, activated: Tensor, cell: Tensor, choice: Choice) -> Call:
    batch, units, height, width = grad_hidden.shape
    taps = weight.shape[2]
    launch = choice(grad_hidden, width, units, taps, backward=True) if callable(choice) else choice
    if isinstance(launch, TileLaunch):
        return backward_by_tiles(grad_hidden, weight, launch, row_scan=True)
    steps = launch.images_of_a_program(batch) * height
    sizes = (batch, height, width, units, taps, steps, *grad_hidden.stride())
    launches = Launches(row_lstm_backward_kernel, (launch.programs,), sizes, **constants_of(launch, grad_hidden))
    return Call(lambda weight: weight.permute(2, 1, 0).contiguous(), (new_map(grad_hidden, 4 * units),), launches)


def forward(
    gates: Tensor, weight: Tensor, *, save: bool, choice: Choice | None = None, check: Check | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`run_forward`; choice: None is `choose`."""
    return run_forward(_plan_forward, check, gates, weight, choice or choose, save)


def backward(
    grad_hidden: Tensor, activated: Tensor, cell: Tensor, weight: Tensor, *, choice: Choice | None = None
) -> Tensor:
    """`run_backward`."""
    return run_backward(_plan_backward, grad_hidden, activated, cell, weight, choice or choose)


CATALOGUE = scan_entries(row_lstm_forward_kernel, backward=False) + scan_entries(
    row_lstm_backward_kernel, backward=True
)
