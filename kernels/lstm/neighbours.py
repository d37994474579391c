"""What a tile of the scans by tiles takes from its neighbours: weights times their states, or in the backward times the
gradients of their gates.

`sums_of_parts` reads weights and states a part after the other, on their way through shared memory while the part
before is multiplied. `sums_of_fragments` is for products of float32 on Hopper, where those of a part pass through
registers, which the parts of the other way do not fit. Each warp there reads its rows of the weights straight into the
registers that tensor cores take them from, and the states of CHUNK parts go to shared memory together, so that threads
wait for each other twice a chunk instead of twice a part.

Arguments that both share:

    states_ptr, channels    states, or gradients, of all pixels, contiguous, and how many a pixel has
    at         of the tile's pixels: offset in pixels, row, column in the order of the scan, whether there is such a
               pixel; and height and width of an image
    ROWS, M    of the sums: rows of weights, pixels
    K          channels of a part
    BACK       whether a neighbour is one that takes this pixel's state, or one whose state this pixel takes
"""

import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from fastgen.kernels.common import product


@triton.jit
def state_of(tap, at, TAPS: tl.constexpr, ROW_SCAN: tl.constexpr, REVERSE: tl.constexpr, BACK: tl.constexpr):
    """The neighbour of a tap: its offset in pixels, and whether it lies in the image."""
    pixel, row, column, active, height, width = at
    down = -1 if ROW_SCAN else tap - 1
    right = tap - TAPS // 2 if ROW_SCAN else -tap  # in the order of the scan
    if BACK:
        down, right = -down, -right
    inside = (row + down >= 0) & (row + down < height) & (column + right >= 0) & (column + right < width)
    return pixel + down * width + (-right if REVERSE else right), active & inside


