"""Formulas of a diagonal Gaussian in float32: its standard deviation, its KL from N(0, 1), standard normal noise."""

import triton
import triton.language as tl

MIN_LOGVAR = tl.constexpr(-100.0)
MAX_LOGVAR = tl.constexpr(80.0)


@triton.jit
def exp_of_half(x):
    """exp(x / 2) for x in [-174, 176] to 2 units in the last place: `tl.exp` alone loses 5e-6 at x = 160 on a GPU."""
    shifted = x * 0.7213475204444817 + 12583039.0  # 2^23 + 2^22 + 127: rounds, and leaves n + 127 in the last bits
    n = shifted - 12583039.0
    r = (x - n * 1.38629150390625) - n * 2.857213640618834e-06  # x - n * 2 ln 2, the first product exact
    power = (shifted.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)  # 2^n
    return tl.exp2(r * 0.7213475204444817) * power


@triton.jit
def expm1_minus(x, root):
    """exp(x) - 1 - x for x in [-100, 80], never negative, without cancellation near 0: Taylor series within 1 of it.

    root: exp(x / 2). Where its square leaves the normal floats, it is lost beside 1.
    """
    series = 1.0 / 3628800
    series = series * x + 1.0 / 362880
    series = series * x + 1.0 / 40320
    series = series * x + 1.0 / 5040
    series = series * x + 1.0 / 720
    series = series * x + 1.0 / 120
    series = series * x + 1.0 / 24
    series = series * x + 1.0 / 6
    series = series * x + 0.5
    return tl.where(tl.abs(x) < 1.0, series * x * x, root * root - 1.0 - x)


@triton.jit
def limited(v):
    """The log-variance limited to its range, and how far it lies below it (negative); NaN stays."""
    above = tl.maximum(v, MIN_LOGVAR, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(above, MAX_LOGVAR, propagate_nan=tl.PropagateNan.ALL), v - above


@triton.jit
def twice_kl(m, below, excess):
    """exp(clip(v)) - 1 - min(v, 80) + m^2, twice the nats; excess: `expm1_minus` of the clipped v.

    The linear term alone goes on below the range.
    """
    return excess - below + m * m


@triton.jit
def radius_of(word):
    """sqrt(-2 log u) of a random 32-bit word, u = (word + 1/2) / 2^32: at most 6.8."""
    uniform = word.to(tl.uint32, bitcast=True).to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    # u = 2^k * (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)), and -2 log(1 + f) / f as a polynomial, to 2e-7 of it.
    bits = uniform.to(tl.int32, bitcast=True)
    k = (bits - 0x3F3504F3) >> 23
    f = (bits - (k << 23)).to(tl.float32, bitcast=True) - 1.0
    series = 0.20268139 * f - 0.32468414
    series = series * f + 0.34494033
    series = series * f - 0.39797127
    series = series * f + 0.49940142
    series = series * f - 0.66670227
    series = series * f + 1.0000073
    series = series * f - 1.9999999
    return tl.sqrt(series * f - 1.3862943611198906 * k.to(tl.float32))


@triton.jit
def box_muller(word0, word1):
    """Two independent standard normals from two random 32-bit words (Box & Muller 1958), at most 6.8 in size.

    The angle is one of four quarter turns plus one in [-pi/4, pi/4), where short series reach float32 precision; the
    library's cosine would bring a slow path for huge angles that spills registers.
    """
    radius = radius_of(word0)
    turn = word1.to(tl.int32, bitcast=True)
    angle = turn.to(tl.float32) * 3.657291918165171e-10  # pi / 4 / 2^31
    q = angle * angle
    cosine = 1.0 + q * (-1 / 2 + q * (1 / 24 + q * (-1 / 720 + q * (1 / 40320))))
    sine = angle * (1.0 + q * (-1 / 6 + q * (1 / 120 + q * (-1 / 5040 + q * (1 / 362880)))))
    swap = (turn & 1) == 1
    sign = tl.where((turn & 2) == 2, -radius, radius)
    return sign * tl.where(swap, -sine, cosine), sign * tl.where(swap, cosine, sine)


@triton.jit
def normal_of_counter(seed, counter):
    """Four standard normals of each Philox counter (ROWS, OUT, N), side by side: (ROWS, OUT, 4N).

    Seven rounds of Philox are the fewest that pass BigCrush (Salmon et al. 2011, table 2).
    """
    word0, word1, word2, word3 = tl.randint4x(seed, counter, n_rounds=7)
    n0, n1 = box_muller(word0, word1)
    n2, n3 = box_muller(word2, word3)
    fours = tl.join(tl.join(n0, n2), tl.join(n1, n3))
    return tl.reshape(fours, (counter.shape[0], counter.shape[1], counter.shape[2] * 4))
