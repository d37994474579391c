"""The kernels of a product of a masked convolution; the gradient of the input is such a product, too.

    m: a pixel of the written map; n: a written channel; column: a pair (tap, channel read), see walk.py
    out[m, n] = finish(sum over columns of packed[n, column] * read[pixel(m) + tap, channel])

Maps are channels-last. Weights are packed in each call into rows of visited columns, zero where masked and where
padded, so that the loop needs no mask for them. With a gate the rows of its two halves lie side by side in runs of
eight: a thread holds rows r and r + 8 of a product, so that both halves of a channel are in its registers. Packed
weights are not kept from call to call, as a change is not always seen: averaged weights are often copied in through
`.data`, which does not count as a version, and a CUDA graph would replay the old ones.

The product multiplies weights by pixels, so that wgmma reads both from shared memory. A map is given as a pointer, or
(Hopper and later) as a tensor descriptor: then the tensor memory accelerator loads and stores boxes of pixels, with
zeros for what lies outside. `HEIGHT` and `WIDTH` are the sides of a box, and 0 with pointers, where a program has
`IMAGES` pixels in raster order.

Sizes do not specialize a kernel, so that few are compiled. Those that come in units of `UNIT` elements are multiples of
16 bytes then: a compiler that knows this loads 16 bytes at a time.
"""

import triton
import triton.language as tl

from fastgen.kernels.common import kernel, product, tanh, tanh_near_0


@triton.jit
def picked(values, index):
    """The elements of `values` at the places `index`, which count over both dimensions. Flat, as Triton then gathers in
    shared memory; along one of two dimensions it gathers by shuffles, with ten times as many instructions here."""
    return tl.gather(values.reshape(values.numel), index.reshape(index.numel), 0).reshape(index.shape)


INPUTS = tl.constexpr(16)  # of a program that packs


@kernel
def masked_conv2d_pack_kernel(
    weight_ptr,  # (outputs, inputs, size)
    mask_ptr,  # bool, as the weight, or None
    packed_ptr,  # (packed_rows, packed_columns * 16), written from column first_column * 16 on
    live_rows, packed_rows,  # live_rows: of a half
    columns, packed_columns, first_column,  # in sixteens; columns: to be filled
    pitch,  # columns of a tap, in units
    outputs,  # of a half of a gate
    image_pitch,  # inputs * size, in units
    run, parts,  # a place p is of the half p // run % parts: runs of one half follow runs of the other
    size,  # kh * kw
    taps,
    rounds,  # taps, and more to fill the columns
    first_tap, box_width,
    corner, kernel_width,  # corner: of the box, in raster order of the kernel
    MIRRORED: tl.constexpr,  # a row of packed weights is an input, a column an output
    UNIT: tl.constexpr,
    FLAT: tl.constexpr,  # a power of two, INPUTS * size and seven times 16 bytes at least
    OUTPUTS: tl.constexpr,
):  # fmt: skip
    """A program loads what INPUTS inputs have in all taps, which lie side by side, and picks tap after tap of it."""
    place = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)[:, None]
    start = tl.program_id(1) * INPUTS
    half, output = place // run % parts, place // (run * parts) * run + place % run
    i = tl.arange(0, INPUTS)[None, :]
    pitch = pitch * UNIT
    # 32 threads pick from eight rows (every other one, MIRRORED) or four: these begin at different banks.
    LINE: tl.constexpr = 128 // packed_ptr.dtype.element_ty.primitive_bitwidth
    o = tl.arange(0, OUTPUTS)[:, None]
    lag = o // 2 % 8 * LINE if MIRRORED else o % 4 * (2 * LINE)
    flat = tl.arange(0, FLAT)[None, :] - lag
    there = (output < outputs) & (flat >= 0) & (flat < size * INPUTS) & (start * size + flat < image_pitch * UNIT)
    at = (half * outputs + output).to(tl.int64) * (image_pitch * UNIT) + start * size + flat
    values = tl.load(weight_ptr + at, mask=there, other=0.0)
    if mask_ptr is not None:
        values = tl.where(tl.load(mask_ptr + at, mask=there & (output < live_rows), other=1) != 0, values, 0.0)
    for tap in range(rounds):
        in_box = first_tap + tl.minimum(tap, taps - 1)
        tap_in_kernel = corner + in_box // box_width * kernel_width + in_box % box_width
        taken = picked(values, o * FLAT + lag + i * size + tap_in_kernel)
        taken = tl.where(tap < taps, taken, 0.0)
        row, column = (start + i, place) if MIRRORED else (place, start + i)
        inside = (row < packed_rows) & (column < pitch) & (tap * pitch + column < columns * 16)
        to_row = packed_ptr + row.to(tl.int64) * (packed_columns * 16) + first_column * 16
        tl.store(to_row + tap * pitch + column, taken, mask=inside)


