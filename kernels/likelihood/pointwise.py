"""Bernoulli and Gaussian negative log-likelihood, forward and backward: a program for a block of elements of an image.

Shapes: B images, E = C*H*W elements an image, P planes of parameters (1 logit; or mean and log-variance). The forward
reads the parameters once and writes the map, or a partial sum for each block; a second, small reduction adds partial
sums in a fixed order. The backward reads the parameters once more and writes their gradient: 12 bytes a float32
parameter in all. A forward that wrote the gradient at once would cost 16: the backward would have to read and write it
again to scale it by the upstream gradient. It would also hold the gradient in memory meanwhile.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels.catalogue_entry import Entry
from fastgen.kernels.common import cdiv, launch, next_power_of_2
from fastgen.kernels.likelihood.image import (
    DEVIATION_LIMIT,
    LOGIT_LIMIT,
    addresses,
    entry,
    image_offsets,
    load_upstream,
    log1p_series,
    saturate,
    store_nll,
    summed,
    upstream_strides,
)

MIN_LOG_VARIANCE = tl.constexpr(-100.0)
MAX_LOG_VARIANCE = tl.constexpr(80.0)
LOG_TWO_PI = tl.constexpr(1.8378770664093453)


@triton.jit
def pointwise_forward_kernel(
    params_ptr,  # (B, P, E)
    target_ptr,  # (B, E)
    out_ptr,  # float32: partial sums (B, blocks), or the map (B, E)
    elements, blocks,
    n1, n2,
    params_batch, params_plane, params_0, params_1, params_2,
    target_batch, target_0, target_1, target_2,
    out_batch, out_0, out_1, out_2,
    GAUSSIAN: tl.constexpr, MAP: tl.constexpr, DENSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    element = block * BLOCK + tl.arange(0, BLOCK)
    inside = element < elements
    params_at = params_ptr + image * params_batch + image_offsets(element, n1, n2, params_0, params_1, params_2, DENSE)
    target_at = target_ptr + image * target_batch + image_offsets(element, n1, n2, target_0, target_1, target_2, DENSE)
    first = tl.load(params_at, mask=inside, other=0.0).to(tl.float32)
    target = tl.load(target_at, mask=inside, other=0).to(tl.float32)
    if GAUSSIAN:
        log_variance = tl.load(params_at + params_plane, mask=inside, other=0.0).to(tl.float32)
        log_variance = saturate(log_variance, MIN_LOG_VARIANCE, MAX_LOG_VARIANCE)
        difference = saturate(target - first, -DEVIATION_LIMIT, DEVIATION_LIMIT)
        deviation = saturate(difference * tl.exp(-0.5 * log_variance), -DEVIATION_LIMIT, DEVIATION_LIMIT)
        nll = 0.5 * (deviation * deviation + log_variance + LOG_TWO_PI)
    else:
        logit = saturate(first, -LOGIT_LIMIT, LOGIT_LIMIT)
        size = tl.abs(logit)
        # max(-l, 0) where the target is 1, max(l, 0) where it is 0; as (|l| -+ l) / 2, NaN stays NaN.
        nll = log1p_series(tl.exp(-size)) + target * (0.5 * (size - logit)) + (1 - target) * (0.5 * (size + logit))
    store_nll(out_ptr, nll, inside, image, block, blocks, (out_batch, out_0, out_1, out_2), element, n1, n2, MAP, DENSE)


@triton.jit
def pointwise_backward_kernel(
    params_ptr,  # (B, P, E)
    target_ptr,  # (B, E)
    upstream_ptr,  # float32 (B,), or a map (B, E)
    grad_ptr,  # (B, P, E), every element is written
    elements, blocks,
    n1, n2,
    params_batch, params_plane, params_0, params_1, params_2,
    target_batch, target_0, target_1, target_2,
    upstream_batch, upstream_0, upstream_1, upstream_2,
    grad_batch, grad_plane, grad_0, grad_1, grad_2,
    GAUSSIAN: tl.constexpr, MAP: tl.constexpr, DENSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image = (tl.program_id(0) // blocks).to(tl.int64)
    element = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = element < elements
    params_at = params_ptr + image * params_batch + image_offsets(element, n1, n2, params_0, params_1, params_2, DENSE)
    target_at = target_ptr + image * target_batch + image_offsets(element, n1, n2, target_0, target_1, target_2, DENSE)
    grad_at = grad_ptr + image * grad_batch + image_offsets(element, n1, n2, grad_0, grad_1, grad_2, DENSE)
    first = tl.load(params_at, mask=inside, other=0.0).to(tl.float32)
    target = tl.load(target_at, mask=inside, other=0).to(tl.float32)
    strides = (upstream_batch, upstream_0, upstream_1, upstream_2)
    upstream = load_upstream(upstream_ptr, image, element, inside, strides, n1, n2, MAP, DENSE)
    kind = grad_ptr.dtype.element_ty
    if GAUSSIAN:
        raw = tl.load(params_at + params_plane, mask=inside, other=0.0).to(tl.float32)
        log_variance = saturate(raw, MIN_LOG_VARIANCE, MAX_LOG_VARIANCE)
        difference = target - first
        inverse_scale = tl.exp(-0.5 * log_variance)
        deviation = saturate(difference, -DEVIATION_LIMIT, DEVIATION_LIMIT) * inverse_scale
        moves = tl.abs(deviation) <= DEVIATION_LIMIT
        square = tl.where(moves, deviation * deviation, 0.0)
        slope = tl.where(moves & (tl.abs(difference) <= DEVIATION_LIMIT), -deviation * inverse_scale, 0.0)
        tl.store(grad_at, (upstream * slope).to(kind), mask=inside)
        grad_log_variance = tl.where(raw == log_variance, 0.5 * (1 - square), 0.0)
        tl.store(grad_at + grad_plane, (upstream * grad_log_variance).to(kind), mask=inside)
    else:
        slope = (1 - target) * tl.sigmoid(first) - target * tl.sigmoid(-first)
        slope = tl.where(tl.abs(first) <= LOGIT_LIMIT, slope, 0.0)
        tl.store(grad_at, (upstream * slope).to(kind), mask=inside)


def tile_of(elements: int, widest: int) -> dict[str, int]:
    """BLOCK and num_warps: 1024 elements, less for a small image. widest: bytes of the largest element of any tensor.

    A thread takes 16 bytes of that tensor. With more it would load them in several instructions, each of which reads
    every second 16 bytes.
    """
    block = min(1024, max(64, next_power_of_2(elements)))
    return {"BLOCK": block, "num_warps": max(1, block * min(widest, 4) // 512)}


def forward(params: Tensor, target: Tensor, gaussian: bool, per_element: bool) -> Tensor:
    """Nats: (B,), or the map (B, C, H, W). params (B, P, C, H, W) and target (B, C, H, W), any strides."""
    batch, *sizes = target.shape
    elements = math.prod(sizes)
    tile = tile_of(elements, max(params.element_size(), target.element_size(), 4 if per_element else 1))
    blocks = cdiv(elements, tile["BLOCK"])
    out = torch.empty(target.shape if per_element else (batch, blocks), dtype=torch.float32, device=params.device)
    if out.numel() == 0:
        return out if per_element else out.sum(1)
    out_strides = out.stride() if per_element else (0, 0, 0, 0)
    (dense, _), inner, strides = addresses(tuple(sizes), params.stride(), target.stride(), out_strides)
    constants = {"GAUSSIAN": gaussian, "MAP": per_element, "DENSE": dense, **tile}
    args = (params, target, out, elements, blocks, *inner, *strides)
    launch(pointwise_forward_kernel, (batch * blocks,), args, constants)
    return summed(out, per_element)


def backward(params: Tensor, target: Tensor, upstream: Tensor, grad: Tensor, gaussian: bool) -> None:
    """Writes the gradient of params into grad, of the same shape; upstream float32, (B,) or (B, C, H, W)."""
    batch, *sizes = target.shape
    elements = math.prod(sizes)
    if batch * elements == 0:
        return
    per_element = upstream.dim() > 1
    tile = tile_of(elements, max(params.element_size(), target.element_size(), 4 if per_element else 1))
    blocks = cdiv(elements, tile["BLOCK"])
    (dense, _), inner, strides = addresses(
        tuple(sizes), params.stride(), target.stride(), upstream_strides(upstream, 3), grad.stride()
    )
    constants = {"GAUSSIAN": gaussian, "MAP": per_element, "DENSE": dense, **tile}
    args = (params, target, upstream, grad, elements, blocks, *inner, *strides)
    launch(pointwise_backward_kernel, (batch * blocks,), args, constants)


_INNER, _INNER_GRAD = ("params_2", "target_2"), ("params_2", "target_2", "grad_2")
_LOGITS, _GAUSSIAN = ({"GAUSSIAN": gaussian, "MAP": False, "DENSE": True, "BLOCK": 1024} for gaussian in (False, True))
_ODD = {"GAUSSIAN": False, "MAP": True, "DENSE": False, "BLOCK": 1024}
_ODD_GRAD = {"GAUSSIAN": True, "MAP": True, "DENSE": False, "BLOCK": 1024}
CATALOGUE: list[Entry] = [
    entry(pointwise_forward_kernel, "bernoulli fp32", "fp32", "u8", _INNER, _LOGITS, num_warps=8),
    entry(pointwise_forward_kernel, "gaussian bf16", "bf16", "fp32", _INNER, _GAUSSIAN, num_warps=8),
    entry(pointwise_forward_kernel, "bernoulli bf16", "bf16", "u8", _INNER, _LOGITS),
    entry(pointwise_forward_kernel, "map of any strides", "bf16", "i64", (), _ODD, num_warps=8, multiples=False),
    entry(pointwise_backward_kernel, "bernoulli fp32", "fp32", "u8", _INNER_GRAD, _LOGITS, num_warps=8),
    entry(pointwise_backward_kernel, "bernoulli bf16", "bf16", "u8", _INNER_GRAD, _LOGITS),
    entry(pointwise_backward_kernel, "gaussian bf16", "bf16", "fp32", _INNER_GRAD, _GAUSSIAN, num_warps=8),
    entry(
        pointwise_backward_kernel, "gaussian, any strides", "bf16", "fp32", (), _ODD_GRAD, num_warps=8, multiples=False
    ),
]
