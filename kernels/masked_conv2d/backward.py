"""The kernels of the gradients: back through the activation, the gradient of the weight, sums over pixels.

What the forward keeps for it, beside its result (e bytes an element of x's dtype, R results a pixel):

    none                       nothing
    ReLU                       nothing: the result tells what passed
    ReLU, then a residual      R bytes: what passed, as the sum does not tell ("sign")
    gate                       e R: its second half's input b ("valve"); the first follows from the result
    gate, then a residual      2 e R: both halves' inputs a, b ("both"), and the result is not needed

Back, with t = tanh(a), s = sigmoid(b), out = t s, t = out / s where a was not kept, and g the incoming gradient:

    da = g * s * (1 - t^2)        db = g * t * s * (1 - s)

One pass writes the gradient of the sums, channels-last, and adds it up for the biases. Without an activation there is
no pass where the kernels can read the gradient as it lies; the product for the weight adds it up then, after its own
work. All sums have a fixed order.

A program of the weight's gradient owns a tile of rows, a block of columns and a share of the pixels. Its sum goes to a
buffer of its own (float32); a second kernel adds the shares and writes every weight, exactly zero where masked.
"""

import triton
import triton.language as tl

from fastgen.kernels.common import tanh
from fastgen.kernels.masked_conv2d.forward import (
    corner_of,
    kernel,
    lies_in,
    offset_of,
    picked,
    pixels_of,
    product,
    seen_from,
)


@triton.jit
def back(grad_ptr, first_ptr, second_ptr, at, saved_at, rows, inside, SAVED: tl.constexpr):
    """The gradient of what entered the activation, of both its halves with a gate, float32; zero outside.

    SAVED and what its maps are: "none"; "relu": the result; "sign": what passed; "valve": the result, the second half;
    "both": the halves in one map, `rows` apart. at: offsets into the gradient; saved_at: into the maps.
    """
    first = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    second = first
    if SAVED == "relu":
        out = tl.load(first_ptr + saved_at, mask=inside, other=0.0).to(tl.float32)
        first = tl.where(out > 0, first, tl.where(out == 0, 0.0, first * out))  # NaN stays NaN
    if SAVED == "sign":
        first = tl.where(tl.load(first_ptr + saved_at, mask=inside, other=0) != 0, first, 0.0)
    if SAVED == "valve" or SAVED == "both":
        known = tl.load(first_ptr + saved_at, mask=inside, other=0.0).to(tl.float32)
        valve_ptr = first_ptr + rows if SAVED == "both" else second_ptr
        valve = tl.load(valve_ptr + saved_at, mask=inside, other=0.0).to(tl.float32)
        if SAVED == "both":
            s, t = tl.sigmoid(valve), tanh(known)
            out = t * s
        else:
            out, inverse = known, 1.0 + tl.exp(-valve)
            s = 1.0 / inverse
            t = tl.where(s > 0, out * inverse, 0.0)
            t = tl.where(t > 1, 1.0, tl.where(t < -1, -1.0, t))
        second = first * out * (1 - s)
        first = first * (s - out * t)
    return first, second