@triton.jit
def load_states(states_ptr, channels, tap, k, at, TAPS: tl.constexpr, ROW_SCAN: tl.constexpr, REVERSE: tl.constexpr,
                BACK: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    near, seen = state_of(tap, at, TAPS, ROW_SCAN, REVERSE, BACK)
    of_pixel = states_ptr + near[:, None] * channels
    mask = seen[:, None] if WHOLE else seen[:, None] & (k < channels)[None, :]
    return tl.load(of_pixel + k[None, :], mask, other=0.0)


@triton.jit
def tap_of(first, other, COUNT: tl.constexpr, TAPS: tl.constexpr):
    """The tap of part first * COUNT + other, where taps count fastest, and the part's number of that neighbour."""
    if COUNT % TAPS == 0:  # the tap is known when this is compiled
        tap = other % TAPS
        number = first * (COUNT // TAPS) + other // TAPS
    else:
        tap = (first * COUNT + other) % TAPS
        number = (first * COUNT + other) // TAPS
    return tap, number


@triton.jit
def sums_of_parts(
    states_ptr, channels, at,
    weight_row,  # pointers to rows of weights (taps, channels)
    real,  # which rows there are
    M: tl.constexpr, K: tl.constexpr, TOGETHER: tl.constexpr, TAPS: tl.constexpr, ROW_SCAN: tl.constexpr,
    REVERSE: tl.constexpr, BACK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A part has TOGETHER times K channels, of one neighbour after the other."""
    sums = tl.zeros((weight_row.shape[0], M), tl.float32)
    for part in range(tl.cdiv(TAPS * tl.cdiv(channels, K), TOGETHER)):
        for other in tl.static_range(TOGETHER):
            tap, number = tap_of(part, other, TOGETHER, TAPS)  # at last one of channels that do not exist
            k = number * K + tl.arange(0, K)
            states = load_states(states_ptr, channels, tap, k, at, TAPS, ROW_SCAN, REVERSE, BACK, False)
            weights = weight_row[:, None] + (tap * channels + k)[None, :]
            weights = tl.load(weights, real[:, None] & (k < channels)[None, :], other=0.0)
            sums = product(weights, tl.trans(states), sums, PRECISION)
    return sums


@triton.jit
def split(x, PRECISION: tl.constexpr):
    """x as a sum of two numbers of TF32; for other precisions x itself, twice."""
    large, small = x, x
    if PRECISION == "tf32x3":
        large = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        small = x - large
    return large, small


@triton.jit
def product_of_split(a, b, sums, PRECISION: tl.constexpr):
    """Of what `split` has given: of the four products, that of the two small ones is lost beside the others."""
    if PRECISION == "tf32x3":
        sums = tl.dot(a[1], b[0], sums, input_precision="tf32")
        sums = tl.dot(a[0], b[1], sums, input_precision="tf32")
        return tl.dot(a[0], b[0], sums, input_precision="tf32")
    return product(a[0], b[0], sums, PRECISION)


@triton.jit
def load_fragments(weights_at, ROWS: tl.constexpr, K: tl.constexpr, WARPS: tl.constexpr):
    """ROWS x K weights in the order of `in_fragments`: a thread reads 16 bytes of what it multiplies."""
    ACROSS: tl.constexpr = min(WARPS, ROWS // 16)
    numbers = tl.arange(0, ROWS * K // 128)[:, None] * 128 + tl.arange(0, 128)[None, :]
    parts = tl.reshape(tl.load(weights_at + numbers), (K // 8, ROWS // (16 * ACROSS), ACROSS, 8, 4, 2, 2))
    return tl.reshape(tl.permute(parts, (1, 2, 6, 3, 0, 5, 4)), (ROWS, K))


@triton.jit
def sums_of_fragments(
    states_ptr, channels, at,
    weights_at,  # those of the tile, in fragments
    ROWS: tl.constexpr, M: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, CHUNK: tl.constexpr,
    WHOLE: tl.constexpr, WARPS: tl.constexpr, TAPS: tl.constexpr, ROW_SCAN: tl.constexpr, REVERSE: tl.constexpr,
    BACK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """PARTS: of a neighbour. WHOLE: they have K channels each."""
    tl.static_assert(TAPS * PARTS % CHUNK == 0)
    sums = tl.zeros((ROWS, M), tl.float32)
    weights = load_fragments(weights_at, ROWS, K, WARPS)
    for chunk in range(TAPS * PARTS // CHUNK):
        states = ()
        for part in tl.static_range(CHUNK):
            tap, number = tap_of(chunk, part, CHUNK, TAPS)
            k = number * K + tl.arange(0, K)
            state = load_states(states_ptr, channels, tap, k, at, TAPS, ROW_SCAN, REVERSE, BACK, WHOLE)
            large, small = split(state, PRECISION)
            states = states + ((tl.trans(large), tl.trans(small)),)  # type: ignore[assignment]
        for part in tl.static_range(CHUNK):
            now = split(weights, PRECISION)
            # The next weights, at last once more the last, are on their way while these are multiplied.
            after = tl.minimum(chunk * CHUNK + part + 1, TAPS * PARTS - 1)
            weights = load_fragments(weights_at + after * (ROWS * K), ROWS, K, WARPS)
            sums = product_of_split(now, states[part], sums, PRECISION)
    return sums


def in_fragments(weight: Tensor, rows: int, parts: int, K: int, warps: int) -> Tensor:
    """Weights (units, gates, taps, channels), whose rows count units and the gates of each, for tiles of so many rows
    and parts of K channels, padded by zeros.

    Of a part each warp has 16 rows after the other, and of 8 of their columns a thread has those numbers behind each
    other that it multiplies: of two rows 8 apart, of two columns 4 apart (PTX ISA, matrix fragments of mma.m16n8k8 and
    wgmma.m64nNk8 with .tf32 types).
    """
    units, gates, taps, channels = weight.shape
    missing_units, missing_channels = -units % (rows // gates), parts * K - channels
    if missing_units or missing_channels:
        weight = F.pad(weight, (0, missing_channels, 0, 0, 0, 0, 0, missing_units))
    across = min(warps, rows // 16)
    # Tile, rows by warps, warp, half, row as unit and gate; tap, part, columns by 8, half, column.
    numbers = weight.view(-1, rows // (16 * across), across, 2, 8 // gates, gates, taps, parts, K // 8, 2, 4)
    return numbers.permute(0, 7, 6, 8, 1, 2, 4, 5, 10, 9, 3).contiguous()
