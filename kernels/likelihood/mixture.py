"""Negative log-likelihood under PixelCNN++'s discretized mixture of logistics, forward and backward.

Shapes: B images of C = 1 or 3 colours, N = H*W pixels, M components. At a pixel the parameters are M mixture logits,
then for each colour K groups of M: means, log-scales and, with K = 3 for RGB, coefficients (K = 2 for one channel).
In units of a level, with half = (levels - 1) / 2 and width = exp(-log_scale) / half, a level's bin has its ends at
a = (distance + 1/2) * width and b = (distance - 1/2) * width, distance = level - half * (1 + mean), and
    log p = logsigmoid(a) + logsigmoid(-b) + log(1 - exp(-width)),
without the last two terms for level 0 and without the first and last for the last level: the sum over levels is one.

A pixel belongs to a thread, which walks the components one after the other with a running maximum and sum, so that no
thread waits for another and no lane is padding. The forward keeps both sums, of the prior and of the joint, 16 bytes a
pixel; the backward then walks the components once more and writes their gradient: 12 bytes a float32 parameter.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels.catalogue_entry import Entry
from fastgen.kernels.common import cdiv, launch, tanh
from fastgen.kernels.likelihood.image import (
    DEVIATION_LIMIT,
    LOGIT_LIMIT,
    addresses,
    entry,
    image_offsets,
    saturate,
    store_nll,
    summed,
)

MIN_LOG_SCALE = tl.constexpr(-7.0)
PIXELS = 128  # of a program, one a thread


@triton.jit
def add_exponential(largest, total, x):
    """The running maximum and sum of exp(. - maximum), with x added; NaN stays."""
    shrunk = tl.exp(-tl.abs(x - largest))
    total = tl.where(x > largest, total * shrunk + 1.0, total + shrunk)
    return tl.where(x > largest, x, largest), total


@triton.jit
def wide(number):
    """In 64 bits; a Python int in the interpreter, where loops count in those."""
    return tl.zeros((), tl.int64) + number


@triton.jit
def load_group(at, group, to_group, inside):
    """A component's parameter of group number `group` at each pixel, in float32; `at` points to its logit."""
    return tl.load(at + group * to_group, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def bin_of(level, mean, log_scale, half, log_half):
    """One colour's level: log p as a sum and the logarithm of a factor in [0.15, 1], which all colours take together;
    a, b, width; and sigmoid(-a) and sigmoid(b), 0 where the bin has no such end."""
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
    one_a, one_b = 1.0 + shrunk_a, 1.0 + shrunk_b
    inverse = 1.0 / (one_a * one_b)
    beyond = tl.where(last, 0.0, tl.where(a > 0, shrunk_a, 1.0) * one_b * inverse)
    before = tl.where(first, 0.0, tl.where(b < 0, shrunk_b, 1.0) * one_a * inverse)
    # log(1 - exp(-width)); for wide scales log(width) + log((1 - exp(-width)) / width), which never underflows.
    q = width * width
    ratio = width * (-0.5 + width * (1 / 24 - q * (1 / 2880 - q * (1 / 181440 - q * (1 / 9676800)))))
    edge = first | last
    narrow = width > 1
    linear += tl.where(edge | narrow, 0.0, ratio - limited - log_half)
    share = tl.where(edge | (width <= 1), 1.0, 1.0 - tl.exp(-width))
    share *= inverse * tl.where(first, one_b, tl.where(last, one_a, 1.0))
    return linear, share, a, b, width, beyond, before


@triton.jit
def bin_width_slope(width):
    """width / (exp(width) - 1), the negative derivative of log(1 - exp(-width)) by the log-scale."""
    q = width * width
    series = 1 - 0.5 * width + q * (1 / 12 - q * (1 / 720 - q * (1 / 30240 - q * (1 / 1209600))))
    e = tl.exp(-width)
    return tl.where(width > 1, width * e / (1 - tl.where(width > 1, e, 0.0)), series)


@triton.jit
def colour(at, COLOUR: tl.constexpr, RGB: tl.constexpr, levels, to_group, half, log_half, inside):
    """`bin_of` one colour and component; the mean and the log-scale as stored, and the hyperbolic tangents of the one
    or two coefficients (zeros where there are none).

    The mean depends on the colours before (PixelCNN++ equation 3): r->g is coefficient 0, r->b 1 and g->b 2.
    """
    GROUP: tl.constexpr = 1 + (3 if RGB else 2) * COLOUR
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
    return bin_of(levels[COLOUR], mean, log_scale, half, log_half), raw, log_scale, c, d


@triton.jit
def joint_of(at, RGB: tl.constexpr, levels, to_group, half, log_half, inside):
    """A component's logit, that plus log p of its colours, and what `colour` gives of each."""
    logit = saturate(load_group(at, 0, to_group, inside), -LOGIT_LIMIT, LOGIT_LIMIT)
    red = colour(at, 0, RGB, levels, to_group, half, log_half, inside)
    green, blue = red, red
    joint, share = logit + red[0][0], red[0][1]
    if RGB:
        green = colour(at, 1, RGB, levels, to_group, half, log_half, inside)
        blue = colour(at, 2, RGB, levels, to_group, half, log_half, inside)
        joint = (joint + green[0][0]) + blue[0][0]
        share = (share * green[0][1]) * blue[0][1]
    return logit, joint + tl.log(share), (red, green, blue)


@triton.jit
def load_levels(target_at, target_colour, RGB: tl.constexpr, inside):
    red = tl.load(target_at, mask=inside, other=0).to(tl.float32)
    green, blue = red, red
    if RGB:
        green = tl.load(target_at + target_colour, mask=inside, other=0).to(tl.float32)
        blue = tl.load(target_at + 2 * target_colour, mask=inside, other=0).to(tl.float32)
    return red, green, blue


@triton.jit
def mixture_forward_kernel(
    params_ptr,  # (B, (1 + C * K) * M, N)
    target_ptr,  # integers (B, C, N)
    out_ptr,  # float32: partial sums (B, blocks), or the map (B, N)
    kept_ptr,  # float32 (B, 4, N) contiguous, written: maximum and one over the sum, of prior and joint; or None
    pixels,
    blocks,
    mixtures,
    half,
    log_half,
    n1,
    n2,
    params_batch,
    params_plane,
    params_0,
    params_1,
    params_2,
    target_batch,
    target_colour,
    target_0,
    target_1,
    target_2,
    out_batch,
    out_0,
    out_1,
    out_2,
    RGB: tl.constexpr,
    MAP: tl.constexpr,
    DENSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    pixel = block * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    params_at = params_ptr + image * params_batch + image_offsets(pixel, n1, n2, params_0, params_1, params_2, DENSE)
    target_at = target_ptr + image * target_batch + image_offsets(pixel, n1, n2, target_0, target_1, target_2, DENSE)
    levels = load_levels(target_at, target_colour, RGB, inside)
    of_prior = tl.full((BLOCK,), -float("inf"), tl.float32)
    of_joint = of_prior
    prior_total = tl.zeros((BLOCK,), tl.float32)
    joint_total = prior_total
    to_group = wide(mixtures) * params_plane
    for component in range(mixtures):
        at = params_at + wide(component) * params_plane
        logit, joint, _ = joint_of(at, RGB, levels, to_group, half, log_half, inside)
        of_prior, prior_total = add_exponential(of_prior, prior_total, logit)
        of_joint, joint_total = add_exponential(of_joint, joint_total, joint)
    nll = (of_prior - of_joint) + tl.log(prior_total / joint_total)
    if kept_ptr is not None:
        kept_at = kept_ptr + 4 * image * pixels + pixel
        tl.store(kept_at, of_prior, inside)
        tl.store(kept_at + pixels, 1 / prior_total, inside)
        tl.store(kept_at + 2 * pixels, of_joint, inside)
        tl.store(kept_at + 3 * pixels, 1 / joint_total, inside)
    store_nll(out_ptr, nll, inside, image, block, blocks, (out_batch, out_0, out_1, out_2), pixel, n1, n2, MAP, DENSE)


@triton.jit
def store_group(at, group, to_group, grad, inside):
    tl.store(at + group * to_group, grad.to(at.dtype.scalar.element_ty), inside)


@triton.jit
def store_colour(at, COLOUR: tl.constexpr, RGB: tl.constexpr, of, levels, pull, to_group, half, inside):
    """Gradients of what `colour` has read; of: what it gave; pull: the gradient of log p."""
    GROUP: tl.constexpr = 1 + (3 if RGB else 2) * COLOUR
    of_bin, raw, log_scale, c, d = of
    _, _, a, b, width, beyond, before = of_bin
    level = levels[COLOUR]
    grad_mean = pull * (half * width) * (before - beyond)
    kept = tl.where(tl.abs(raw) <= DEVIATION_LIMIT, grad_mean, 0.0)
    store_group(at, GROUP, to_group, kept, inside)
    edge = (level == 0) | (level == 2 * half)
    spread = b * before - a * beyond - tl.where(edge, 0.0, bin_width_slope(width))
    moves = (log_scale >= MIN_LOG_SCALE) & (log_scale <= LOGIT_LIMIT)
    store_group(at, GROUP + 1, to_group, tl.where(moves, pull * spread, 0.0), inside)
    if COLOUR > 0:
        slope = grad_mean * (levels[0] / half - 1) * (1 - c * c)
        store_group(at, 3 * COLOUR, to_group, slope, inside)
    if COLOUR > 1:
        slope = grad_mean * (levels[1] / half - 1) * (1 - d * d)
        store_group(at, 9, to_group, slope, inside)


@triton.jit
def mixture_backward_kernel(
    params_ptr,  # (B, (1 + C * K) * M, N)
    target_ptr,  # integers (B, C, N)
    upstream_ptr,  # float32 (B, N); strides 0 where it is one number an image
    grad_ptr,  # like params, every element is written
    kept_ptr,  # float32 (B, 4, N) contiguous, of the forward
    pixels,
    blocks,
    mixtures,
    half,
    log_half,
    n1,
    n2,
    params_batch,
    params_plane,
    params_0,
    params_1,
    params_2,
    target_batch,
    target_colour,
    target_0,
    target_1,
    target_2,
    upstream_batch,
    upstream_0,
    upstream_1,
    upstream_2,
    grad_batch,
    grad_plane,
    grad_0,
    grad_1,
    grad_2,
    RGB: tl.constexpr,
    DENSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = (tl.program_id(0) // blocks).to(tl.int64)
    pixel = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    params_at = params_ptr + image * params_batch + image_offsets(pixel, n1, n2, params_0, params_1, params_2, DENSE)
    target_at = target_ptr + image * target_batch + image_offsets(pixel, n1, n2, target_0, target_1, target_2, DENSE)
    upstream_offset = image_offsets(pixel, n1, n2, upstream_0, upstream_1, upstream_2, DENSE)
    grad_at = grad_ptr + image * grad_batch + image_offsets(pixel, n1, n2, grad_0, grad_1, grad_2, DENSE)
    upstream = tl.load(upstream_ptr + image * upstream_batch + upstream_offset, mask=inside, other=0.0)
    levels = load_levels(target_at, target_colour, RGB, inside)
    kept_at = kept_ptr + 4 * image * pixels + pixel
    of_prior = tl.load(kept_at, inside, other=0.0)
    prior_scale = tl.load(kept_at + pixels, inside, other=0.0)
    of_joint = tl.load(kept_at + 2 * pixels, inside, other=0.0)
    joint_scale = tl.load(kept_at + 3 * pixels, inside, other=0.0)
    to_group = wide(mixtures) * params_plane
    to_grad_group = wide(mixtures) * grad_plane
    for component in range(mixtures):
        at = params_at + wide(component) * params_plane
        to = grad_at + wide(component) * grad_plane
        logit, joint, colours = joint_of(at, RGB, levels, to_group, half, log_half, inside)
        # d nll / d logit = prior - posterior of the component; d nll / d log p = -posterior.
        below = joint - of_joint
        posterior = tl.exp(tl.where(below > 0, 0.0, below)) * joint_scale
        slope = tl.where(tl.abs(logit) == LOGIT_LIMIT, 0.0, tl.exp(logit - of_prior) * prior_scale - posterior)
        store_group(to, 0, to_grad_group, upstream * slope, inside)
        pull = -upstream * posterior
        store_colour(to, 0, RGB, colours[0], levels, pull, to_grad_group, half, inside)
        if RGB:
            store_colour(to, 1, RGB, colours[1], levels, pull, to_grad_group, half, inside)
            store_colour(to, 2, RGB, colours[2], levels, pull, to_grad_group, half, inside)


def sizes_of(params: Tensor, colours: int, levels: int) -> tuple[int, int, int, float, float]:
    """Pixels, blocks, components, half, log(half)."""
    pixels, half = params.shape[2] * params.shape[3], (levels - 1) / 2
    return pixels, cdiv(pixels, PIXELS), params.shape[1] // (10 if colours == 3 else 3), half, math.log(half)


def forward(params: Tensor, target: Tensor, levels: int, per_element: bool, save: bool) -> tuple[Tensor, Tensor | None]:
    """Nats: (B,), or the map (B, 1, H, W); and what the backward needs, with `save`.

    params (B, 10*M or 3*M, H, W), integer target (B, C, H, W), any strides.
    """
    batch, colours, height, width = target.shape
    device = params.device
    out_shape = (batch, 1, height, width)
    kept = torch.empty(batch, 4, height, width, dtype=torch.float32, device=device) if save else None
    if target.numel() == 0:
        return torch.zeros(out_shape if per_element else (batch,), dtype=torch.float32, device=device), kept
    pixels, blocks, *_ = sizes = sizes_of(params, colours, levels)
    out = torch.empty(out_shape if per_element else (batch, blocks), dtype=torch.float32, device=device)
    out_strides = (pixels, width, 1) if per_element else (0, 0, 0)
    (dense, _), inner, strides = addresses((height, width), params.stride(), target.stride(), out_strides)
    constants = {"RGB": colours == 3, "MAP": per_element, "DENSE": dense, "BLOCK": PIXELS, "num_warps": 4}
    launch(mixture_forward_kernel, (batch * blocks,), (params, target, out, kept, *sizes, *inner, *strides), constants)
    return summed(out, per_element), kept


def backward(params: Tensor, target: Tensor, upstream: Tensor, kept: Tensor, grad: Tensor, levels: int) -> None:
    """Writes the gradient of params into grad, of the same shape; upstream float32, expanded to (B, 1, H, W)."""
    batch, colours, height, width = target.shape
    if target.numel() == 0:
        return
    sizes = sizes_of(params, colours, levels)
    tensors = (params, target, upstream.select(1, 0), grad)
    (dense, _), inner, strides = addresses((height, width), *(tensor.stride() for tensor in tensors))
    constants = {"RGB": colours == 3, "DENSE": dense, "BLOCK": PIXELS, "num_warps": 4}
    launch(mixture_backward_kernel, (batch * sizes[1],), (*tensors, kept, *sizes, *inner, *strides), constants)


_INNER, _INNER_GRAD = ("params_2", "target_2"), ("params_2", "target_2", "grad_2")
_PLANE, _PLANE_GRAD = ("params_plane",), ("params_plane", "grad_plane")
_RGB, _GREY = ({"RGB": rgb, "DENSE": True, "BLOCK": PIXELS} for rgb in (True, False))
_LAST = {"RGB": True, "DENSE": False, "BLOCK": PIXELS}
CATALOGUE: list[Entry] = [
    entry(mixture_forward_kernel, "fp32", "fp32", "u8", _INNER, {**_RGB, "MAP": False}),
    entry(mixture_forward_kernel, "map, channels last", "bf16", "i64", _PLANE, {**_LAST, "MAP": True}),
    entry(mixture_forward_kernel, "one channel", "fp32", "u8", _INNER, {**_GREY, "MAP": False}, multiples=False),
    entry(mixture_backward_kernel, "fp32", "fp32", "u8", _INNER_GRAD, _RGB),
    entry(mixture_backward_kernel, "bf16", "bf16", "u8", _INNER_GRAD, _RGB),
    entry(mixture_backward_kernel, "channels last", "bf16", "i64", _PLANE_GRAD, _LAST),
    entry(mixture_backward_kernel, "one channel", "fp32", "u8", _INNER_GRAD, _GREY, multiples=False),
]
