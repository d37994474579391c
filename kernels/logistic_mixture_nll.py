"""Negative log-likelihood under PixelCNN++'s discretized mixture of logistics, forward and backward.

Shapes: B images of C = 1 or 3 colours, N = H*W pixels, M components. At a pixel the parameters are M mixture logits,
then for each colour K groups of M: means, log-scales and, with K = 3 for RGB, coefficients (K = 2 for one channel).
In units of a level, with half = (levels - 1) / 2 and width = exp(-log_scale) / half, a level's bin has its ends at
a = (distance + 1/2) * width and b = (distance - 1/2) * width, distance = level - half * (1 + mean), and
    log p = logsigmoid(a) + logsigmoid(-b) + log(1 - exp(-width)),
without the last two terms for level 0 and without the first and last for the last level: the sum over levels is one.

A program holds a tile of pixels by components. The forward reads each parameter once and writes one partial sum a
block; the backward reads them once more (some a second time, from cache) and writes their gradient: 12 bytes a float32
parameter.
"""

import math
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels.catalogue_entry import Entry
from fastgen.kernels.reconstruction_nll import (
    DEVIATION_LIMIT,
    LOGIT_LIMIT,
    collapse,
    entry,
    image_offsets,
    log1p_series,
    saturate,
)

MIN_LOG_SCALE = tl.constexpr(-7.0)


# --- device functions


