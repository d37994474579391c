"""The kernels of the gradients: back through the activation, the gradients of weight and bias.

What the forward keeps for it, beside its result (e bytes an element of x's dtype, R results a pixel):

    none, ReLU     nothing: the result of a ReLU tells what passed
    gate           e R: its second half's input b ("valve"); the first follows from the result
    gate, used     2 e R where the sums are used elsewhere, too: both halves' inputs, of which b is read ("both")

Back, with s = sigmoid(b), t = tanh(a) = out / s and g the incoming gradient:

    da = g * s * (1 - t^2)        db = g * t * s * (1 - s)

One pass writes the gradient of the sums; without an activation there is none.

A program of the weight's gradient owns a tile of rows, a block of columns and a share of the pixels. Its sum goes to a
buffer of its own (float32), and what it adds up for the bias behind that; a second kernel adds the shares and writes
every weight, exactly zero where masked. All sums have a fixed order.
"""

import triton
import triton.language as tl

from fastgen.kernels.common import kernel, product
from fastgen.kernels.masked_conv2d.forward import (
    blocks_seen,
    columns_of,
    corner_of,
    lies_in,
    picked,
    pixels_of,
    place_in,
    seen_from,
)

BIASES = tl.constexpr(16)  # programs of a tile and share that add up for the bias, each into a column of its own