# --- where a program works


@triton.jit
def lies_in(y, x, height, width):
    """Whether places lie in a map; negative ones are large without their sign, which spares half the comparisons."""
    y, x = y.to(tl.uint32, bitcast=True), x.to(tl.uint32, bitcast=True)
    return (y < height.to(tl.uint32)) & (x < width.to(tl.uint32))


@triton.jit
def corner_of(block, across, down, IMAGES: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """(image, y, x) of the first pixel of a box."""
    return block // (across * down) * IMAGES, block // across % down * HEIGHT, block % across * WIDTH


@triton.jit
def pixels_of(block, height, width, across, down, IMAGES: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """(image, y, x) of each pixel of a box, or of IMAGES pixels in raster order."""
    if HEIGHT == 0:
        m = block * IMAGES + tl.arange(0, IMAGES)
        return m // (height * width), m // width % height, m % width
    else:
        m = tl.arange(0, IMAGES * HEIGHT * WIDTH)
        image, y, x = corner_of(block, across, down, IMAGES, HEIGHT, WIDTH)
        return image + m // (HEIGHT * WIDTH), y + m // WIDTH % HEIGHT, x + m % WIDTH


@triton.jit
def place_in(image, y, x, height, width):
    """The number of a pixel in the raster order of a map, in 64 bits."""
    return (image.to(tl.int64) * height + y) * width + x


@triton.jit
def columns_of(channels, K: tl.constexpr):
    """What `channels` take of the columns, in whole blocks."""
    return (channels + K - 1) // K * K


@triton.jit
def seen_from(tap, first_tap, box_width, origin_y, origin_x, tap_y, tap_x):
    """(dy, dx) from the place of a result to what a visited tap sees."""
    tap += first_tap
    return origin_y + tap // box_width * tap_y, origin_x + tap % box_width * tap_x


@triton.jit
def blocks_seen(row, K: tl.constexpr, channels, group_rows, group_channels, shown):
    """The blocks of the last tap that a row (within its half) sees, and all rows before it, too."""
    end = (row // group_rows + shown) * group_channels
    return tl.minimum(columns_of(end, K), columns_of(channels, K)) // K


@triton.jit
def steps_of(tile, N: tl.constexpr, K: tl.constexpr, taps, channels, parts_read, rows, group_rows, group_channels,
             shown, mirrored):  # fmt: skip
    """(number of steps of a tile of N channels, number of blocks of the last tap that it leaves out in front).

    In the last tap a colour sees only the groups of channels before it, so that the walk ends early. In the gradient of
    the input the later groups have seen it, in both halves of a gate: there the walk leaves out the first blocks.
    """
    blocks = columns_of(channels, K) // K  # of a part
    start = tl.maximum(tile * N // group_channels + 1 - shown, 0) * group_rows
    skipped = tl.where(mirrored != 0, tl.minimum(start // K, blocks), 0)
    seen = blocks_seen(tl.minimum(tile * N + N, rows) - 1, K, channels, group_rows, group_channels, shown)
    seen = tl.where(mirrored != 0, blocks - skipped, seen)
    return tl.maximum(((taps - 1) * blocks + seen) * parts_read, 1), tl.minimum(skipped, blocks - 1)


@triton.jit
def place_of(step, skipped, K: tl.constexpr, taps, channels, parts_read):
    """What a step reads: (tap, first channel in its part, that part's first channel, first packed column)."""
    part_blocks = columns_of(channels, K) // K
    blocks = part_blocks * parts_read
    tap, block = step // blocks, step % blocks
    block += tl.where(tap == taps - 1, skipped * (1 + block // (part_blocks - skipped)), 0)
    part = block // part_blocks
    return tap, (block - part * part_blocks) * K, part * channels, (tap * blocks + block) * K


# --- what follows the sums: tiles of (channels, pixels)


@triton.jit
def halves_of(sums):
    """The two halves of a gate, without a move between registers: (N, M) -> twice (N / 2, M)."""
    N: tl.constexpr = sums.shape[0]
    M: tl.constexpr = sums.shape[1]
    signal, valve = tl.split(sums.reshape(N // 16, 2, 8, M).permute(0, 2, 3, 1))
    return signal.reshape(N // 2, M), valve.reshape(N // 2, M)


@triton.jit
def add_biases(sums, image, n, inside, bias_rows, bias_ptr, condition_ptr, half, all_rows):
    """The bias of each channel, and an image's own (B, all_rows); half: 0, or rows for the second half of a gate."""
    sums += tl.load(bias_ptr + half + n, mask=n < bias_rows, other=0.0).to(tl.float32)
    if condition_ptr is not None:
        own = condition_ptr + image * all_rows + half + n
        sums += tl.load(own, mask=inside, other=0.0).to(tl.float32)
    return sums


@triton.jit
def gate(signal, valve, FAST: tl.constexpr):
    """tanh(signal) * sigmoid(valve), each input through one special function. FAST: these err by 2^-11, and bfloat16
    keeps 2^-9. Else the quotient comes from Newton's steps, which take one instruction more than a division, with its
    scaling for large numbers."""
    if FAST:
        return tanh(signal, True) * (0.5 + 0.5 * tanh(0.5 * valve, True))
    size = tl.abs(signal)
    e, f = tl.exp(-2.0 * size), tl.exp(-tl.maximum(valve, -80.0, tl.PropagateNan.ALL))
    small = size < 0.3
    numerator = tl.where(small, tanh_near_0(signal), tl.where(signal < 0, e - 1.0, 1.0 - e))
    divisor = tl.where(small, 1.0, 1.0 + e) * (1.0 + f)
    inverse = (0x7EF311C7 - divisor.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)  # to an eighth
    for _ in tl.static_range(3):
        inverse += inverse * (1.0 - divisor * inverse)
    return numerator * inverse


@triton.jit
def write(to_map, first, values, half, at, inside, place, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Writes a half of the channels of a map (B, H, W, halves, rows): by a descriptor, from the place (image, y, x,
    channel) on, where HEIGHT > 0, else to the offsets `at` from `first` on."""
    if HEIGHT > 0:
        C: tl.constexpr = values.shape[0]
        IMAGES: tl.constexpr = values.shape[1] // (HEIGHT * WIDTH)
        box = values.to(to_map.dtype).T.reshape(IMAGES, HEIGHT, WIDTH, 1, C)
        to_map.store([place[0], place[1], place[2], half, place[3]], box)
    else:
        tl.store(to_map + first + at, values.to(to_map.dtype.element_ty), mask=inside)


@kernel
def masked_conv2d_kernel(
    x_map,  # (B, x_height, x_width, parts_read * channels)
    packed_map,  # (rows of whole tiles, columns of whole blocks)
    other_map,  # (B, out_height, out_width, other_channels) or None: a second map, seen at the pixel itself
    bias_ptr,  # (all rows)
    condition_ptr,  # (B, all rows) or None
    residual_ptr,  # as out, or None
    out_map,  # (B, out_height, out_width, 1, rows), written
    kept_map,  # written: KEEP "valve": as out; "both": with two halves
    bias_rows, residual_rows,
    least,  # without a gate: what is less is raised to it; 0 for ReLU, else -inf
    mirrored,  # for the gradient of the input
    batch, out_height, out_width, x_height, x_width, across, down,
    taps, first_tap, box_width, origin_y, origin_x, tap_y, tap_x, group_rows, group_channels, shown,
    channels,  # of a part
    parts_read,
    rows,  # written, of each half with a gate
    other_channels, GATHER: tl.constexpr,
    UNIT: tl.constexpr,  # of channels and other_channels
    OUT_UNIT: tl.constexpr,  # of rows
    GATED: tl.constexpr, KEEP: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
    IMAGES: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    BOXES: tl.constexpr = HEIGHT > 0
    M: tl.constexpr = IMAGES * HEIGHT * WIDTH if BOXES else IMAGES
    C: tl.constexpr = N // 2 if GATED else N  # channels written
    rows, channels, other_channels = rows * OUT_UNIT, channels * UNIT, other_channels * UNIT
    row_tiles = (rows + C - 1) // C
    tile, block = tl.program_id(0) % row_tiles, tl.program_id(0) // row_tiles
    first_image, first_y, first_x = corner_of(block, across, down, IMAGES, HEIGHT, WIDTH)
    sums = tl.zeros((N, M), tl.float32)
    k = tl.arange(0, K)
    if GATHER:
        columns = columns_of(taps * channels, K)
        steps = columns // K
    else:
        columns = taps * parts_read * columns_of(channels, K)
        steps, skipped = steps_of(tile, C, K, taps, channels, parts_read, rows, group_rows, group_channels, shown,
                                  mirrored)  # fmt: skip
    if not BOXES:
        image, y, x = pixels_of(block, out_height, out_width, across, down, IMAGES, HEIGHT, WIDTH)
        y = tl.where(image < batch, y, -(2**30))  # far from the map
        read = x_map + (place_in(image, y, x, x_height, x_width) * (parts_read * channels))[None, :]
        read += 0 if GATHER else k[:, None]
        packed_columns = columns + columns_of(other_channels, K)
        weights = packed_map + (tile * N + tl.arange(0, N)).to(tl.int64)[:, None] * packed_columns + k[None, :]
    tl.assume(steps > 0)
    for step in range(steps):
        if GATHER:
            tap, channel, column = (step * K + k[:, None]) // channels, (step * K + k[:, None]) % channels, step * K
            real = tap < taps
        else:
            tap, channel, start, column = place_of(step, skipped, K, taps, channels, parts_read)
            real = channel + k[:, None] < channels
            channel += start
        dy, dx = seen_from(tap, first_tap, box_width, origin_y, origin_x, tap_y, tap_x)
        if BOXES:
            a = x_map.load([first_image, first_y + dy, first_x + dx, channel]).reshape(M, K).T
            w = packed_map.load([tile * N, column])
        else:
            seen = lies_in(y[None, :] + dy, x[None, :] + dx, x_height, x_width) & real
            at = (dy.to(tl.int64) * x_width + dx) * (parts_read * channels) + channel
            a = tl.load(read + at, mask=seen, other=0.0)
            w = tl.load(weights + column)
        sums = product(w, a, sums, PRECISION)
    if other_map is not None:
        blocks = columns_of(other_channels, K) // K
        if not BOXES:
            read = other_map + (place_in(image, y, x, out_height, out_width) * other_channels)[None, :] + k[:, None]
        tl.assume(blocks > 0)
        for step in range(blocks):
            if BOXES:
                a = other_map.load([first_image, first_y, first_x, step * K]).reshape(M, K).T
                w = packed_map.load([tile * N, columns + step * K])
            else:
                real = (image < batch)[None, :] & (step * K + k < other_channels)[:, None]
                a = tl.load(read + step * K, mask=real, other=0.0)
                w = tl.load(weights + columns + step * K)
            sums = product(w, a, sums, PRECISION)
    image, y, x = pixels_of(block, out_height, out_width, across, down, IMAGES, HEIGHT, WIDTH)
    n = (tile * C + tl.arange(0, C))[:, None]
    inside = ((image < batch) & (y < out_height) & (x < out_width))[None, :] & (n < rows)
    first, pixel = 0, place_in(image, y, x, out_height, out_width)[None, :]
    if not BOXES:  # offsets within the block, which take half the registers
        first, pixel = block.to(tl.int64) * (M * rows), tl.arange(0, M)[None, :]
    at, image, place = pixel * rows + n, image.to(tl.int64)[None, :], (first_image, first_y, first_x, tile * C)
    if GATED:
        sums, valve = halves_of(sums)
        sums = add_biases(sums, image, n, inside, bias_rows, bias_ptr, condition_ptr, 0, 2 * rows)
        valve = add_biases(valve, image, n, inside, bias_rows, bias_ptr, condition_ptr, rows, 2 * rows)
        if KEEP == "valve":
            write(kept_map, first, valve, 0, at, inside, place, HEIGHT, WIDTH)
        if KEEP == "both":
            half = pixel * (2 * rows) + n
            write(kept_map, 2 * first, sums, 0, half, inside, place, HEIGHT, WIDTH)
            write(kept_map, 2 * first, valve, 1, half + rows, inside, place, HEIGHT, WIDTH)
        sums = gate(sums, valve, FAST)
    else:
        sums = add_biases(sums, image, n, inside, bias_rows, bias_ptr, condition_ptr, 0, rows)
        sums = tl.where(sums < least, least, sums)  # keeps NaN
    if residual_ptr is not None:
        sums += tl.load(residual_ptr + first + at, mask=inside & (n < residual_rows * OUT_UNIT), other=0.0).to(
            tl.float32
        )
    write(out_map, first, sums, 0, at, inside, place, HEIGHT, WIDTH)
