"""Negative log-likelihood under PixelCNN++'s discretized mixture of logistics, forward and backward.

Shapes: B images of C = 1 or 3 colours, N = H*W pixels, M components. At a pixel the parameters are M mixture logits,
then for each colour K groups of M: means, log-scales and, with K = 3 for RGB, coefficients (K = 2 for one channel).
`logistic` has what one component gives. Its logit is its prior, and that plus log p of the pixel's colours its joint:
nll = logsumexp of the priors - logsumexp of the joints.

A thread has a pixel. It walks the components one after the other and keeps running maxima and sums, so that no thread
waits for another and no lane is padding. The forward saves both maxima and sums, 16 bytes a pixel. The backward walks
the components once more and writes their gradients: 12 bytes a float32 parameter in all.

Where the components of a pixel are neighbours in memory (channels-last), several threads have a pixel: they take
TOGETHER components at a time, the forward 8 and the backward 4, and then the TAIL that is left, and add up their sums
at the end. All sectors that a launch touches are its floor, but requests touch them again for each group and part of a
group: with 10 components, in float32 and half precision, forward 2.2 and 3.5 times the floor, backward 2.8 and 5.0
times. Only whole rows of a pixel in shared memory would save that; `tl.gather`, which could read components there,
stores the rows anew for each, and instructions are what bounds these kernels.
"""

import math
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels.catalogue_entry import Entry
from fastgen.kernels.common import cdiv, launch, next_power_of_2
from fastgen.kernels.likelihood.image import (
    LOGIT_LIMIT,
    addresses,
    entry,
    image_offsets,
    load_upstream,
    store_nll,
    summed,
    upstream_strides,
)
from fastgen.kernels.likelihood.logistic import load_component, store_colour, store_group

THREADS = 128  # of a program
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def add_exponential(largest, total, x):
    """A running maximum and the sum of exp(x - maximum) over all x so far, with one more x; NaN stays."""
    shrunk = tl.exp(-tl.abs(x - largest))
    total = tl.where(x > largest, total * shrunk + 1.0, total + shrunk)
    return tl.where(x > largest, x, largest), total


@triton.jit
def total_of(largest, total):
    """Maxima and sums of the threads of a pixel (BLOCK, TOGETHER) as one (BLOCK,)."""
    greatest = tl.max(largest, 1)
    factor = tl.exp(largest - greatest[:, None])
    # A select keeps product and sum apart: fused, threads of a pixel would differ in the last bit, and race.
    return greatest, tl.sum(tl.where(total > 0, total * factor, total), 1)


@triton.jit
def joined(one, other):
    """Maxima and sums of two sets of components, each of a number a pixel (BLOCK,), as those of both."""
    return total_of(tl.join(one[0], other[0]), tl.join(one[1], other[1]))


@triton.jit
def wide(number):
    """In 64 bits; a Python int in the interpreter, where loops count in those."""
    return tl.zeros((), tl.int64) + number


@triton.jit
def load_levels(target_at, target_colour, RGB: tl.constexpr, inside):
    red = tl.load(target_at, mask=inside, other=0).to(tl.float32)
    green, blue = red, red
    if RGB:
        green = tl.load(target_at + target_colour, mask=inside, other=0).to(tl.float32)
        blue = tl.load(target_at + 2 * target_colour, mask=inside, other=0).to(tl.float32)
    return red, green, blue


@triton.jit
def evidence(
    begin, end, WIDTH: tl.constexpr, PADDED: tl.constexpr, params_at, params_plane, to_group, RGB: tl.constexpr, levels,
    half, log_half, inside,
):  # fmt: skip
    """Of the components from begin to end, by WIDTH threads a pixel: maxima and sums of priors and of joints."""
    largest_prior = tl.full((params_at.shape[0], WIDTH), LOWEST, tl.float32)
    largest_joint = largest_prior
    prior_total = tl.zeros_like(largest_prior)
    joint_total = prior_total
    for first in range(begin, end, WIDTH):
        component = first + tl.arange(0, WIDTH)[None, :]
        at = params_at[:, None] + component.to(tl.int64) * params_plane
        real = inside[:, None]
        if PADDED:
            real = real & (component < end)
        logit, joint, _ = load_component(at, RGB, levels, to_group, half, log_half, real)
        if PADDED:
            logit, joint = tl.where(real, logit, LOWEST), tl.where(real, joint, LOWEST)
        largest_prior, prior_total = add_exponential(largest_prior, prior_total, logit)
        largest_joint, joint_total = add_exponential(largest_joint, joint_total, joint)
    return total_of(largest_prior, prior_total), total_of(largest_joint, joint_total)


