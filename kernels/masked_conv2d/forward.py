"""The product of a masked convolution and what follows it in registers; the gradient of the input is one, too.

    m: a pixel of the written map; n: a written channel; column: a pair (tap, channel read), see walk.py
    out[m, n] = finish(sum over columns of read[pixel(m) + tap, channel] * packed[n, column])

Maps are channels-last. Weights are packed in each call into rows of visited columns, zero where masked and where
padded, so that the loop needs no mask for them. With a gate the rows of its two halves lie side by side, in runs of
`RUN`: one product gives both, and they meet in the registers of a thread. Packed weights are not kept from call to
call, as a change is not always seen: averaged weights are often copied in through `.data`, which does not count as a
version, and a CUDA graph would replay the old ones.

There are two kernels. One computes addresses. The other (Hopper and later) has boxes of pixels loaded and stored by the
tensor memory accelerator, which fills what lies outside the map with zeros. It multiplies weights by pixels, and not
pixels by weights: so both operands are read from shared memory, and none takes registers.

Sizes and strides do not specialize a kernel, so that few are compiled. Strides of pixels come in units of `UNIT`
elements, 16 bytes where all are multiples of it: a compiler that knows this loads 16 bytes at a time.
"""

import triton
import triton.language as tl

from fastgen.kernels.common import tanh

WALK = ("taps", "first", "width", "origin_y", "origin_x", "tap_y", "tap_x", "group_rows", "group_channels", "shown")
SIZES = ("channels", "part_blocks", "parts_read", "rows", "row_tiles", "columns", "packed_columns", "other_channels")
MAP = ("x_image", "x_y", "x_x", "other_image", "other_y", "other_x", "residual_image", "residual_y", "residual_x")
PACKED = ("rows", "row_pad", "columns", "packed_columns", "first_column", "pitch", "part_pitch", "part_channels",
          "weight_part", "weight_row", "weight_channel", "weight_y", "weight_x",
          "mask_part", "mask_row", "mask_channel", "mask_y", "mask_x")  # fmt: skip


