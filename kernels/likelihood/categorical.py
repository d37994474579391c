"""Negative log-likelihood of a softmax over K levels, forward and backward.

A program has BLOCK elements of an image. It walks their levels in parts of PART and keeps a running maximum and sum.
If neighbours in memory are elements, a thread has an element, and threads exchange nothing. If they are levels, a part
has all levels. The forward saves the maximum and the sum: the backward has nothing to add up and computes each gradient
from its logit, 12 bytes a float32 logit in all.
"""

import math

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
    saturate,
    store_nll,
    summed,
    upstream_strides,
)


@triton.jit
def load_logits(params_at, level, classes, params_plane, inside):
    """Logits (PART, BLOCK) in float32, -inf beyond the last level."""
    real = (level < classes)[:, None]
    at = params_at[None, :] + level.to(tl.int64)[:, None] * params_plane
    logits = saturate(tl.load(at, real & inside[None, :], other=0.0).to(tl.float32), -LOGIT_LIMIT, LOGIT_LIMIT)
    return tl.where(real, logits, -float("inf"))


@triton.jit
def categorical_forward_kernel(
    params_ptr,  # (B, K, E)
    target_ptr,  # integers (B, E)
    out_ptr,  # float32: partial sums (B, blocks), or the map (B, E)
    kept_ptr,  # float32 (B, 2, E) contiguous, written: the largest logit, one over the sum of exp; or None
    elements, blocks, classes,
    n1, n2,
    params_batch, params_plane, params_0, params_1, params_2,
    target_batch, target_0, target_1, target_2,
    out_batch, out_0, out_1, out_2,
    MAP: tl.constexpr, DENSE: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    image = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    element = block * BLOCK + tl.arange(0, BLOCK)
    inside = element < elements
    params_at = params_ptr + image * params_batch + image_offsets(element, n1, n2, params_0, params_1, params_2, DENSE)
    target_at = target_ptr + image * target_batch + image_offsets(element, n1, n2, target_0, target_1, target_2, DENSE)
    target = tl.load(target_at, mask=inside, other=0).to(tl.int64)
    # A target that names no level reads nothing and is NaN.
    named = inside & (target >= 0) & (target < classes)
    chosen = tl.load(params_at + target * params_plane, mask=named, other=float("nan")).to(tl.float32)
    largest = tl.full((BLOCK,), -LOGIT_LIMIT, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, classes, PART):
        logits = load_logits(params_at, first + tl.arange(0, PART), classes, params_plane, inside)
        before = largest
        largest = tl.maximum(largest, tl.max(logits, 0))
        total = total * tl.exp(before - largest) + tl.sum(tl.exp(logits - largest[None, :]), 0)
    nll = (largest - saturate(chosen, -LOGIT_LIMIT, LOGIT_LIMIT)) + tl.log(total)
    if kept_ptr is not None:
        kept_at = kept_ptr + 2 * image * elements + element
        tl.store(kept_at, largest, inside)
        tl.store(kept_at + elements, 1 / total, inside)
    store_nll(out_ptr, nll, inside, image, block, blocks, (out_batch, out_0, out_1, out_2), element, n1, n2, MAP, DENSE)


@triton.jit
def categorical_backward_kernel(
    params_ptr,  # (B, K, E)
    target_ptr,  # integers (B, E)
    upstream_ptr,  # float32 (B,), or a map (B, E)
    grad_ptr,  # (B, K, E), every element is written
    kept_ptr,  # float32 (B, 2, E) contiguous, of the forward
    elements, blocks, classes,
    n1, n2,
    params_batch, params_plane, params_0, params_1, params_2,
    target_batch, target_0, target_1, target_2,
    upstream_batch, upstream_0, upstream_1, upstream_2,
    grad_batch, grad_plane, grad_0, grad_1, grad_2,
    MAP: tl.constexpr, DENSE: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    image = (tl.program_id(0) // blocks).to(tl.int64)
    element = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = element < elements
    params_at = params_ptr + image * params_batch + image_offsets(element, n1, n2, params_0, params_1, params_2, DENSE)
    target_at = target_ptr + image * target_batch + image_offsets(element, n1, n2, target_0, target_1, target_2, DENSE)
    grad_at = grad_ptr + image * grad_batch + image_offsets(element, n1, n2, grad_0, grad_1, grad_2, DENSE)
    target = tl.load(target_at, mask=inside, other=0).to(tl.int64)[None, :]
    strides = (upstream_batch, upstream_0, upstream_1, upstream_2)
    upstream = load_upstream(upstream_ptr, image, element, inside, strides, n1, n2, MAP, DENSE)
    kept_at = kept_ptr + 2 * image * elements + element
    largest = tl.load(kept_at, inside, other=0.0)[None, :]
    scale = tl.load(kept_at + elements, inside, other=0.0)[None, :]
    for first in range(0, classes, PART):
        level = first + tl.arange(0, PART)
        logits = load_logits(params_at, level, classes, params_plane, inside)
        slope = tl.exp(logits - largest) * scale - tl.where(level[:, None] == target, 1.0, 0.0)
        slope = tl.where(tl.abs(logits) == LOGIT_LIMIT, 0.0, slope)
        grad = (upstream * slope).to(grad_ptr.dtype.element_ty)
        at = grad_at[None, :] + level.to(tl.int64)[:, None] * grad_plane
        tl.store(at, grad, mask=inside[None, :] & (level < classes)[:, None])


def tile_of(classes: int, elements: int, neighbours: bool, size: int) -> dict[str, int]:
    """BLOCK, PART, num_warps. neighbours: those in memory are elements; size: bytes of a logit.

    A thread then loads 16 bytes at a time, of 16 levels in float32: that is enough on its way, and the registers hold
    it. Elsewhere a softmax (of at most 4096 levels) is a part.
    """
    if not neighbours:
        part = max(2, next_power_of_2(classes))
        return {"BLOCK": min(max(1, 4096 // part), next_power_of_2(elements)), "PART": part, "num_warps": 8}
    of_a_warp = 512 // size
    num_warps = 4 if elements >= 16 * of_a_warp else 1  # small images leave few threads idle
    return {"BLOCK": num_warps * of_a_warp, "PART": 4 * size, "num_warps": num_warps}


def forward(params: Tensor, target: Tensor, per_element: bool, save: bool) -> tuple[Tensor, Tensor | None]:
    """Nats: (B,), or the map (B, C, H, W); and what the backward needs, with `save`.

    params (B, K, C, H, W) and target (B, C, H, W), any strides.
    """
    batch, *sizes = target.shape
    elements, classes = math.prod(sizes), params.shape[1]
    device = params.device
    kept = torch.empty(batch, 2, *sizes, dtype=torch.float32, device=device) if save else None
    if batch * elements == 0:
        return torch.zeros(target.shape if per_element else (batch,), dtype=torch.float32, device=device), kept
    out_strides = (elements, sizes[1] * sizes[2], sizes[2], 1) if per_element else (0, 0, 0, 0)
    (dense, neighbours), inner, strides = addresses(tuple(sizes), params.stride(), target.stride(), out_strides)
    tile = tile_of(classes, elements, neighbours, params.element_size())
    blocks = cdiv(elements, tile["BLOCK"])
    out = torch.empty(target.shape if per_element else (batch, blocks), dtype=torch.float32, device=device)
    args = (params, target, out, kept, elements, blocks, classes, *inner, *strides)
    launch(categorical_forward_kernel, (batch * blocks,), args, {"MAP": per_element, "DENSE": dense, **tile})
    return summed(out, per_element), kept


def backward(params: Tensor, target: Tensor, upstream: Tensor, kept: Tensor, grad: Tensor) -> None:
    """Writes the gradient of params into grad, of the same shape; upstream float32, (B,) or (B, C, H, W)."""
    batch, *sizes = target.shape
    elements, classes = math.prod(sizes), params.shape[1]
    if batch * elements == 0:
        return
    (dense, neighbours), inner, strides = addresses(
        tuple(sizes), params.stride(), target.stride(), upstream_strides(upstream, 3), grad.stride()
    )
    tile = tile_of(classes, elements, neighbours, params.element_size())
    blocks = cdiv(elements, tile["BLOCK"])
    args = (params, target, upstream, grad, kept, elements, blocks, classes, *inner, *strides)
    launch(categorical_backward_kernel, (batch * blocks,), args, {"MAP": upstream.dim() > 1, "DENSE": dense, **tile})


_INNER, _INNER_GRAD = ("params_2", "target_2"), ("params_2", "target_2", "grad_2")
_LEVEL, _LEVEL_GRAD = ("params_plane",), ("params_plane", "grad_plane")
_FP32 = {"BLOCK": 512, "PART": 16, "MAP": False, "DENSE": True}
_BF16 = {"BLOCK": 1024, "PART": 8, "MAP": False, "DENSE": True}
_INSIDE = {"BLOCK": 16, "PART": 256, "MAP": True, "DENSE": False}
_MANY = {"BLOCK": 1, "PART": 4096, "MAP": False, "DENSE": False}
_SMALL = {"BLOCK": 128, "PART": 16, "MAP": True, "DENSE": True}
CATALOGUE: list[Entry] = [
    entry(categorical_forward_kernel, "fp32", "fp32", "u8", _INNER, _FP32),
    entry(categorical_forward_kernel, "bf16", "bf16", "u8", _INNER, _BF16),
    entry(categorical_forward_kernel, "small", "fp32", "i64", _INNER, _SMALL, num_warps=1),
    entry(categorical_forward_kernel, "inside", "bf16", "i64", _LEVEL, _INSIDE, num_warps=8),
    entry(categorical_backward_kernel, "fp32", "fp32", "u8", _INNER_GRAD, _FP32),
    entry(categorical_backward_kernel, "bf16", "bf16", "u8", _INNER_GRAD, _BF16),
    entry(categorical_backward_kernel, "small", "fp32", "i64", _INNER_GRAD, _SMALL, num_warps=1),
    entry(categorical_backward_kernel, "inside", "bf16", "i64", _LEVEL_GRAD, _INSIDE, num_warps=8),
    entry(categorical_backward_kernel, "4096 inside", "fp32", "i64", _LEVEL_GRAD, _MANY, num_warps=8),
    entry(
        categorical_backward_kernel,
        "scattered",
        "bf16",
        "u8",
        ("params_2", "grad_2"),
        _INSIDE,
        num_warps=8,
        multiples=False,
    ),
]
