"""Draws of a place by inverse CDF, as `fastgen.distributions` defines them: in float64, or in float32 (`REAL`)."""

import triton
import triton.language as tl

from fastgen.kernels.likelihood import limits
from fastgen.kernels.sampler.words import (
    BERNOULLI,
    CHANNELS,
    DRAWN_AT,
    DRAWN_CHANNEL,
    DRAWN_IMAGE,
    FIRST_CHANNEL,
    HAS_KNOWN,
    KIND,
    KNOWN_AT,
    KNOWN_CHANNEL,
    KNOWN_IMAGE,
    LEVELS,
    MASK_AT,
    MASK_CHANNEL,
    MASK_IMAGE,
    MIXTURE,
    NOISE_AT,
    NOISE_CHANNEL,
    NOISE_IMAGE,
    PARAMETERS,
    PARAMS_AT,
    PARAMS_CHANNEL,
    PARAMS_IMAGE,
    PARAMS_LEVEL,
    TEMPERATURE,
    TOP_K,
    TOP_P,
)

MIN_LOG_SCALE = tl.constexpr(limits.MIN_LOG_SCALE)
# 1.5 * 2^52, 1.5 * 2^23: x + it - it is x rounded to an integer, half to even.
ROUNDS_FLOAT64, ROUNDS_FLOAT32 = map(tl.constexpr, (6755399441055744.0, 12582912.0))


@triton.jit
def among_the_most_probable(shares, params, step, count, best, scale, free, top_k, top_p, REAL: tl.constexpr):
    """Whether a share is one of the top_k greatest of its row, and of these one of the fewest that together have top_p
    of their sum."""
    v = tl.arange(0, shares.shape[1])
    rank = tl.zeros(shares.shape, tl.int32)
    before = tl.zeros(shares.shape, REAL)  # the sum of all that are more probable
    for j in range(0, count):
        other = tl.load(params + j * step, mask=free, other=float("-inf")).to(REAL)
        share = tl.exp((other - best) * scale)[:, None]
        ahead = (share > shares) | ((share == shares) & (j < v)[None, :])
        rank += ahead.to(tl.int32)
        before += tl.where(ahead, share, 0.0)
    shares = tl.where(rank < top_k, shares, 0.0)
    return (shares > 0) & (before < (top_p * tl.sum(shares, 1))[:, None])


@triton.jit
def choose(params, step, count, u, temperature, free, top_k, top_p, BLOCK: tl.constexpr, REAL: tl.constexpr):
    """The first of `count` logits of each row (`step` apart) whose cumulative probability exceeds u; at temperature 0
    the greatest; where top_k is not 0, of up to BLOCK logits, among the most probable. params: pointers (rows,)."""
    v = tl.arange(0, BLOCK)
    minus_infinity = float("-inf")
    greatest = tl.full((u.shape[0], BLOCK), minus_infinity, tl.float32)
    for start in range(0, count, BLOCK):
        real = free[:, None] & (start + v < count)[None, :]
        logits = tl.load(params[:, None] + ((start + v) * step)[None, :], mask=real, other=minus_infinity)
        greatest = tl.maximum(greatest, logits)
    best = tl.where(free, tl.max(greatest, 1), 0.0).to(REAL)
    scale = 1 / tl.where(temperature == 0, 1.0, temperature)
    threshold, before = tl.zeros(u.shape, REAL), tl.zeros(u.shape, REAL)
    found, likely = tl.zeros((u.shape[0], BLOCK), tl.int32), tl.zeros((u.shape[0], BLOCK), tl.int32)
    for _ in range(0, 2):  # for the sum of all; for the level
        threshold = u * before
        before = tl.zeros(u.shape, REAL)
        found = tl.zeros((u.shape[0], BLOCK), tl.int32) + count
        for start in range(0, count, BLOCK):
            real = free[:, None] & (start + v < count)[None, :]
            logits = tl.load(params[:, None] + ((start + v) * step)[None, :], mask=real, other=minus_infinity)
            logits = logits.to(REAL)
            shares = tl.exp((logits - best[:, None]) * scale)
            if top_k > 0:
                kept = among_the_most_probable(shares, params, step, count, best, scale, free, top_k, top_p, REAL)
                shares = tl.where(kept, shares, 0.0)
            sums = before[:, None] + tl.cumsum(shares, 1)
            # Sums are rounded in no fixed order: of two equal ones the latter may be greater.
            hit = (sums > threshold[:, None]) & (shares > 0)
            hit = tl.where(temperature == 0, logits == best[:, None], hit)
            found = tl.where(hit, tl.minimum(found, (start + v)[None, :]), found)
            likely = tl.where(shares > 0, (start + v)[None, :], likely)
            before = tl.max(sums, 1)
    level = tl.min(found, 1)
    return tl.where(level == count, tl.max(likely, 1), level)  # where the last sum was rounded to less than its share


@triton.jit
def has_nan(params, step, count, free, BLOCK: tl.constexpr):
    v = tl.arange(0, BLOCK)
    found = tl.zeros((free.shape[0], BLOCK), tl.int32)
    for start in range(0, count, BLOCK):
        real = free[:, None] & (start + v < count)[None, :]
        x = tl.load(params[:, None] + ((start + v) * step)[None, :], mask=real, other=0.0)
        found |= (x != x).to(tl.int32)
    return tl.max(tl.max(found, 1), 0) > 0


@triton.jit
def hyperbolic_tangent(x):
    shrunk = tl.exp(-2 * tl.abs(x))
    size = (1 - shrunk) / (1 + shrunk)
    return tl.where(x < 0, -size, size)