@kernel
def masked_conv2d_activation_backward_kernel(
    grad_ptr,  # (pixels, rows)
    grad_sums_ptr,  # (pixels, parts * rows) or None: gradient of the sums themselves, added
    result_ptr,  # (pixels, rows)
    kept_ptr,  # SAVED "valve": the second half's input (pixels, rows); "both": both halves' (pixels, 2 * rows)
    out_ptr,  # written: (pixels, parts * rows), gradient of the sums
    pixels, rows, SAVED: tl.constexpr, UNIT: tl.constexpr, PIXELS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = rows * UNIT
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)[:, None]
    n = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[None, :]
    inside = (pixel < pixels) & (n < rows)
    at = pixel.to(tl.int64) * rows + n
    whole_at = at if SAVED == "relu" else at + pixel.to(tl.int64) * rows
    first = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    result = tl.load(result_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if SAVED == "relu":
        first = tl.where(result > 0, first, tl.where(result == 0, 0.0, first * result))  # NaN stays NaN
    else:
        valve_at = whole_at + rows if SAVED == "both" else at
        inverse = 1.0 + tl.exp(-tl.load(kept_ptr + valve_at, mask=inside, other=0.0).to(tl.float32))
        s = 1.0 / inverse
        t = tl.where(s > 0, result * inverse, 0.0)
        t = tl.where(t > 1, 1.0, tl.where(t < -1, -1.0, t))
        second = first * result * (1 - s)
        first = first * (s - result * t)
        if grad_sums_ptr is not None:
            second += tl.load(grad_sums_ptr + whole_at + rows, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + whole_at + rows, second.to(out_ptr.dtype.element_ty), mask=inside)
    if grad_sums_ptr is not None:
        first += tl.load(grad_sums_ptr + whole_at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + whole_at, first.to(out_ptr.dtype.element_ty), mask=inside)


# --- the gradient of the weight


@triton.jit
def live_blocks(tile, N: tl.constexpr, K: tl.constexpr, taps, channels, rows, parts, group_rows, group_channels,
                shown):  # fmt: skip
    """How many blocks of columns some row of the tile sees: all but those of later colours in the last tap."""
    last = tl.minimum(tile * N + N, parts * rows) - 1
    last = tl.where(last // rows == tile * N // rows, last % rows, rows - 1)  # or that of the first half
    seen = blocks_seen(last, K, channels, group_rows, group_channels, shown)
    return tl.maximum((taps - 1) * (columns_of(channels, K) // K) + seen, 1)


@triton.jit
def grad_block(grad_map, block, start, batch, height, width, across, down, rows, N: tl.constexpr,
               IMAGES: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """The gradients (pixels, N) of a block of pixels, of N rows from `start` on."""
    if HEIGHT > 0:
        image, y, x = corner_of(block, across, down, IMAGES, HEIGHT, WIDTH)
        return grad_map.load([image, y, x, start]).reshape(IMAGES * HEIGHT * WIDTH, N)
    else:
        image, y, x = pixels_of(block, height, width, across, down, IMAGES, HEIGHT, WIDTH)
        n = start + tl.arange(0, N)[:, None]
        at = (place_in(image, y, x, height, width) * rows)[None, :] + n
        return tl.load(grad_map + at, mask=(image < batch)[None, :] & (n < rows), other=0.0).T


@kernel
def masked_conv2d_weight_kernel(
    grad_map,  # (B, height, width, parts * rows): gradient of the sums
    x_map,  # (B, x_height, x_width, channels)
    partial_ptr,  # (shares, parts * rows, columns of whole blocks + BIASES) float32, written
    adds_up,  # whether the last columns are written, sums over pixels
    batch, height, width, x_height, x_width, across, down,
    steps,  # blocks of pixels of a program
    channels,
    rows,  # of a half
    parts,
    taps, first_tap, box_width, origin_y, origin_x, tap_y, tap_x, group_rows, group_channels, shown,
    GATHER: tl.constexpr,
    UNIT: tl.constexpr,  # of channels
    GRAD_UNIT: tl.constexpr,  # of rows
    PRECISION: tl.constexpr, IMAGES: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr,
    K: tl.constexpr,
):  # fmt: skip
    BOXES: tl.constexpr = HEIGHT > 0
    M: tl.constexpr = IMAGES * HEIGHT * WIDTH if BOXES else IMAGES
    rows, channels = rows * GRAD_UNIT, channels * UNIT
    all_rows = parts * rows
    row_tiles = (all_rows + N - 1) // N
    tile, column = tl.program_id(0) % row_tiles, tl.program_id(0) // row_tiles
    k = tl.arange(0, K)[None, :]
    if GATHER:
        columns = columns_of(taps * channels, K)
        live = columns // K
        tap, channel = (column * K + k) // channels, (column * K + k) % channels
        real = tap < taps
    else:
        columns, blocks = taps * columns_of(channels, K), columns_of(channels, K) // K
        live = live_blocks(tile, N, K, taps, channels, rows, parts, group_rows, group_channels, shown)
        tap, start = column // blocks, column % blocks * K
        channel = start + k
        real = channel < channels
    dy, dx = seen_from(tap, first_tap, box_width, origin_y, origin_x, tap_y, tap_x)
    first = tl.program_id(1) * steps
    n = tile * N + tl.arange(0, N)
    share_row = tl.program_id(1).to(tl.int64) * all_rows
    if column < live:
        if not BOXES:
            read = x_map + ((dy.to(tl.int64) * x_width + dx) * channels + channel)
        total = tl.zeros((N, K), tl.float32)
        tl.assume(steps > 0)
        for step in range(steps):
            block = first + step
            grad = grad_block(grad_map, block, tile * N, batch, height, width, across, down, all_rows, N, IMAGES,
                              HEIGHT, WIDTH)  # fmt: skip
            if BOXES:
                image, y, x = corner_of(block, across, down, IMAGES, HEIGHT, WIDTH)
                seen_x = x_map.load([image, y + dy, x + dx, start]).reshape(M, K)
            else:
                image, y, x = pixels_of(block, height, width, across, down, IMAGES, HEIGHT, WIDTH)
                at = place_in(image, y, x, x_height, x_width) * channels
                seen = (image < batch)[:, None] & lies_in(y[:, None] + dy, x[:, None] + dx, x_height, x_width)
                seen_x = tl.load(read + at[:, None], mask=seen & real, other=0.0)
            total = product(grad.T, seen_x, total, PRECISION)
        at = (share_row + n) * (columns + BIASES)
        tl.store(partial_ptr + at[:, None] + (column * K + k), total, mask=(n < all_rows)[:, None])
    if (adds_up != 0) & (column < BIASES):
        # Some programs of a tile share its blocks of pixels among them, as each has them all in a cache nearby. A loop
        # of its own: where a product read the same buffers, one could be written over while it still does.
        sharing = tl.minimum(live, BIASES)
        added = tl.zeros((M, N), tl.float32)
        for step in range(column, tl.where(column < sharing, steps, 0), sharing):
            grad = grad_block(grad_map, first + step, tile * N, batch, height, width, across, down, all_rows, N, IMAGES,
                              HEIGHT, WIDTH)  # fmt: skip
            added += grad.to(tl.float32)
        at = (share_row + n) * (columns + BIASES) + (columns + column)
        tl.store(partial_ptr + at, tl.sum(added, 0), mask=n < all_rows)


@kernel
def masked_conv2d_sum_kernel(
    partial_ptr,  # (shares, outputs, all_columns * 16 + BIASES) float32
    mask_ptr,  # bool (outputs, inputs, size) contiguous, or None, as in the packing
    weight_ptr,  # the same shape, contiguous, written whole
    bias_ptr,  # (outputs), written where there are biases
    live_rows, shares, outputs, all_columns,
    biases,  # of the last columns those that were written
    image_pitch,  # inputs * size
    pitch,  # columns of a tap
    inputs,  # of a program
    size, taps, first_tap, box_width, top, left, kernel_width,
    FLAT: tl.constexpr,  # a power of two, inputs * size at least
    OUTPUTS: tl.constexpr,
):  # fmt: skip
    """Adds shares of the gradient of a weight, and brings columns into the order of the weight: the packing, the other
    way round."""
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)[:, None]
    start = tl.program_id(1) * inputs
    columns = all_columns * 16
    partial = partial_ptr + output.to(tl.int64) * (columns + BIASES)
    step = outputs.to(tl.int64) * (columns + BIASES)
    flat = tl.arange(0, FLAT)[None, :]
    tap, i = flat // inputs, flat % inputs
    column = tap * pitch + start + i
    there = (output < outputs) & (tap < taps) & (column < columns)
    total = tl.zeros((OUTPUTS, FLAT), tl.float32)
    for share in range(shares):
        total += tl.load(partial + (share * step + column), mask=there, other=0.0)
    ky, kx = flat % size // kernel_width - top, flat % size % kernel_width - left
    tap, i = ky * box_width + kx - first_tap, flat // size
    live = (kx >= 0) & (kx < box_width) & (tap >= 0) & (tap < taps) & (i < inputs)
    index = tl.arange(0, OUTPUTS)[:, None] * FLAT + tl.where(live, tap * inputs + i, 0)
    total = tl.where(live, picked(total, index), 0.0)
    there = (output < outputs) & (i < inputs) & (start * size + flat < image_pitch)
    at = output.to(tl.int64) * image_pitch + start * size + flat
    if mask_ptr is not None:
        total = tl.where(tl.load(mask_ptr + at, mask=there & (output < live_rows), other=1) != 0, total, 0.0)
    tl.store(weight_ptr + at, total.to(weight_ptr.dtype.element_ty), mask=there)
    if (biases > 0) & (tl.program_id(1) == 0):
        last = tl.arange(0, BIASES)[None, :]
        added = tl.zeros((OUTPUTS, BIASES), tl.float32)
        for share in range(shares):
            written = (output < outputs) & (last < biases)
            added += tl.load(partial + (share * step + columns + last), mask=written, other=0.0)
        bias = tl.sum(added, 1)[:, None].to(bias_ptr.dtype.element_ty)
        tl.store(bias_ptr + output, bias, mask=output < outputs)