@triton.jit
def product(a, b, accumulator, PRECISION: tl.constexpr):
    """The interpreter multiplies bfloat16 wrongly: it is told by the precision "float32" to widen first."""
    if PRECISION == "float32":
        a, b = a.to(tl.float32), b.to(tl.float32)
        return tl.dot(a, b, accumulator, input_precision="ieee")
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit(do_not_specialize=[*PACKED, *WALK[:3]])
def masked_conv2d_pack_kernel(
    weight_ptr,  # any strides: (half of a gate, row, channel read, ky, kx)
    mask_ptr,  # bool, the same, or None
    packed_ptr,  # (row_pad, packed_columns), written
    rows,  # of a half
    row_pad,
    columns,  # to be filled, from first_column on
    packed_columns,
    first_column,
    pitch,  # columns of a tap
    part_pitch,  # and of a half of the channels read
    part_channels,
    weight_part,
    weight_row,
    weight_channel,
    weight_y,
    weight_x,
    mask_part,
    mask_row,
    mask_channel,
    mask_y,
    mask_x,
    taps,
    first,
    width,
    top,
    left,
    RUN: tl.constexpr,  # rows of a half of a gate that lie side by side, 0 without
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    p = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    half = p * 0
    n = p
    if RUN > 0:
        half = p // RUN % 2
        n = p // (2 * RUN) * RUN + p % RUN
    tap, rest = column // pitch, column % pitch
    part, channel = rest // part_pitch, rest % part_pitch
    live = (n < rows) & (tap < taps) & (channel < part_channels)
    channel = (part * part_channels + channel).to(tl.int64)
    ky = (top + (first + tap) // width).to(tl.int64)
    kx = (left + (first + tap) % width).to(tl.int64)
    half, row = half.to(tl.int64), n.to(tl.int64)
    if mask_ptr is not None:
        at = half * mask_part + row * mask_row + channel * mask_channel + ky * mask_y + kx * mask_x
        live = live & (tl.load(mask_ptr + at, mask=live, other=0) != 0)
    at = half * weight_part + row * weight_row + channel * weight_channel + ky * weight_y + kx * weight_x
    value = tl.load(weight_ptr + at, mask=live, other=0.0)
    at = packed_ptr + p.to(tl.int64) * packed_columns + first_column + column
    tl.store(at, value, mask=(column < columns) & (p < row_pad))


# --- what follows the sums


@triton.jit
def halves(sums, RUN: tl.constexpr, SWAPPED: tl.constexpr):
    """The two halves of a gate, in the registers that they are in: (M, N) -> twice (M, N / 2), or all that swapped."""
    if SWAPPED:
        N: tl.constexpr = sums.shape[0]
        M: tl.constexpr = sums.shape[1]
        signal, valve = tl.split(sums.reshape(N // (2 * RUN), 2, RUN, M).permute(0, 2, 3, 1))
        return signal.reshape(N // 2, M), valve.reshape(N // 2, M)
    else:
        return tl.split(sums.reshape(sums.shape[0], sums.shape[1] // 2, 2))


@triton.jit
def laid(tile, SWAPPED: tl.constexpr):
    """(pixels, channels) as the sums lie, and back."""
    if SWAPPED:
        return tile.T
    else:
        return tile


@triton.jit
def add_biases(sums, image, n, inside, bias_ptr, condition_ptr, first, all_rows, rows, SWAPPED: tl.constexpr):
    """The bias of each channel, and an image's own (B, all_rows); first: 0, or rows for the second half of a gate."""
    if bias_ptr is not None:
        sums += laid(tl.load(bias_ptr + first + n, mask=n < rows, other=0.0).to(tl.float32), SWAPPED)
    if condition_ptr is not None:
        own = condition_ptr + image * all_rows + first + n
        sums += laid(tl.load(own, mask=inside & (n < rows), other=0.0).to(tl.float32), SWAPPED)
    return sums


@triton.jit
def activated(sums, valve, ACTIVATION: tl.constexpr, FAST: tl.constexpr):
    """FAST: two special functions an output, to 2^-11: bfloat16 keeps 2^-9."""
    if ACTIVATION == "gated":
        if FAST:
            return tanh(sums, True) * (0.5 + 0.5 * tanh(0.5 * valve, True))
        else:
            return tanh(sums) * tl.sigmoid(valve)
    elif ACTIVATION == "relu":
        return tl.where(sums < 0, 0.0, sums)  # keeps NaN
    else:
        return sums


@triton.jit
def steps_of(tile, N: tl.constexpr, K: tl.constexpr, taps, channels, part_blocks, parts_read, rows, group_rows,
             group_channels, shown, MIRRORED: tl.constexpr):  # fmt: skip
    """(blocks of columns that a tile of N channels walks through, blocks of the last tap that it leaves out in front).

    Of the last tap a colour sees only the groups before it, so that the walk ends early. In the gradient of the input
    it is the later groups that have seen it, in both halves of a gate: there the first blocks are left out.
    """
    blocks = part_blocks * parts_read
    skipped = 0
    if MIRRORED:
        start = tl.maximum(tile * N // group_channels + 1 - shown, 0) * group_rows
        skipped = tl.minimum(start // K, part_blocks)
        seen = parts_read * (part_blocks - skipped)
    else:
        end = (tl.minimum(tile * N + N, rows) - 1) // group_rows + shown
        seen = tl.minimum((end * group_channels + K - 1) // K, blocks)
    return tl.maximum((taps - 1) * blocks + seen, 1), tl.minimum(skipped, part_blocks - 1)


@triton.jit
def place_of(step, skipped, K: tl.constexpr, taps, first, width, origin_y, origin_x, tap_y, tap_x, channels,
             part_blocks, parts_read, MIRRORED: tl.constexpr):  # fmt: skip
    """Of a step: (dy, dx, first channel in the half that it reads, that half's first channel, first packed column)."""
    blocks = part_blocks * parts_read
    tap, block = step // blocks, step % blocks
    part = 0
    if MIRRORED:
        last = tap == taps - 1
        block += tl.where(last, skipped * (1 + block // (part_blocks - skipped)), 0)
        part = block // part_blocks
    dy = origin_y + (first + tap) // width * tap_y
    dx = origin_x + (first + tap) % width * tap_x
    return dy, dx, (block - part * part_blocks) * K, part * channels, (tap * blocks + block) * K


@triton.jit(do_not_specialize=["pixels", "out_height", "out_width", "x_height", "x_width", "step_y", "step_x", *WALK,
                               *SIZES, *MAP])  # fmt: skip
def masked_conv2d_kernel(
    x_ptr,  # (B, x_height, x_width, parts_read * channels), strides below
    packed_ptr,  # (row_tiles * N, packed_columns * 16)
    other_ptr,  # (B, out_height, out_width, other_channels) or None: a second map, seen at the pixel itself
    bias_ptr,
    condition_ptr,
    residual_ptr,
    out_ptr,  # (B, out_height, out_width, rows) contiguous, written
    kept_ptr,
    pixels,  # B * out_height * out_width
    out_height,
    out_width,
    x_height,
    x_width,
    step_y,  # the convolution's stride
    step_x,
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
    channels,  # of a part
    part_blocks,
    parts_read,
    rows,  # written, of each half with a gate
    row_tiles,
    columns,  # packed columns of x, before those of the other map
    packed_columns,
    other_channels,
    x_image,
    x_y,
    x_x,
    other_image,
    other_y,
    other_x,
    residual_image,
    residual_y,
    residual_x,
    x_channel,  # 1 but where gathered
    residual_channel,
    GATHER: tl.constexpr,  # columns of several taps in a block
    MIRRORED: tl.constexpr,
    UNIT: tl.constexpr,  # of x, other and their channels
    OUT_UNIT: tl.constexpr,  # of rows and the residual
    ACTIVATION: tl.constexpr,
    KEEP: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    rows = rows * OUT_UNIT
    tile = tl.program_id(0) % row_tiles
    m = tl.program_id(0) // row_tiles * M + tl.arange(0, M)
    image = m // (out_height * out_width)
    i, j = m // out_width % out_height, m % out_width
    inside = m < pixels
    y, x = i * step_y, j * step_x
    k = tl.arange(0, K)
    base = image.to(tl.int64) * x_image + y.to(tl.int64) * x_y + x.to(tl.int64) * x_x
    weights = packed_ptr + (tile * N + tl.arange(0, N)).to(tl.int64)[None, :] * (packed_columns * 16) + k[:, None]
    sums = tl.zeros((M, N), tl.float32)
    if GATHER:
        steps = columns // K
        tl.assume(steps > 0)
        for step in range(steps):
            tap = (step * K + k) // channels
            channel = (step * K + k) % channels
            dy = (origin_y + (first + tap) // width * tap_y)[None, :]
            dx = (origin_x + (first + tap) % width * tap_x)[None, :]
            seen = inside[:, None] & (tap < taps)[None, :]
            seen = seen & (y[:, None] + dy >= 0) & (y[:, None] + dy < x_height)
            seen = seen & (x[:, None] + dx >= 0) & (x[:, None] + dx < x_width)
            at = (dy.to(tl.int64) * x_y + dx.to(tl.int64) * x_x) + channel.to(tl.int64)[None, :] * x_channel
            a = tl.load(x_ptr + base[:, None] + at, mask=seen, other=0.0)
            sums = product(a, tl.load(weights + step * K), sums, PRECISION)
    else:
        channels = channels * UNIT
        read = x_ptr + base[:, None] * UNIT + k[None, :]
        steps, skipped = steps_of(tile, N // (2 if ACTIVATION == "gated" else 1), K, taps, channels, part_blocks,
                                  parts_read, rows, group_rows, group_channels, shown, MIRRORED)  # fmt: skip
        tl.assume(steps > 0)
        for step in range(steps):
            dy, dx, channel, start, column = place_of(step, skipped, K, taps, first, width, origin_y, origin_x, tap_y,
                                                      tap_x, channels, part_blocks, parts_read, MIRRORED)  # fmt: skip
            seen = inside & (y + dy >= 0) & (y + dy < x_height) & (x + dx >= 0) & (x + dx < x_width)
            at = (dy.to(tl.int64) * x_y + dx.to(tl.int64) * x_x) * UNIT + (start + channel)
            a = tl.load(read + at, mask=seen[:, None] & (channel + k < channels)[None, :], other=0.0)
            sums = product(a, tl.load(weights + column), sums, PRECISION)
    image, i, j = image.to(tl.int64)[:, None], i.to(tl.int64)[:, None], j.to(tl.int64)[:, None]
    inside = inside[:, None]
    if other_ptr is not None:
        others = other_channels * UNIT
        read = other_ptr + (image * other_image + i * other_y + j * other_x) * UNIT + k[None, :]
        blocks = (others + K - 1) // K
        tl.assume(blocks > 0)
        for block in range(blocks):
            a = tl.load(read + block * K, mask=inside & (block * K + k < others)[None, :], other=0.0)
            sums = product(a, tl.load(weights + columns + block * K), sums, PRECISION)
    row = m.to(tl.int64)[:, None]
    kind = out_ptr.dtype.element_ty
    if ACTIVATION == "gated":
        n = (tile * (N // 2) + tl.arange(0, N // 2))[None, :]
        there = inside & (n < rows)
        sums, valve = halves(sums, 1, False)
        sums = add_biases(sums, image, n, inside, bias_ptr, condition_ptr, 0, 2 * rows, rows, False)
        valve = add_biases(valve, image, n, inside, bias_ptr, condition_ptr, rows, 2 * rows, rows, False)
        if KEEP == "valve":
            tl.store(kept_ptr + row * rows + n, valve.to(kind), mask=there)
        if KEEP == "both":
            tl.store(kept_ptr + row * (2 * rows) + n, sums.to(kind), mask=there)
            tl.store(kept_ptr + row * (2 * rows) + rows + n, valve.to(kind), mask=there)
    else:
        n = (tile * N + tl.arange(0, N))[None, :]
        there = inside & (n < rows)
        sums = add_biases(sums, image, n, inside, bias_ptr, condition_ptr, 0, rows, rows, False)
        valve = sums
        if KEEP == "sign":
            tl.store(kept_ptr + row * rows + n, (sums <= 0) == 0, mask=there)  # a NaN passes
    sums = activated(sums, valve, ACTIVATION, FAST)
    if residual_ptr is not None:
        at = (image * residual_image + i * residual_y + j * residual_x) * OUT_UNIT + n.to(tl.int64) * residual_channel
        sums += tl.load(residual_ptr + at, mask=there, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * rows + n, sums.to(kind), mask=there)


@triton.jit(do_not_specialize=["batch", "out_height", "out_width", "across", "down", *WALK, *SIZES, *MAP[6:]])
def masked_conv2d_tma_kernel(
    x_desc,  # (B, x_height, x_width, parts_read * channels), boxes (IMAGES, HEIGHT, WIDTH, K)
    packed_desc,  # (row_tiles * N, packed columns), boxes (N, K)
    other_desc,  # as x_desc, the second map, or None
    bias_ptr,
    condition_ptr,
    residual_ptr,
    out_desc,  # (B, out_height, out_width, rows), boxes of N channels, or of N / 2 with a gate
    kept_desc,  # KEEP "valve": as out_desc; "both": (B, out_height, out_width, 2, rows)
    sign_ptr,  # KEEP "sign": (B, out_height, out_width, rows) bool
    batch,
    out_height,
    out_width,
    across,  # boxes side by side
    down,
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
    channels,
    part_blocks,
    parts_read,
    rows,
    row_tiles,
    columns,
    other_channels,
    residual_image,
    residual_y,
    residual_x,
    residual_channel,
    MIRRORED: tl.constexpr,
    OUT_UNIT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    KEEP: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
    IMAGES: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    M: tl.constexpr = IMAGES * HEIGHT * WIDTH
    RUN: tl.constexpr = 8  # a thread holds rows r and r + 8 of a product
    rows = rows * OUT_UNIT
    tile = tl.program_id(0) % row_tiles
    box = tl.program_id(0) // row_tiles
    image = box // (across * down) * IMAGES
    y = box // across % down * HEIGHT
    x = box % across * WIDTH
    sums = tl.zeros((N, M), tl.float32)
    steps, skipped = steps_of(tile, N // (2 if ACTIVATION == "gated" else 1), K, taps, channels, part_blocks,
                              parts_read, rows, group_rows, group_channels, shown, MIRRORED)  # fmt: skip
    tl.assume(steps > 0)
    for step in range(steps):
        dy, dx, channel, start, column = place_of(step, skipped, K, taps, first, width, origin_y, origin_x, tap_y,
                                                  tap_x, channels, part_blocks, parts_read, MIRRORED)  # fmt: skip
        a = x_desc.load([image, y + dy, x + dx, start + channel]).reshape(M, K)
        sums = product(packed_desc.load([tile * N, column]), a.T, sums, PRECISION)
    if other_desc is not None:
        blocks = (other_channels + K - 1) // K
        tl.assume(blocks > 0)
        for block in range(blocks):
            a = other_desc.load([image, y, x, block * K]).reshape(M, K)
            sums = product(packed_desc.load([tile * N, columns + block * K]), a.T, sums, PRECISION)
    m = tl.arange(0, M)
    images = (image + m // (HEIGHT * WIDTH))[:, None]
    i = (y + m // WIDTH % HEIGHT)[:, None]
    j = (x + m % WIDTH)[:, None]
    inside = (images < batch) & (i < out_height) & (j < out_width)
    images, i, j = images.to(tl.int64), i.to(tl.int64), j.to(tl.int64)
    kind = out_desc.dtype
    if ACTIVATION == "gated":
        C: tl.constexpr = N // 2
        n = (tile * C + tl.arange(0, C))[None, :]
        sums, valve = halves(sums, RUN, True)
        sums = add_biases(sums, images, n, inside, bias_ptr, condition_ptr, 0, 2 * rows, rows, True)
        valve = add_biases(valve, images, n, inside, bias_ptr, condition_ptr, rows, 2 * rows, rows, True)
        if KEEP == "valve":
            kept_desc.store([image, y, x, tile * C], valve.to(kind).T.reshape(IMAGES, HEIGHT, WIDTH, C))
        if KEEP == "both":
            kept_desc.store([image, y, x, 0, tile * C], sums.to(kind).T.reshape(IMAGES, HEIGHT, WIDTH, 1, C))
            kept_desc.store([image, y, x, 1, tile * C], valve.to(kind).T.reshape(IMAGES, HEIGHT, WIDTH, 1, C))
    else:
        C: tl.constexpr = N
        n = (tile * C + tl.arange(0, C))[None, :]
        sums = add_biases(sums, images, n, inside, bias_ptr, condition_ptr, 0, rows, rows, True)
        valve = sums
        if KEEP == "sign":
            at = sign_ptr + ((images * out_height + i) * out_width + j) * rows + n
            tl.store(at, ((sums <= 0) == 0).T, mask=inside & (n < rows))
    sums = activated(sums, valve, ACTIVATION, FAST)
    if residual_ptr is not None:
        at = (images * residual_image + i * residual_y + j * residual_x) * OUT_UNIT + n.to(tl.int64) * residual_channel
        sums += tl.load(residual_ptr + at, mask=inside & (n < rows), other=0.0).to(tl.float32).T
    out_desc.store([image, y, x, tile * C], sums.to(kind).T.reshape(IMAGES, HEIGHT, WIDTH, C))