@triton.jit
def of_component(params, step, mixtures, kinds, component, colour, kind, free, REAL: tl.constexpr):
    at = mixtures + (colour * kinds + kind) * mixtures + component
    return tl.load(params + at * step, mask=free, other=0.0).to(REAL)


@triton.jit
def mixture_level(params, step, draws, component, channel, u, temperature, drawn, free, REAL: tl.constexpr):
    """Of a logistic of the mixture. Parameters of a pixel: logits, then means, log-scales (and, for colours,
    coefficients) of each channel. drawn: pointers to the levels of the pixel."""
    m = tl.load(draws + LEVELS)
    kinds = tl.where(tl.load(draws + PARAMETERS) == 10 * m, 3, 2)
    x = of_component(params, step, m, kinds, component, channel, 0, free, REAL)
    for earlier in range(0, tl.where(kinds == 3, channel, 0)):  # green has a coefficient of red; blue of both
        level = tl.load(drawn + earlier * tl.load(draws + DRAWN_CHANNEL), mask=free, other=0).to(REAL) / 127.5 - 1
        coefficient = of_component(params, step, m, kinds, component, channel - 1 + earlier, 2, free, REAL)
        x += hyperbolic_tangent(coefficient) * level
    if temperature > 0:
        log_scale = of_component(params, step, m, kinds, component, channel, 1, free, REAL)
        scale = tl.exp(tl.maximum(log_scale, MIN_LOG_SCALE)) * temperature
        x += scale * (tl.log(u) - tl.log(1 - u))
    x = (tl.minimum(tl.maximum(x, -1.0), 1.0) + 1) * 127.5
    rounds: tl.constexpr = ROUNDS_FLOAT64 if tl.float64 == REAL else ROUNDS_FLOAT32
    x = (x + rounds) - rounds
    return tl.where(x == x, x, 0.0).to(tl.int32)


@triton.jit
def draw(arenas, request, place, share, ROWS: tl.constexpr, BLOCK: tl.constexpr, REAL: tl.constexpr):
    """The levels of a place, channel after channel; `bad` where a parameter of a level that is not known is NaN.

    Args:
        request: (draws_ptr, noise_ptr, known_ptr, mask_ptr, bad_ptr), see `machine`.
        place: where its words begin.
        share: as of an instruction, whose tiles are ROWS images.
    """
    memory_ptr, integers_ptr, _, _ = arenas
    draws, noise_ptr, known_ptr, mask_ptr, bad_ptr = request
    _, first_image, images, first_tile, apart = share
    kind, step, top_k = tl.load(draws + KIND), tl.load(draws + PARAMS_LEVEL), tl.load(draws + TOP_K)
    temperature = tl.load(draws + TEMPERATURE).to(tl.float64, bitcast=True).to(REAL)
    top_p = tl.load(draws + TOP_P).to(tl.float64, bitcast=True).to(REAL)
    count, parameters = tl.load(draws + LEVELS).to(tl.int32), tl.load(draws + PARAMETERS).to(tl.int32)
    of_pixel = kind == MIXTURE  # parameters, of all channels together
    has_known, to_channel = tl.load(draws + HAS_KNOWN) != 0, tl.load(draws + NOISE_CHANNEL)
    first = tl.load(place + FIRST_CHANNEL).to(tl.int32)
    for channel in range(first, first + tl.load(draws + CHANNELS).to(tl.int32)):
        tl.debug_barrier()  # the levels of the channels before are there
        for begin in range(first_tile * ROWS, images, apart * ROWS):
            image = begin + tl.arange(0, ROWS)
            real = image < images
            image = (first_image + tl.where(real, image, 0)).to(tl.int64)
            free = real
            if has_known:
                at = tl.load(place + MASK_AT) + image * tl.load(draws + MASK_IMAGE)
                mask = tl.load(mask_ptr + at + channel * tl.load(draws + MASK_CHANNEL), mask=real, other=0)
                free = real & (mask == 0)
            at = tl.load(place + PARAMS_AT) + image * tl.load(draws + PARAMS_IMAGE)
            params = memory_ptr + at + tl.where(of_pixel, 0, channel) * tl.load(draws + PARAMS_CHANNEL)
            noise = noise_ptr + tl.load(place + NOISE_AT) + image * tl.load(draws + NOISE_IMAGE)
            u = tl.load(noise + tl.where(of_pixel, 0, channel) * to_channel, mask=free, other=0.0).to(REAL)
            drawn = integers_ptr + tl.load(place + DRAWN_AT) + image * tl.load(draws + DRAWN_IMAGE)
            if has_nan(params, step, parameters, free, BLOCK):
                tl.store(bad_ptr, 1)
            if kind == BERNOULLI:
                logit = tl.load(params, mask=free, other=0.0).to(REAL)
                warmth = tl.where(temperature == 0, 1.0, temperature)
                level = tl.where(temperature == 0, logit > 0, u >= 1 / (1 + tl.exp(logit / warmth))).to(tl.int32)
            else:
                level = choose(params, step, count, u, temperature, free, top_k, top_p, BLOCK, REAL)
                if kind == MIXTURE:
                    own = tl.load(noise + (channel + 1) * to_channel, mask=free, other=0.5).to(REAL)
                    level = mixture_level(params, step, draws, level, channel, own, temperature, drawn, free, REAL)
            level = level.to(tl.int64)
            if has_known:
                at = tl.load(place + KNOWN_AT) + image * tl.load(draws + KNOWN_IMAGE)
                known = tl.load(known_ptr + at + channel * tl.load(draws + KNOWN_CHANNEL), mask=real, other=0)
                level = tl.where(free, level, known)
            tl.store(drawn + channel * tl.load(draws + DRAWN_CHANNEL), level, mask=real)
