"""The gradients of a masked convolution: back through the activation, the weight's, the sums over pixels.

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
from fastgen.kernels.masked_conv2d.forward import WALK, product

STRIDES = tuple(f"{name}_{axis}" for name in ("grad", "grad_pre") for axis in ("image", "y", "x"))


@triton.jit
def back(grad_ptr, first_ptr, second_ptr, at, first_at, inside, SAVED: tl.constexpr):
    """The gradient of what entered the activation, of both its halves with a gate, float32; zero outside.

    SAVED and what its maps are: "none"; "relu": the result; "sign": what passed; "valve": the result, the second half;
    "both": the halves. at: offsets into the gradient; first_at: into the maps.
    """
    first = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    second = first
    if SAVED == "relu":
        out = tl.load(first_ptr + first_at, mask=inside, other=0.0).to(tl.float32)
        first = tl.where(out > 0, first, tl.where(out == 0, 0.0, first * out))  # NaN stays NaN
    if SAVED == "sign":
        first = tl.where(tl.load(first_ptr + first_at, mask=inside, other=0) != 0, first, 0.0)
    if SAVED == "valve" or SAVED == "both":
        known = tl.load(first_ptr + first_at, mask=inside, other=0.0).to(tl.float32)
        s = tl.sigmoid(tl.load(second_ptr + first_at, mask=inside, other=0.0).to(tl.float32))
        if SAVED == "both":
            t = tanh(known)
            out = t * s
        else:
            out = known
            t = tl.where(s > 0, out / s, 0.0)
            t = tl.where(t > 1, 1.0, tl.where(t < -1, -1.0, t))
        second = first * out * (1 - s)
        first = first * (s - out * t)
    return first, second


@triton.jit(do_not_specialize=["group", "shares", "steps", "height", "width", "rows", "kept_pitch", *STRIDES])
def masked_conv2d_activation_backward_kernel(
    grad_ptr,  # (B, height, width, rows), strides below
    grad_pre_ptr,  # (B, height, width, parts * rows) or None: gradient of the sums themselves, added
    first_ptr,  # (B, height, width, rows) at `kept_pitch` a pixel; see `back`
    second_ptr,
    grad_sums_ptr,  # written: (B, height, width, parts * rows), or None
    sums_ptr,  # written: (programs along the pixels, parts * rows) float32, or None
    group,  # pixels that share a bias: height * width for an image's own, all of them for none
    shares,  # programs of a group
    steps,  # blocks of pixels a program walks through
    height,
    width,
    rows,
    kept_pitch,
    grad_image,
    grad_y,
    grad_x,
    grad_pre_image,
    grad_pre_y,
    grad_pre_x,
    grad_channel,
    grad_pre_channel,
    SAVED: tl.constexpr,
    UNIT: tl.constexpr,
    PIXELS: tl.constexpr,
    ROWS: tl.constexpr,
):
    parts: tl.constexpr = 2 if SAVED == "valve" or SAVED == "both" else 1
    rows = rows * UNIT
    n = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[None, :]
    start = tl.program_id(0) // shares * group
    end = start + group
    start += tl.program_id(0) % shares * steps * PIXELS
    first_sum = tl.zeros((PIXELS, ROWS), tl.float32)
    second_sum = tl.zeros((PIXELS, ROWS), tl.float32)
    for step in range(steps):
        pixel = (start + step * PIXELS + tl.arange(0, PIXELS))[:, None]
        inside = (pixel < end) & (n < rows)
        image = (pixel // (height * width)).to(tl.int64)
        y = (pixel // width % height).to(tl.int64)
        x = (pixel % width).to(tl.int64)
        pixel = pixel.to(tl.int64)
        at = (image * grad_image + y * grad_y + x * grad_x) * UNIT + n.to(tl.int64) * grad_channel
        first, second = back(grad_ptr, first_ptr, second_ptr, at, pixel * kept_pitch * UNIT + n, inside, SAVED)
        if grad_pre_ptr is not None:
            at = grad_pre_ptr + (image * grad_pre_image + y * grad_pre_y + x * grad_pre_x) * UNIT
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
        at = sums_ptr + tl.program_id(0).to(tl.int64) * (parts * rows) + n
        tl.store(at, tl.sum(first_sum, 0)[None, :], mask=n < rows)
        if parts == 2:
            tl.store(at + rows, tl.sum(second_sum, 0)[None, :], mask=n < rows)


@triton.jit(do_not_specialize=["count", "rows"])
def masked_conv2d_bias_kernel(
    sums_ptr,  # (groups, count, rows) float32
    out_ptr,  # (groups, rows), written
    count,
    rows,
    ROWS: tl.constexpr,
):
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = sums_ptr + tl.program_id(1).to(tl.int64) * count * rows + n
    total = tl.zeros((ROWS,), tl.float32)
    for index in range(count):
        total += tl.load(at + tl.cast(index, tl.int64) * rows, mask=n < rows, other=0.0)
    tl.store(out_ptr + tl.program_id(1) * rows + n, total.to(out_ptr.dtype.element_ty), mask=n < rows)


# --- the gradient of the weight


@triton.jit
def live_blocks(tile, N: tl.constexpr, K: tl.constexpr, taps, channels, blocks, rows, parts, group_rows,
                group_channels, shown):  # fmt: skip
    """Blocks of columns of which some row of the tile sees one: all but those of later colours in the last tap."""
    part, last = tile * N // rows, tl.minimum(tile * N + N, parts * rows) - 1
    end = tl.where(last // rows == part, (last % rows // group_rows + shown) * group_channels, channels)
    return tl.maximum((taps - 1) * blocks + tl.minimum((end + K - 1) // K, blocks), 1)


SHARE = ("steps", "channels", "blocks", "rows", "parts", "row_tiles", "all_columns")


@triton.jit
def store_share(partial_ptr, total, tile, column, all_rows, all_columns, N: tl.constexpr,
                                      K: tl.constexpr):  # fmt: skip
    n = tile * N + tl.arange(0, N)
    at = tl.program_id(1).to(tl.int64) * all_rows * all_columns + n.to(tl.int64)[:, None] * all_columns
    tl.store(partial_ptr + at + (column * K + tl.arange(0, K))[None, :], total, mask=(n < all_rows)[:, None])


@triton.jit(do_not_specialize=["pixels", "height", "width_out", "x_height", "x_width", "step_y", "step_x", *SHARE,
                               *WALK, "grad_image", "grad_y", "grad_x", "x_image", "x_y", "x_x"])  # fmt: skip
def masked_conv2d_weight_kernel(
    grad_ptr,  # (B, height, width_out, parts * rows), channels side by side: gradient of the sums
    x_ptr,  # (B, x_height, x_width, channels)
    partial_ptr,  # (shares, parts * rows, all_columns * 16) float32, written
    sums_ptr,  # (shares, blocks of columns, parts * rows) float32, written: sums over pixels, or None
    pixels,
    height,
    width_out,
    x_height,
    x_width,
    step_y,
    step_x,
    steps,  # blocks of pixels a program walks through
    channels,
    blocks,  # of columns, of a tap
    rows,  # of a half
    parts,
    row_tiles,
    all_columns,
    taps,
    first,
    width,
    origin_y,
    origin_x,
    tap_y,
    tap_x,
    group_rows,
    group_channels,
    shown,
    grad_image,
    grad_y,
    grad_x,
    x_image,
    x_y,
    x_x,
    x_channel,
    GATHER: tl.constexpr,
    UNIT: tl.constexpr,  # of x and its channels
    GRAD_UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    M: tl.constexpr,  # pixels a step
    N: tl.constexpr,  # rows
    K: tl.constexpr,  # columns
):
    tile = tl.program_id(0) % row_tiles
    column = tl.program_id(0) // row_tiles
    all_rows = parts * rows * GRAD_UNIT
    n = tile * N + tl.arange(0, N)
    k = tl.arange(0, K)
    if GATHER:
        live = tl.num_programs(0) // row_tiles
        tap, channel = (column * K + k) // channels, (column * K + k) % channels
        dy = (origin_y + (first + tap) // width * tap_y)[None, :]
        dx = (origin_x + (first + tap) % width * tap_x)[None, :]
        real = tap < taps
    else:
        channels = channels * UNIT
        live = live_blocks(tile, N, K, taps, channels, blocks, rows * GRAD_UNIT, parts, group_rows, group_channels,
                           shown)  # fmt: skip
        tap = column // blocks
        channel = column % blocks * K + k
        dy = origin_y + (first + tap) // width * tap_y
        dx = origin_x + (first + tap) % width * tap_x
        real = channel < channels
    within = channel.to(tl.int64)[None, :] * x_channel + (dy.to(tl.int64) * x_y + dx.to(tl.int64) * x_x) * UNIT
    start = tl.program_id(1) * steps * M
    if column < live:
        total = tl.zeros((N, K), tl.float32)
        tl.assume(steps > 0)
        for step in range(steps):
            pixel = (start + step * M + tl.arange(0, M))[:, None]
            image = (pixel // (height * width_out)).to(tl.int64)
            i, j = pixel // width_out % height, pixel % width_out
            at = (image * grad_image + i.to(tl.int64) * grad_y + j.to(tl.int64) * grad_x) * GRAD_UNIT + n[None, :]
            grad = tl.load(grad_ptr + at, mask=(pixel < pixels) & (n < all_rows)[None, :], other=0.0)
            y, x = i * step_y, j * step_x
            seen = (pixel < pixels) & real[None, :]
            seen = seen & (y + dy >= 0) & (y + dy < x_height) & (x + dx >= 0) & (x + dx < x_width)
            at = (image * x_image + y.to(tl.int64) * x_y + x.to(tl.int64) * x_x) * UNIT + within
            read = tl.load(x_ptr + at, mask=seen, other=0.0)
            total = product(tl.trans(grad), read, total, PRECISION)
        store_share(partial_ptr, total, tile, column, all_rows, all_columns * 16, N, K)
    if sums_ptr is not None:
        # The programs of a tile share its blocks of pixels among them, as each has them all in a cache nearby. A loop
        # of its own: where a product read the same buffers, one could be written over while it still does.
        added = tl.zeros((M, N), tl.float32)
        for step in range(column, tl.where(column < live, steps, 0), live):
            pixel = (start + step * M + tl.arange(0, M))[:, None]
            image = (pixel // (height * width_out)).to(tl.int64)
            i, j = (pixel // width_out % height).to(tl.int64), (pixel % width_out).to(tl.int64)
            at = (image * grad_image + i * grad_y + j * grad_x) * GRAD_UNIT + n[None, :]
            added += tl.load(grad_ptr + at, mask=(pixel < pixels) & (n < all_rows)[None, :], other=0.0).to(tl.float32)
        at = tl.program_id(1).to(tl.int64) * (tl.num_programs(0) // row_tiles) + column
        tl.store(sums_ptr + at * all_rows + n, tl.sum(added, 0), mask=n < all_rows)


@triton.jit(do_not_specialize=["batch", "across", "down", "height", "width_out", *SHARE, *WALK])
def masked_conv2d_weight_tma_kernel(
    grad_desc,  # (B, height, width_out, parts * rows), boxes (IMAGES, HEIGHT, WIDTH, N)
    x_desc,  # (B, x_height, x_width, channels), boxes (IMAGES, HEIGHT, WIDTH, K)
    partial_ptr,
    sums_ptr,
    grad_ptr,  # contiguous, for the sums; or None
    batch,
    across,  # boxes side by side
    down,
    height,
    width_out,
    steps,
    channels,
    blocks,
    rows,
    parts,
    row_tiles,
    all_columns,
    taps,
    first,
    width,
    origin_y,
    origin_x,
    tap_y,
    tap_x,
    group_rows,
    group_channels,
    shown,
    GRAD_UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    IMAGES: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """The same by the tensor memory accelerator: boxes of pixels, without addresses. Beyond the last image: zeros."""
    M: tl.constexpr = IMAGES * HEIGHT * WIDTH
    rows = rows * GRAD_UNIT
    tile = tl.program_id(0) % row_tiles
    column = tl.program_id(0) // row_tiles
    all_rows = parts * rows
    live = live_blocks(tile, N, K, taps, channels, blocks, rows, parts, group_rows, group_channels, shown)
    tap, block = column // blocks, column % blocks
    dy = origin_y + (first + tap) // width * tap_y
    dx = origin_x + (first + tap) % width * tap_x
    start = tl.program_id(1) * steps
    if column < live:
        total = tl.zeros((N, K), tl.float32)
        tl.assume(steps > 0)
        for step in range(steps):
            box = start + step
            image = box // (across * down) * IMAGES
            y = box // across % down * HEIGHT
            x = box % across * WIDTH
            grad = grad_desc.load([image, y, x, tile * N]).reshape(M, N)
            read = x_desc.load([image, y + dy, x + dx, block * K]).reshape(M, K)
            total = product(grad.T, read, total, PRECISION)
        store_share(partial_ptr, total, tile, column, all_rows, all_columns * 16, N, K)
    if sums_ptr is not None:
        n = tile * N + tl.arange(0, N)
        m = tl.arange(0, M)
        added = tl.zeros((M, N), tl.float32)
        for step in range(column, tl.where(column < live, steps, 0), live):
            box = start + step
            image = box // (across * down) * IMAGES + m // (HEIGHT * WIDTH)
            y = box // across % down * HEIGHT + m // WIDTH % HEIGHT
            x = box % across * WIDTH + m % WIDTH
            there = (image < batch) & (y < height) & (x < width_out)
            at = ((image.to(tl.int64) * height + y) * width_out + x)[:, None] * all_rows + n[None, :]
            there = there[:, None] & (n < all_rows)[None, :]
            added += tl.load(grad_ptr + at, mask=there, other=0.0).to(tl.float32)
        at = tl.program_id(1).to(tl.int64) * (tl.num_programs(0) // row_tiles) + column
        tl.store(sums_ptr + at * all_rows + n, tl.sum(added, 0), mask=n < all_rows)


@triton.jit(do_not_specialize=["shares", "all_rows", "all_columns", "channels", "kernel_height", "kernel_width", "taps",
                               "first", "width", "top", "left", "pitch"])  # fmt: skip
def masked_conv2d_weight_sum_kernel(
    partial_ptr,  # (shares, all_rows, all_columns * 16) float32
    mask_ptr,  # bool (all_rows, channels, kernel_height, kernel_width) contiguous, or None
    out_ptr,  # the same shape, contiguous, written whole
    shares,
    all_rows,
    all_columns,
    channels,
    kernel_height,
    kernel_width,
    taps,
    first,
    width,
    top,
    left,
    pitch,  # columns of a tap
    BLOCK: tl.constexpr,
):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = element // (channels * kernel_height * kernel_width)
    channel = element // (kernel_height * kernel_width) % channels
    ky, kx = element // kernel_width % kernel_height - top, element % kernel_width - left
    tap = ky * width + kx - first
    inside = row < all_rows
    live = inside & (kx >= 0) & (kx < width) & (tap >= 0) & (tap < taps)
    if mask_ptr is not None:
        live = live & (tl.load(mask_ptr + element, mask=inside, other=0) != 0)
    total = tl.zeros((BLOCK,), tl.float32)
    step = all_rows.to(tl.int64) * (all_columns * 16)
    at = partial_ptr + row * (all_columns * 16) + tap * pitch + channel
    for share in range(shares):
        total += tl.load(at + share * step, mask=live, other=0.0)
    tl.store(out_ptr + element, total.to(out_ptr.dtype.element_ty), mask=inside)
