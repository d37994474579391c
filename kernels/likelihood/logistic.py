"""One component of a mixture of logistics at a pixel: log p of its colours, and the gradients of its parameters.

In units of a level, with half = (levels - 1) / 2 and width = exp(-log_scale) / half, a level's bin has its ends at
a = (distance + 1/2) * width and b = (distance - 1/2) * width, distance = level - half * (1 + mean), and
    log p = logsigmoid(a) + logsigmoid(-b) + log(1 - exp(-width)),
without the last two terms for level 0 and without the first and last for the last level: the sum over levels is one.
"""

import triton
import triton.language as tl

from fastgen.kernels.common import tanh
from fastgen.kernels.likelihood import limits
from fastgen.kernels.likelihood.image import DEVIATION_LIMIT, LOGIT_LIMIT, saturate

MIN_LOG_SCALE = tl.constexpr(limits.MIN_LOG_SCALE)


@triton.jit
def load_group(at, group, to_group, inside):
    """A component's parameter of group number `group` at each pixel, in float32; `at` points to its logit."""
    return tl.load(at + group * to_group, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def bin_of(level, mean, log_scale, half, log_half):
    """The bin of one colour's level: log p without its factor, and that factor in [0.15, 1], so that all colours share
    one logarithm; a, b, width; sigmoid(-a) and sigmoid(b), 0 where the bin has no such end."""
    limited = saturate(log_scale, MIN_LOG_SCALE, LOGIT_LIMIT)
    width = tl.exp(-limited) * (1 / half)
    # half * mean = (half + 1/2) * mean - mean / 2 in two steps: the first is exact for 256 levels, so that the digits
    # of the distance survive where level and mean are close.
    distance = ((level - half) - (half + 0.5) * mean) + 0.5 * mean
    a = (distance + 0.5) * width
    b = (distance - 0.5) * width
    first, last = level == 0, level == 2 * half
    # logsigmoid(x) = min(x, 0) - log(1 + exp(-|x|)), with (x - |x|) / 2 for the minimum, which keeps NaN.
    size_a, size_b = tl.abs(a), tl.abs(b)
    shrunk_a, shrunk_b = tl.exp(-size_a), tl.exp(-size_b)
    linear = tl.where(last, 0.0, 0.5 * (a - size_a)) - tl.where(first, 0.0, 0.5 * (b + size_b))
    plus_a, plus_b = 1.0 + shrunk_a, 1.0 + shrunk_b
    inverse = 1.0 / (plus_a * plus_b)
    beyond = tl.where(last, 0.0, tl.where(a > 0, shrunk_a, 1.0) * plus_b * inverse)
    before = tl.where(first, 0.0, tl.where(b < 0, shrunk_b, 1.0) * plus_a * inverse)
    # log(1 - exp(-width)); for wide scales log(width) + log((1 - exp(-width)) / width), which never underflows.
    q = width * width
    ratio = width * (-0.5 + width * (1 / 24 - q * (1 / 2880 - q * (1 / 181440 - q * (1 / 9676800)))))
    edge = first | last
    narrow = width > 1
    linear += tl.where(edge | narrow, 0.0, ratio - limited - log_half)
    share = tl.where(edge | (width <= 1), 1.0, 1.0 - tl.exp(-width))
    share *= inverse * tl.where(first, plus_b, tl.where(last, plus_a, 1.0))
    return linear, share, a, b, width, beyond, before


@triton.jit
def bin_width_slope(width):
    """width / (exp(width) - 1), the negative derivative of log(1 - exp(-width)) by the log-scale."""
    q = width * width
    series = 1 - 0.5 * width + q * (1 / 12 - q * (1 / 720 - q * (1 / 30240 - q * (1 / 1209600))))
    e = tl.exp(-width)
    return tl.where(width > 1, width * e / (1 - tl.where(width > 1, e, 0.0)), series)


@triton.jit
def load_colour(at, COLOUR: tl.constexpr, RGB: tl.constexpr, levels, to_group, half, log_half, inside):
    """What a component says of one colour: log p without its factor, and that factor, of `bin_of`; the derivatives of
    log p by the mean, the log-scale and the coefficients by which earlier colours move the mean (0 where there are
    none). Derivatives are few: kept until the pixel's posterior is known, what they are computed from would spill.

    PixelCNN++ equation 3: red moves green by coefficient 0 and blue by 1, green moves blue by 2.
    """
    GROUP: tl.constexpr = 1 + (3 if RGB else 2) * COLOUR
    level = levels[COLOUR]
    raw = load_group(at, GROUP, to_group, inside)
    log_scale = load_group(at, GROUP + 1, to_group, inside)
    mean = saturate(raw, -DEVIATION_LIMIT, DEVIATION_LIMIT)
    c, d = 0.0, 0.0
    if COLOUR > 0:
        c = tanh(load_group(at, 3 * COLOUR, to_group, inside))
        mean += c * (levels[0] / half - 1)
    if COLOUR > 1:
        d = tanh(load_group(at, 9, to_group, inside))
        mean += d * (levels[1] / half - 1)
    linear, share, a, b, width, beyond, before = bin_of(level, mean, log_scale, half, log_half)
    by_mean = (half * width) * (before - beyond)
    edge = (level == 0) | (level == 2 * half)
    spread = b * before - a * beyond - tl.where(edge, 0.0, bin_width_slope(width))
    by_scale = tl.where((log_scale >= MIN_LOG_SCALE) & (log_scale <= LOGIT_LIMIT), spread, 0.0)
    by_c, by_d = 0.0, 0.0
    if COLOUR > 0:
        by_c = by_mean * (levels[0] / half - 1) * (1 - c * c)
    if COLOUR > 1:
        by_d = by_mean * (levels[1] / half - 1) * (1 - d * d)
    by_mean = tl.where(tl.abs(raw) <= DEVIATION_LIMIT, by_mean, 0.0)
    return linear, share, (by_mean, by_scale, by_c, by_d)


@triton.jit
def load_component(at, RGB: tl.constexpr, levels, to_group, half, log_half, inside):
    """A component's logit, that plus log p of the pixel's colours, and the derivatives of each colour's log p."""
    logit = saturate(load_group(at, 0, to_group, inside), -LOGIT_LIMIT, LOGIT_LIMIT)
    red = load_colour(at, 0, RGB, levels, to_group, half, log_half, inside)
    green, blue = red, red
    joint, share = logit + red[0], red[1]
    if RGB:
        green = load_colour(at, 1, RGB, levels, to_group, half, log_half, inside)
        blue = load_colour(at, 2, RGB, levels, to_group, half, log_half, inside)
        joint = (joint + green[0]) + blue[0]
        share = (share * green[1]) * blue[1]
    return logit, joint + tl.log(share), (red[2], green[2], blue[2])


@triton.jit
def store_group(at, group, to_group, grad, inside):
    tl.store(at + group * to_group, grad.to(at.dtype.scalar.element_ty), inside)


@triton.jit
def store_colour(at, COLOUR: tl.constexpr, RGB: tl.constexpr, derivatives, pull, to_group, inside):
    """Gradients of what `load_colour` has read, of the derivatives that it gave and the gradient of log p, `pull`."""
    GROUP: tl.constexpr = 1 + (3 if RGB else 2) * COLOUR
    store_group(at, GROUP, to_group, pull * derivatives[0], inside)
    store_group(at, GROUP + 1, to_group, pull * derivatives[1], inside)
    if COLOUR > 0:
        store_group(at, 3 * COLOUR, to_group, pull * derivatives[2], inside)
    if COLOUR > 1:
        store_group(at, 9, to_group, pull * derivatives[3], inside)