@triton.jit
def mixture_forward_kernel(
    params_ptr,  # (B, (1 + C * K) * M, N)
    target_ptr,  # integers (B, C, N)
    out_ptr,  # float32: partial sums (B, blocks), or the map (B, N)
    kept_ptr,  # float32 (B, 4, N) contiguous, written: maximum and one over the sum, of prior and joint; or None
    pixels, blocks,
    mixtures,  # M / VECTOR
    half,  # (levels - 1) / 2
    log_half,
    n1, n2,
    params_batch, params_plane, params_0, params_1, params_2,
    target_batch, target_colour, target_0, target_1, target_2,
    out_batch, out_0, out_1, out_2,
    RGB: tl.constexpr, MAP: tl.constexpr, DENSE: tl.constexpr,
    BLOCK: tl.constexpr, TOGETHER: tl.constexpr, TAIL: tl.constexpr, PADDED: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    mixtures *= VECTOR
    image = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    pixel = block * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    params_at = params_ptr + image * params_batch + image_offsets(pixel, n1, n2, params_0, params_1, params_2, DENSE)
    params_at = tl.multiple_of(params_at, VECTOR * params_ptr.dtype.element_ty.primitive_bitwidth // 8)
    target_at = target_ptr + image * target_batch + image_offsets(pixel, n1, n2, target_0, target_1, target_2, DENSE)
    levels = load_levels(target_at[:, None], target_colour, RGB, inside[:, None])
    to_group = wide(mixtures) * params_plane
    whole = mixtures // TOGETHER * TOGETHER
    prior, joint = evidence(
        0, whole, TOGETHER, False, params_at, params_plane, to_group, RGB, levels, half, log_half, inside
    )
    if TAIL > 0:
        prior_tail, joint_tail = evidence(
            whole, mixtures, TAIL, PADDED, params_at, params_plane, to_group, RGB, levels, half, log_half, inside
        )
        prior, joint = joined(prior, prior_tail), joined(joint, joint_tail)
    largest_prior, prior_total = prior
    largest_joint, joint_total = joint
    nll = (largest_prior - largest_joint) + tl.log(prior_total / joint_total)
    if kept_ptr is not None:
        kept_at = kept_ptr + 4 * image * pixels + pixel
        tl.store(kept_at, largest_prior, inside)
        tl.store(kept_at + pixels, 1 / prior_total, inside)
        tl.store(kept_at + 2 * pixels, largest_joint, inside)
        tl.store(kept_at + 3 * pixels, 1 / joint_total, inside)
    store_nll(out_ptr, nll, inside, image, block, blocks, (out_batch, out_0, out_1, out_2), pixel, n1, n2, MAP, DENSE)


@triton.jit
def store_slopes(
    begin, end, WIDTH: tl.constexpr, PADDED: tl.constexpr, params_at, params_plane, to_group, grad_at, grad_plane,
    to_grad_group, RGB: tl.constexpr, levels, half, log_half, inside, upstream, kept,
):  # fmt: skip
    """Gradients of the components from begin to end, by WIDTH threads a pixel. kept: what the forward has saved."""
    largest_prior, prior_scale, largest_joint, joint_scale = kept
    for first in range(begin, end, WIDTH):
        component = first + tl.arange(0, WIDTH)[None, :]
        at = params_at[:, None] + component.to(tl.int64) * params_plane
        grad_component = grad_at[:, None] + component.to(tl.int64) * grad_plane
        real = inside[:, None]
        if PADDED:
            real = real & (component < end)
        logit, joint, colours = load_component(at, RGB, levels, to_group, half, log_half, real)
        # d nll / d logit = prior - posterior of the component; d nll / d log p = -posterior.
        below = joint - largest_joint
        posterior = tl.exp(tl.where(below > 0, 0.0, below)) * joint_scale
        slope = tl.where(tl.abs(logit) == LOGIT_LIMIT, 0.0, tl.exp(logit - largest_prior) * prior_scale - posterior)
        store_group(grad_component, 0, to_grad_group, upstream * slope, real)
        pull = -upstream * posterior
        store_colour(grad_component, 0, RGB, colours[0], pull, to_grad_group, real)
        if RGB:
            store_colour(grad_component, 1, RGB, colours[1], pull, to_grad_group, real)
            store_colour(grad_component, 2, RGB, colours[2], pull, to_grad_group, real)


@triton.jit
def mixture_backward_kernel(
    params_ptr,  # (B, (1 + C * K) * M, N)
    target_ptr,  # integers (B, C, N)
    upstream_ptr,  # float32 (B,), or a map (B, N)
    grad_ptr,  # like params, every element is written
    kept_ptr,  # float32 (B, 4, N) contiguous, of the forward
    pixels, blocks,
    mixtures,  # M / VECTOR
    half,  # (levels - 1) / 2
    log_half,
    n1, n2,
    params_batch, params_plane, params_0, params_1, params_2,
    target_batch, target_colour, target_0, target_1, target_2,
    upstream_batch, upstream_0, upstream_1, upstream_2,
    grad_batch, grad_plane, grad_0, grad_1, grad_2,
    RGB: tl.constexpr, MAP: tl.constexpr, DENSE: tl.constexpr,
    BLOCK: tl.constexpr, TOGETHER: tl.constexpr, TAIL: tl.constexpr, PADDED: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    mixtures *= VECTOR
    image = (tl.program_id(0) // blocks).to(tl.int64)
    pixel = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    params_at = params_ptr + image * params_batch + image_offsets(pixel, n1, n2, params_0, params_1, params_2, DENSE)
    params_at = tl.multiple_of(params_at, VECTOR * params_ptr.dtype.element_ty.primitive_bitwidth // 8)
    target_at = target_ptr + image * target_batch + image_offsets(pixel, n1, n2, target_0, target_1, target_2, DENSE)
    grad_at = grad_ptr + image * grad_batch + image_offsets(pixel, n1, n2, grad_0, grad_1, grad_2, DENSE)
    grad_at = tl.multiple_of(grad_at, VECTOR * grad_ptr.dtype.element_ty.primitive_bitwidth // 8)
    strides = (upstream_batch, upstream_0, upstream_1, upstream_2)
    upstream = load_upstream(upstream_ptr, image, pixel, inside, strides, n1, n2, MAP, DENSE)
    if MAP:
        upstream = upstream[:, None]
    levels = load_levels(target_at[:, None], target_colour, RGB, inside[:, None])
    kept_at = kept_ptr + 4 * image * pixels + pixel
    largest_prior = tl.load(kept_at, inside, other=0.0)[:, None]
    prior_scale = tl.load(kept_at + pixels, inside, other=0.0)[:, None]
    largest_joint = tl.load(kept_at + 2 * pixels, inside, other=0.0)[:, None]
    joint_scale = tl.load(kept_at + 3 * pixels, inside, other=0.0)[:, None]
    to_group = wide(mixtures) * params_plane
    to_grad_group = wide(mixtures) * grad_plane
    whole = mixtures // TOGETHER * TOGETHER
    kept = (largest_prior, prior_scale, largest_joint, joint_scale)
    store_slopes(
        0, whole, TOGETHER, False, params_at, params_plane, to_group, grad_at, grad_plane, to_grad_group, RGB, levels,
        half, log_half, inside, upstream, kept,
    )  # fmt: skip
    if TAIL > 0:
        store_slopes(
            whole, mixtures, TAIL, PADDED, params_at, params_plane, to_group, grad_at, grad_plane, to_grad_group, RGB,
            levels, half, log_half, inside, upstream, kept,
        )  # fmt: skip


def tile_of(mixtures: int, most: int, *tensors: Tensor) -> dict[str, Any]:
    """How a program's threads divide pixels and components of `tensors`, params and perhaps their gradient.

    BLOCK pixels; of one TOGETHER components at a time, `most` at most, and TAIL at the end, of which the last are
    PADDED; a thread reads VECTOR of them at once.
    """
    if any(x.stride(1) != 1 for x in tensors) or mixtures == 1:
        return {"BLOCK": THREADS, "TOGETHER": 1, "TAIL": 0, "PADDED": False, "VECTOR": 1, "num_warps": THREADS // 32}
    together = min(most, next_power_of_2(mixtures + 1) // 2)
    left = mixtures % together
    tail = next_power_of_2(left) if left else 0
    vector = math.gcd(4, mixtures, *(x.stride(axis) for x in tensors for axis in (0, 2, 3)))
    if any(x.data_ptr() % (vector * x.element_size()) for x in tensors):
        vector = 1
    tile = {"BLOCK": THREADS // 2, "TOGETHER": together, "TAIL": tail, "PADDED": tail > left, "VECTOR": vector}
    return tile | {"num_warps": THREADS // 32}


def sizes_of(params: Tensor, mixtures: int, levels: int, tile: dict[str, Any]) -> tuple[int, int, int, float, float]:
    """Pixels, blocks, components in vectors, half, log(half)."""
    pixels, half = params.shape[2] * params.shape[3], (levels - 1) / 2
    return pixels, cdiv(pixels, tile["BLOCK"]), mixtures // tile["VECTOR"], half, math.log(half)


def mixtures_of(params: Tensor, colours: int) -> int:
    return params.shape[1] // (10 if colours == 3 else 3)


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
    mixtures = mixtures_of(params, colours)
    tile = tile_of(mixtures, 8, params)
    pixels, blocks, *_ = sizes = sizes_of(params, mixtures, levels, tile)
    out = torch.empty(out_shape if per_element else (batch, blocks), dtype=torch.float32, device=device)
    out_strides = (pixels, width, 1) if per_element else (0, 0, 0)
    (dense, _), inner, strides = addresses((height, width), params.stride(), target.stride(), out_strides)
    constants = {"RGB": colours == 3, "MAP": per_element, "DENSE": dense, **tile}
    launch(mixture_forward_kernel, (batch * blocks,), (params, target, out, kept, *sizes, *inner, *strides), constants)
    return summed(out, per_element), kept


def backward(params: Tensor, target: Tensor, upstream: Tensor, kept: Tensor, grad: Tensor, levels: int) -> None:
    """Writes the gradient of params into grad, of the same shape; upstream float32, (B,) or (B, 1, H, W)."""
    batch, colours, height, width = target.shape
    if target.numel() == 0:
        return
    mixtures = mixtures_of(params, colours)
    tile = tile_of(mixtures, 4, params, grad)  # eight would spill
    sizes = sizes_of(params, mixtures, levels, tile)
    per_element = upstream.dim() > 1
    upstream = upstream.select(1, 0) if per_element else upstream
    (dense, _), inner, strides = addresses(
        (height, width), params.stride(), target.stride(), upstream_strides(upstream, 2), grad.stride()
    )
    constants = {"RGB": colours == 3, "MAP": per_element, "DENSE": dense, **tile}
    args = (params, target, upstream, grad, kept, *sizes, *inner, *strides)
    launch(mixture_backward_kernel, (batch * sizes[1],), args, constants)


_INNER, _INNER_GRAD = ("params_2", "target_2"), ("params_2", "target_2", "grad_2")
_PLANE, _PLANE_GRAD = ("params_plane",), ("params_plane", "grad_plane")
_RGB, _GREY = (
    {"RGB": rgb, "MAP": False, "DENSE": True, "BLOCK": 128, "TOGETHER": 1, "TAIL": 0, "PADDED": False, "VECTOR": 1}
    for rgb in (True, False)
)
_LAST = {"RGB": True, "MAP": True, "DENSE": False, "BLOCK": 64, "TOGETHER": 8, "TAIL": 2, "PADDED": False, "VECTOR": 2}
_SPILLS: dict[str, Any] = {
    "spills": {"sm_80": 32, "sm_100": 32, "sm_120": 24},
    "reason": "a few words, where ptxas stops at 168 registers, with which three programs fit",
}
CATALOGUE: list[Entry] = [
    entry(mixture_forward_kernel, "fp32", "fp32", "u8", _INNER, _RGB),
    entry(mixture_forward_kernel, "one channel", "fp32", "u8", _INNER, _GREY, multiples=False),
    entry(mixture_backward_kernel, "fp32", "fp32", "u8", _INNER_GRAD, _RGB),
    entry(mixture_backward_kernel, "bf16", "bf16", "u8", _INNER_GRAD, _RGB),
    entry(mixture_backward_kernel, "one channel", "fp32", "u8", _INNER_GRAD, _GREY, multiples=False),
    *(
        replace(
            entry(kernel, f"{dtype}, channels last", dtype, "i64", planes, _LAST | {"TOGETHER": together}), **_SPILLS
        )
        for dtype in ("fp32", "bf16")
        for kernel, planes, together in (
            (mixture_forward_kernel, _PLANE, 8),
            (mixture_backward_kernel, _PLANE_GRAD, 4),
        )
    ),
]
