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
def expm1_and_excess(x, linear, root):
    """exp(x) - 1 and exp(x) - 1 - linear for x in [-100, 80], without cancellation near 0; the latter never negative.

    linear: x, but below the range the number that x is limited from. root: exp(x / 2). Where its square leaves the
    normal floats, it is lost beside 1. Within 1 of 0 (exp(x) - 1 - x) / x^2 is a polynomial, to 9e-8 of it.
    """
    series = 2.4960811e-05 * x + 2.0325484e-04
    series = series * x + 1.3891335e-03
    series = series * x + 8.3309300e-03
    series = series * x + 4.1666515e-02
    series = series * x + 1.6666695e-01
    series = (series * x + 0.5) * x
    near = tl.abs(x) < 1.0
    expm1 = root * root - 1.0
    return tl.where(near, series * x + x, expm1), tl.where(near, series * x, expm1 - linear)


@triton.jit
def limited(v):
    """The log-variance limited to its range, and from above alone; NaN stays."""
    linear = tl.minimum(v, MAX_LOGVAR, propagate_nan=tl.PropagateNan.ALL)
    return tl.maximum(linear, MIN_LOGVAR, propagate_nan=tl.PropagateNan.ALL), linear


@triton.jit
def radius_of(word):
    """sqrt(-2 log u) of a random 32-bit word, u = (word + 1/2) / 2^32: at most 6.8."""
    uniform = word.to(tl.uint32, bitcast=True).to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    # u = (1 + f) / 2^k with 1 + f in [sqrt(1/2), sqrt(2)), and -2 log(1 + f) / f as a polynomial, to 1e-6 of it.
    bits = uniform.to(tl.int32, bitcast=True)
    k = (0x3FB504F2 - bits) >> 23
    f = (bits + (k << 23)).to(tl.float32, bitcast=True) - 1.0
    series = 0.37335700 - 0.23792190 * f
    series = series * f - 0.40992662
    series = series * f + 0.49819490
    series = series * f - 0.66629016
    series = series * f + 1.0000223
    series = series * f - 2.0000019
    return tl.sqrt(k.to(tl.float32) * 1.3862943611198906 + series * f)


@triton.jit
def box_muller(word0, word1):
    """Two independent standard normals from two random 32-bit words (Box & Muller 1958), at most 6.8 in size.

    Cosine and sine of a half turn times x, x in [-1, 1], are polynomials, to 8e-7 and 1e-7: the library's cosine would
    bring a slow path for huge angles that spills registers.
    """
    radius = radius_of(word0)
    x = word1.to(tl.int32, bitcast=True).to(tl.float32) * 4.656612873077393e-10  # 2^-31
    q = x * x
    cosine = 0.2296642 - 0.020582795 * q
    cosine = cosine * q - 1.3323812
    cosine = cosine * q + 4.0580454
    cosine = cosine * q - 4.9347458
    cosine = cosine * q + 0.9999992
    sine = 0.080479287 - 0.0059918272 * q
    sine = sine * q - 0.59828204
    sine = sine * q + 2.5498807
    sine = sine * q - 5.1676779
    sine = sine * q + 3.1415913
    return radius * cosine, radius * x * sine


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