@triton.jit
def tanh(x):
    """Without libdevice; the odd series near 0, where the quotient would cancel."""
    e = tl.exp(-2 * tl.abs(x))
    quotient = (1 - e) / (1 + e)
    q = x * x
    series = x * (1 - q * (1 / 3 - q * (2 / 15 - q * (17 / 315 - q * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -quotient, quotient))


@triton.jit
def logsigmoid(x):
    size = tl.abs(x)
    return 0.5 * (x - size) - log1p_series(tl.exp(-size))  # min(x, 0) as (x - |x|) / 2 keeps NaN


@triton.jit
def log_bin_width(width, log_scale, log_half):
    """log(1 - exp(-width)); for wide scales log(width) + log((1 - exp(-width)) / width), which never underflows."""
    q = width * width
    ratio = width * (-0.5 + width * (1 / 24 - q * (1 / 2880 - q * (1 / 181440 - q * (1 / 9676800)))))
    return tl.where(width > 1, log1p_series(-tl.exp(-tl.maximum(width, 1.0))), ratio - log_scale - log_half)


@triton.jit
def bin_width_slope(width):
    """width / (exp(width) - 1), the negative derivative of log_bin_width by log_scale."""
    q = width * width
    series = 1 - 0.5 * width + q * (1 / 12 - q * (1 / 720 - q * (1 / 30240 - q * (1 / 1209600))))
    e = tl.exp(-width)
    return tl.where(width > 1, width * e / (1 - tl.where(width > 1, e, 0.0)), series)


@triton.jit
def load_group(params_at, group, component, params_plane, mixtures, valid):
    """Group number `group` of M parameters at each pixel: a tile [BLOCK, BLOCK_M] in float32."""
    plane = (group * mixtures + component).to(tl.int64) * params_plane
    return tl.load(params_at[:, None] + plane[None, :], mask=valid, other=0.0).to(tl.float32)


@triton.jit
def load_mixture_logits(params_at, component, params_plane, mixtures, valid):
    """The logits, limited, and the same less the largest of the pixel; -inf beyond the last component."""
    logits = saturate(load_group(params_at, 0, component, params_plane, mixtures, valid), -LOGIT_LIMIT, LOGIT_LIMIT)
    shifted = tl.where((component < mixtures)[None, :], logits, -float("inf"))
    return logits, shifted - tl.max(shifted, 1)[:, None]


@triton.jit
def load_mean(params_at, COLOUR: tl.constexpr, RGB: tl.constexpr, x_0, x_1, component, params_plane, mixtures, valid):
    """The mean as stored, and given the colours before it: r->g is coefficient 0, r->b 1 and g->b 2."""
    GROUPS: tl.constexpr = 3 if RGB else 2
    raw = load_group(params_at, 1 + GROUPS * COLOUR, component, params_plane, mixtures, valid)
    mean = saturate(raw, -DEVIATION_LIMIT, DEVIATION_LIMIT)
    if COLOUR == 1:
        mean += tanh(load_group(params_at, 3, component, params_plane, mixtures, valid)) * x_0[:, None]
    if COLOUR == 2:
        mean += tanh(load_group(params_at, 6, component, params_plane, mixtures, valid)) * x_0[:, None]
        mean += tanh(load_group(params_at, 9, component, params_plane, mixtures, valid)) * x_1[:, None]
    return raw, mean


@triton.jit
def load_bin(
    params_at, level, COLOUR: tl.constexpr, RGB: tl.constexpr, x_0, x_1, component, params_plane, mixtures, valid, half
):
    """Bin ends a and b, width, raw log-scale and mean of one colour."""
    GROUPS: tl.constexpr = 3 if RGB else 2
    raw_mean, mean = load_mean(params_at, COLOUR, RGB, x_0, x_1, component, params_plane, mixtures, valid)
    log_scale = load_group(params_at, 2 + GROUPS * COLOUR, component, params_plane, mixtures, valid)
    width = tl.exp(-saturate(log_scale, MIN_LOG_SCALE, LOGIT_LIMIT)) / half
    # half * mean = (half + 1/2) * mean - mean / 2 in two steps: the first is exact for 256 levels, so that the digits
    # of the distance survive where level and mean are close.
    distance = ((level - half)[:, None] - (half + 0.5) * mean) + 0.5 * mean
    return (distance + 0.5) * width, (distance - 0.5) * width, width, log_scale, raw_mean


@triton.jit
def log_bin(level, a, b, width, log_scale, half, log_half):
    """log p of one colour's level for each component."""
    upper, lower = logsigmoid(a), logsigmoid(-b)
    inside = upper + lower + log_bin_width(width, saturate(log_scale, MIN_LOG_SCALE, LOGIT_LIMIT), log_half)
    level = level[:, None]
    return tl.where(level == 0, upper, tl.where(level == 2 * half, lower, inside))


# --- kernels: one program for a block of pixels of one image


@triton.jit
def mixture_forward_kernel(
    params_ptr,  # (B, (1 + C * K) * M, N)
    target_ptr,  # integers (B, C, N)
    out_ptr,  # float32: partial sums (B, blocks), or the map (B, N)
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
    BLOCK_M: tl.constexpr,
):
    image = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    pixel = block * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    component = tl.arange(0, BLOCK_M)
    valid = inside[:, None] & (component < mixtures)[None, :]
    params_at = params_ptr + image * params_batch + image_offsets(pixel, n1, n2, params_0, params_1, params_2, DENSE)
    target_at = target_ptr + image * target_batch + image_offsets(pixel, n1, n2, target_0, target_1, target_2, DENSE)
    _, prior = load_mixture_logits(params_at, component, params_plane, mixtures, valid)
    joint = prior
    x_0 = tl.zeros([BLOCK], dtype=tl.float32)
    x_1 = x_0
    for index in tl.static_range(3 if RGB else 1):
        level = tl.load(target_at + index * target_colour, mask=inside, other=0).to(tl.float32)
        a, b, width, log_scale, _ = load_bin(
            params_at, level, index, RGB, x_0, x_1, component, params_plane, mixtures, valid, half
        )
        joint += log_bin(level, a, b, width, log_scale, half, log_half)
        if index == 0:
            x_0 = level / half - 1
        if index == 1:
            x_1 = level / half - 1
    largest = tl.max(joint, 1)
    nll = tl.log(tl.sum(tl.exp(prior), 1)) - (largest + tl.log(tl.sum(tl.exp(joint - largest[:, None]), 1)))
    if MAP:
        out_at = out_ptr + image * out_batch + image_offsets(pixel, n1, n2, out_0, out_1, out_2, DENSE)
        tl.store(out_at, nll, mask=inside)
    else:
        tl.store(out_ptr + image * blocks + block, tl.sum(tl.where(inside, nll, 0.0), 0))


@triton.jit
def store_group(grad_at, group, component, grad_plane, mixtures, grad, valid):
    plane = (group * mixtures + component).to(tl.int64) * grad_plane
    tl.store(grad_at[:, None] + plane[None, :], grad.to(grad_at.dtype.scalar.element_ty), mask=valid)


@triton.jit
def mixture_backward_kernel(
    params_ptr,  # (B, (1 + C * K) * M, N)
    target_ptr,  # integers (B, C, N)
    upstream_ptr,  # float32 (B, N); strides 0 where it is one number an image
    grad_ptr,  # like params, every element is written
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
    BLOCK_M: tl.constexpr,
):
    image = (tl.program_id(0) // blocks).to(tl.int64)
    pixel = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    component = tl.arange(0, BLOCK_M)
    valid = inside[:, None] & (component < mixtures)[None, :]
    params_at = params_ptr + image * params_batch + image_offsets(pixel, n1, n2, params_0, params_1, params_2, DENSE)
    target_at = target_ptr + image * target_batch + image_offsets(pixel, n1, n2, target_0, target_1, target_2, DENSE)
    upstream_offset = image_offsets(pixel, n1, n2, upstream_0, upstream_1, upstream_2, DENSE)
    grad_at = grad_ptr + image * grad_batch + image_offsets(pixel, n1, n2, grad_0, grad_1, grad_2, DENSE)
    upstream = tl.load(upstream_ptr + image * upstream_batch + upstream_offset, mask=inside, other=0.0)[:, None]
    COLOURS: tl.constexpr = 3 if RGB else 1
    GROUPS: tl.constexpr = 3 if RGB else 2

    logits, prior = load_mixture_logits(params_at, component, params_plane, mixtures, valid)
    joint = prior
    x_0 = tl.zeros([BLOCK], dtype=tl.float32)
    x_1 = x_0
    for index in tl.static_range(COLOURS):
        level = tl.load(target_at + index * target_colour, mask=inside, other=0).to(tl.float32)
        a, b, width, log_scale, _ = load_bin(
            params_at, level, index, RGB, x_0, x_1, component, params_plane, mixtures, valid, half
        )
        joint += log_bin(level, a, b, width, log_scale, half, log_half)
        if index == 0:
            x_0 = level / half - 1
        if index == 1:
            x_1 = level / half - 1

    # d nll / d logit = prior - posterior of the component; d nll / d log p = -posterior.
    weights = tl.exp(joint - tl.max(joint, 1)[:, None])
    posterior = weights / tl.sum(weights, 1)[:, None]
    weights = tl.exp(prior)
    slope = tl.where(tl.abs(logits) == LOGIT_LIMIT, 0.0, weights / tl.sum(weights, 1)[:, None] - posterior)
    store_group(grad_at, 0, component, grad_plane, mixtures, upstream * slope, valid)
    pull = -upstream * posterior
    for index in tl.static_range(COLOURS):
        level = tl.load(target_at + index * target_colour, mask=inside, other=0).to(tl.float32)
        a, b, width, log_scale, raw_mean = load_bin(
            params_at, level, index, RGB, x_0, x_1, component, params_plane, mixtures, valid, half
        )
        first, last = (level == 0)[:, None], (level == 2 * half)[:, None]
        above = tl.where(last, 0.0, tl.sigmoid(-a))
        below = tl.where(first, 0.0, tl.sigmoid(b))
        grad_mean = pull * (half * width) * (below - above)
        mean_moves = tl.abs(raw_mean) <= DEVIATION_LIMIT
        kept = tl.where(mean_moves, grad_mean, 0.0)
        store_group(grad_at, 1 + GROUPS * index, component, grad_plane, mixtures, kept, valid)
        spread = b * below - a * above - tl.where(first | last, 0.0, bin_width_slope(width))
        scale_moves = (log_scale >= MIN_LOG_SCALE) & (log_scale <= LOGIT_LIMIT)
        kept = tl.where(scale_moves, pull * spread, 0.0)
        store_group(grad_at, 2 + GROUPS * index, component, grad_plane, mixtures, kept, valid)
        if index == 1:
            c = tanh(load_group(params_at, 3, component, params_plane, mixtures, valid))
            store_group(grad_at, 3, component, grad_plane, mixtures, grad_mean * x_0[:, None] * (1 - c * c), valid)
        if index == 2:
            c = tanh(load_group(params_at, 6, component, params_plane, mixtures, valid))
            store_group(grad_at, 6, component, grad_plane, mixtures, grad_mean * x_0[:, None] * (1 - c * c), valid)
            c = tanh(load_group(params_at, 9, component, params_plane, mixtures, valid))
            store_group(grad_at, 9, component, grad_plane, mixtures, grad_mean * x_1[:, None] * (1 - c * c), valid)


# --- launching


@dataclass(frozen=True)
class Tile:
    """One program's pixels by components, and its warps."""

    block: int
    block_m: int
    warps: int


def mixture_tile(mixtures: int, pixels: int) -> Tile:
    """512 parameters of each kind in 4 warps: 4 registers a thread for each tile that is live at once, 128 to 181 for
    RGB; twice as many parameters spill where the image is no dense run."""
    block_m = max(2, triton.next_power_of_2(mixtures))
    return Tile(min(max(1, 512 // block_m), triton.next_power_of_2(pixels)), block_m, 4)


def forward(params: Tensor, target: Tensor, levels: int, per_element: bool) -> Tensor:
    """Nats: (B,), or the map (B, 1, H, W). params (B, 10*M or 3*M, H, W), integer target (B, C, H, W), any strides."""
    batch, colours, height, width = target.shape
    out_shape = (batch, 1, height, width)
    if target.numel() == 0:
        return params.new_zeros(out_shape if per_element else (batch,), dtype=torch.float32)
    mixtures, half = params.shape[1] // (10 if colours == 3 else 3), (levels - 1) / 2
    tile = mixture_tile(mixtures, height * width)
    blocks = triton.cdiv(height * width, tile.block)
    out = params.new_empty(out_shape if per_element else (batch, blocks), dtype=torch.float32)
    out_strides = out.stride()[2:] if per_element else (0, 0)
    (n0, n1, n2), image = collapse((height, width), params.stride()[2:], target.stride()[2:], out_strides)
    mixture_forward_kernel[(batch * blocks,)](
        params, target, out, height * width, blocks, mixtures, half, math.log(half), n1, n2,
        *params.stride()[:2], *image[0], *target.stride()[:2], *image[1], out.stride(0), *image[2],
        RGB=colours == 3, MAP=per_element, DENSE=n0 == n1 == 1,
        BLOCK=tile.block, BLOCK_M=tile.block_m, num_warps=tile.warps,
    )  # fmt: skip
    if per_element:
        return out
    return out.sum(1) if blocks > 1 else out.squeeze(1)


def backward(params: Tensor, target: Tensor, upstream: Tensor, grad: Tensor, levels: int) -> None:
    """Writes the gradient of params into grad, of the same shape; upstream float32, expanded to (B, 1, H, W)."""
    if target.numel() == 0:
        return
    batch, colours, height, width = target.shape
    mixtures, half = params.shape[1] // (10 if colours == 3 else 3), (levels - 1) / 2
    tile = mixture_tile(mixtures, height * width)
    blocks = triton.cdiv(height * width, tile.block)
    tensors = (params.stride()[2:], target.stride()[2:], upstream.stride()[2:], grad.stride()[2:])
    (n0, n1, n2), image = collapse((height, width), *tensors)
    mixture_backward_kernel[(batch * blocks,)](
        params, target, upstream, grad, height * width, blocks, mixtures, half, math.log(half), n1, n2,
        *params.stride()[:2], *image[0], *target.stride()[:2], *image[1],
        upstream.stride(0), *image[2], *grad.stride()[:2], *image[3],
        RGB=colours == 3, DENSE=n0 == n1 == 1,
        BLOCK=tile.block, BLOCK_M=tile.block_m, num_warps=tile.warps,
    )  # fmt: skip


# --- the compile gate

_INNER, _PLANE = ("params_2", "target_2"), ("params_plane",)
_TILE = {"BLOCK": 32, "BLOCK_M": 16}
CATALOGUE: list[Entry] = [
    entry(mixture_forward_kernel, "fp32", "fp32", "u8", _INNER, 4, RGB=True, MAP=False, DENSE=True, **_TILE),
    entry(
        mixture_forward_kernel,
        "map, channels last, bf16",
        "bf16",
        "i64",
        _PLANE,
        4,
        RGB=True,
        MAP=True,
        DENSE=False,
        **_TILE,
    ),
    entry(mixture_forward_kernel, "one channel", "fp32", "u8", _INNER, 4, RGB=False, MAP=False, DENSE=True, **_TILE),
    entry(mixture_backward_kernel, "fp32", "fp32", "u8", (*_INNER, "grad_2"), 4, RGB=True, DENSE=True, **_TILE),
    replace(
        entry(
            mixture_backward_kernel,
            "channels last, bf16",
            "bf16",
            "i64",
            (*_PLANE, "grad_plane"),
            4,
            RGB=True,
            DENSE=False,
            **_TILE,
        ),
        spills={"sm_100": 8},
        reason="two registers over the 168 that let three blocks share a multiprocessor",
    ),
    entry(mixture_backward_kernel, "one channel", "fp32", "u8", (*_INNER, "grad_2"), 4, RGB=False, DENSE=True, **_TILE),
]