@kernel
def masked_conv2d_activation_backward_kernel(
    grad_ptr,  # (B, height, width, rows)
    grad_pre_ptr,  # (B, height, width, parts * rows) or None: gradient of the sums themselves, added
    first_ptr,  # (B, height, width, rows) at `saved_pitch` a pixel; see `back`
    second_ptr,
    grad_sums_ptr,  # written: (B, height, width, parts * rows), or None
    sums_ptr,  # written: (shares, groups, parts * rows) float32, or None
    group_pixels,  # that share a bias: height * width for an image's own, all of them for none
    shares, groups,  # shares: programs of a group
    steps,  # blocks of pixels of a program
    height, width, rows, saved_pitch,
    grad_image, grad_y, grad_x, grad_pre_image, grad_pre_y, grad_pre_x, grad_channel, grad_pre_channel,
    SAVED: tl.constexpr, UNIT: tl.constexpr, PIXELS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    parts: tl.constexpr = 2 if SAVED == "valve" or SAVED == "both" else 1
    rows = rows * UNIT
    n = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[None, :]
    start = tl.program_id(0) // shares * group_pixels
    end = start + group_pixels
    start += tl.program_id(0) % shares * steps * PIXELS
    first_sum = tl.zeros((PIXELS, ROWS), tl.float32)
    second_sum = tl.zeros((PIXELS, ROWS), tl.float32)
    for step in range(steps):
        pixel = (start + step * PIXELS + tl.arange(0, PIXELS))[:, None]
        inside = (pixel < end) & (n < rows)
        image, y, x = pixel // (height * width), pixel // width % height, pixel % width
        pixel = pixel.to(tl.int64)
        at = offset_of(image, y, x, grad_image, grad_y, grad_x) * UNIT + n.to(tl.int64) * grad_channel
        first, second = back(grad_ptr, first_ptr, second_ptr, at, pixel * (saved_pitch * UNIT) + n, rows, inside, SAVED)
        if grad_pre_ptr is not None:
            at = grad_pre_ptr + offset_of(image, y, x, grad_pre_image, grad_pre_y, grad_pre_x) * UNIT
            first += tl.load(at + n.to(tl.int64) * grad_pre_channel, mask=inside, other=0.0).to(tl.float32)
            if parts == 2:
                at += (n + rows).to(tl.int64) * grad_pre_channel
                second += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        if grad_sums_ptr is not None:
            at = grad_sums_ptr + pixel * (parts * rows) + n
            tl.store(at, first.to(grad_sums_ptr.dtype.element_ty), mask=inside)
            if parts == 2:
                tl.store(at + rows, second.to(grad_sums_ptr.dtype.element_ty), mask=inside)
        first_sum += first
        second_sum += second
    if sums_ptr is not None:
        place = tl.program_id(0) % shares * groups + tl.program_id(0) // shares
        at = sums_ptr + place.to(tl.int64) * (parts * rows) + n
        tl.store(at, tl.sum(first_sum, 0)[None, :], mask=n < rows)
        if parts == 2:
            tl.store(at + rows, tl.sum(second_sum, 0)[None, :], mask=n < rows)


# --- the gradient of the weight


@triton.jit
def live_blocks(tile, N: tl.constexpr, K: tl.constexpr, taps, channels, blocks, rows, parts, group_rows,
                group_channels, shown):  # fmt: skip
    """How many blocks of columns some row of the tile sees: all but those of later colours in the last tap."""
    part, last = tile * N // rows, tl.minimum(tile * N + N, parts * rows) - 1
    end = tl.where(last // rows == part, (last % rows // group_rows + shown) * group_channels, channels)
    return tl.maximum((taps - 1) * blocks + tl.minimum((end + K - 1) // K, blocks), 1)


@triton.jit
def grad_block(grad_ptr, block, n, batch, height, width, across, down, all_rows, grad_image, grad_y, grad_x,
               UNIT: tl.constexpr, IMAGES: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """The gradients of a block of pixels (pixels, rows), and where its pixels lie."""
    image, i, j = pixels_of(block, height, width, across, down, IMAGES, HEIGHT, WIDTH)
    inside = (image < batch) & (i < height) & (j < width)
    at = (offset_of(image, i, j, grad_image, grad_y, grad_x) * UNIT)[:, None] + n[None, :]
    return tl.load(grad_ptr + at, mask=inside[:, None] & (n < all_rows)[None, :], other=0.0), image, i, j, inside


@kernel
def masked_conv2d_weight_kernel(
    grad_map,  # (B, height, width, parts * rows), channels side by side: gradient of the sums
    x_map,  # (B, x_height, x_width, channels)
    grad_ptr,  # the gradient as a pointer, also where grad_map is a descriptor
    partial_ptr,  # (shares, parts * rows, all_columns * 16) float32, written
    sums_ptr,  # (shares, blocks of columns, parts * rows) float32, written where `adds_up`: sums over pixels
    adds_up, batch, height, width, x_height, x_width, across, down, step_y, step_x,
    steps,  # blocks of pixels of a program
    channels,
    blocks,  # of columns, of a tap
    rows,  # of a half
    parts, row_tiles, all_columns,
    taps, first_tap, box_width, origin_y, origin_x, tap_y, tap_x, group_rows, group_channels, shown,
    grad_image, grad_y, grad_x, x_image, x_y, x_x, x_channel, GATHER: tl.constexpr,
    UNIT: tl.constexpr,  # of x and its channels
    GRAD_UNIT: tl.constexpr,  # of the gradient and rows
    PRECISION: tl.constexpr, IMAGES: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr,
    K: tl.constexpr,
):  # fmt: skip
    BOXES: tl.constexpr = HEIGHT > 0
    M: tl.constexpr = IMAGES * HEIGHT * WIDTH if BOXES else IMAGES
    tile, column = tl.program_id(0) % row_tiles, tl.program_id(0) // row_tiles
    all_columns, programs = all_columns * 16, tl.num_programs(0) // row_tiles
    rows, channels = rows * GRAD_UNIT, channels * UNIT
    all_rows = parts * rows
    n = tile * N + tl.arange(0, N)
    k = tl.arange(0, K)[None, :]
    if GATHER:
        live = programs
        tap, channel = (column * K + k) // channels, (column * K + k) % channels
        real = tap < taps
    else:
        live = live_blocks(tile, N, K, taps, channels, blocks, rows, parts, group_rows, group_channels, shown)
        tap, channel = column // blocks, column % blocks * K + k
        real = channel < channels
    dy, dx = seen_from(tap, first_tap, box_width, origin_y, origin_x, tap_y, tap_x)
    start = tl.program_id(1) * steps
    if column < live:
        if not BOXES:
            moved = (dy.to(tl.int64) * x_y + dx.to(tl.int64) * x_x) * UNIT
            read = x_map + moved + channel.to(tl.int64) * x_channel
        total = tl.zeros((N, K), tl.float32)
        tl.assume(steps > 0)
        for step in range(steps):
            if BOXES:
                image, y, x = corner_of(start + step, across, down, IMAGES, HEIGHT, WIDTH)
                grad = grad_map.load([image, y, x, tile * N]).reshape(M, N)
                seen_x = x_map.load([image, y + dy, x + dx, column % blocks * K]).reshape(M, K)
            else:
                grad, image, i, j, inside = grad_block(
                    grad_ptr, start + step, n, batch, height, width, across, down, all_rows, grad_image, grad_y,
                    grad_x, GRAD_UNIT, IMAGES, HEIGHT, WIDTH)  # fmt: skip
                y, x = i * step_y, j * step_x
                at = offset_of(image, y, x, x_image, x_y, x_x)
                seen = inside[:, None] & lies_in(y[:, None] + dy, x[:, None] + dx, x_height, x_width)
                seen_x = tl.load(read + (at * UNIT)[:, None], mask=seen & real, other=0.0)
            total = product(grad.T, seen_x, total, PRECISION)
        at = tl.program_id(1).to(tl.int64) * all_rows * all_columns + n.to(tl.int64)[:, None] * all_columns
        tl.store(partial_ptr + at + column * K + k, total, mask=(n < all_rows)[:, None])
    if adds_up != 0:
        # The programs of a tile share its blocks of pixels among them, as each has them all in a cache nearby. A loop
        # of its own: where a product read the same buffers, one could be written over while it still does.
        added = tl.zeros((M, N), tl.float32)
        for step in range(column, tl.where(column < live, steps, 0), live):
            added += grad_block(
                grad_ptr, start + step, n, batch, height, width, across, down, all_rows, grad_image, grad_y,
                grad_x, GRAD_UNIT, IMAGES, HEIGHT, WIDTH)[0].to(tl.float32)  # fmt: skip
        at = (tl.program_id(1).to(tl.int64) * programs + column) * all_rows + n
        tl.store(sums_ptr + at, tl.sum(added, 0), mask=n < all_rows)


@kernel
def masked_conv2d_sum_kernel(
    partial_ptr,  # (shares, outputs, all_columns) float32
    mask_ptr,  # bool (outputs, inputs, size) contiguous, or None, as in the packing
    out_ptr,  # the same shape, contiguous, written whole
    live_rows,
    shares, outputs, all_columns,
    image_pitch,  # inputs * size
    pitch,  # columns of a tap
    inputs,  # of a program
    size, taps, first_tap, box_width, top, left, kernel_width,
    FLAT: tl.constexpr,  # a power of two, inputs * size at least
    OUTPUTS: tl.constexpr,
):  # fmt: skip
    """Adds shares of the gradient of a weight, and brings columns into the order of the weight: the packing, the other
    way round. A bias is a weight of one output and one tap."""
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)[:, None]
    start = tl.program_id(1) * inputs
    flat = tl.arange(0, FLAT)[None, :]
    tap, i = flat // inputs, flat % inputs
    column = tap * pitch + start + i
    there = (output < outputs) & (tap < taps) & (column < all_columns)
    at = output.to(tl.int64) * all_columns + column
    total = tl.zeros((OUTPUTS, FLAT), tl.float32)
    for _ in range(shares):
        total += tl.load(partial_ptr + at, mask=there, other=0.0)
        at += outputs.to(tl.int64) * all_columns
    ky, kx = flat % size // kernel_width - top, flat % size % kernel_width - left
    tap, i = ky * box_width + kx - first_tap, flat // size
    live = (kx >= 0) & (kx < box_width) & (tap >= 0) & (tap < taps) & (i < inputs)
    index = tl.arange(0, OUTPUTS)[:, None] * FLAT + tl.where(live, tap * inputs + i, 0)
    total = tl.where(live, picked(total, index), 0.0)
    there = (output < outputs) & (i < inputs) & (start * size + flat < image_pitch)
    at = output.to(tl.int64) * image_pitch + start * size + flat
    if mask_ptr is not None:
        total = tl.where(tl.load(mask_ptr + at, mask=there & (output < live_rows), other=1) != 0, total, 0.0)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=there)
