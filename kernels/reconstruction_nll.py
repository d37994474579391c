"""Negative log-likelihood of images: Bernoulli, Gaussian and softmax over levels, forward and backward.

Shapes: B images, E = C*H*W elements an image, P planes of parameters (1 logit; mean and log-variance; K logits).
The forward reads the parameters once and writes a partial sum for each block of elements (or the map); the partial
sums are added in a fixed order by a second, small reduction. The backward reads the parameters once more and writes
their gradient: 12 bytes a float32 parameter in all. Forming the gradient already in the forward would cost 16, since
it had to be read and written again to scale it by the upstream gradient, and would hold it in memory meanwhile.
The discretized mixture of logistics is in logistic_mixture_nll.py.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels.catalogue_entry import Entry

LOGIT_LIMIT = tl.constexpr(1e30)
DEVIATION_LIMIT = tl.constexpr(1e15)
MIN_LOG_VARIANCE = tl.constexpr(-100.0)
MAX_LOG_VARIANCE = tl.constexpr(80.0)
LOG_TWO_PI = tl.constexpr(1.8378770664093453)


# --- device functions


@triton.jit
def saturate(x, low, high):
    """x limited to [low, high]; NaN stays NaN, which tl.clamp does not promise."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def log1p_series(y):
    """log(1 + y) for y in [-0.4, 1] by 2 artanh(y / (2 + y)): full float32 precision also where y is small."""
    s = y / (2 + y)
    q = s * s
    tail = 1 / 9 + q * (1 / 11 + q * (1 / 13 + q * (1 / 15)))
    return 2 * s * (1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * tail))))


@triton.jit
def image_offsets(element, n1, n2, stride_0, stride_1, stride_2, DENSE: tl.constexpr):
    """Offsets of flat element numbers within an image of (n0, n1, n2); dense images need no division.

    An image has fewer than 2^31 elements: the divisions are 32-bit (64-bit ones are calls), the offsets 64-bit."""
    if DENSE:
        return element.to(tl.int64) * stride_2
    row = element // n2
    offset = (row // n1).to(tl.int64) * stride_0 + (row % n1).to(tl.int64) * stride_1
    return offset + (element % n2).to(tl.int64) * stride_2


# --- Bernoulli and Gaussian: one program for a block of elements of one image


@triton.jit
def pointwise_forward_kernel(
    params_ptr,  # (B, P, E)
    target_ptr,  # (B, E)
    out_ptr,  # float32: partial sums (B, blocks), or the map (B, E)
    elements,
    blocks,
    n1,
    n2,
    params_batch,
    params_plane,
    params_0,
    params_1,
    params_2,
    target_batch,
    target_0,
    target_1,
    target_2,
    out_batch,
    out_0,
    out_1,
    out_2,
    GAUSSIAN: tl.constexpr,
    MAP: tl.constexpr,
    DENSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
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
    if MAP:
        out_at = out_ptr + image * out_batch + image_offsets(element, n1, n2, out_0, out_1, out_2, DENSE)
        tl.store(out_at, nll, mask=inside)
    else:
        tl.store(out_ptr + image * blocks + block, tl.sum(tl.where(inside, nll, 0.0), 0))


@triton.jit
def pointwise_backward_kernel(
    params_ptr,  # (B, P, E)
    target_ptr,  # (B, E)
    upstream_ptr,  # float32 (B, E); strides 0 where it is one number an image
    grad_ptr,  # (B, P, E), every element is written
    elements,
    blocks,
    n1,
    n2,
    params_batch,
    params_plane,
    params_0,
    params_1,
    params_2,
    target_batch,
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
    GAUSSIAN: tl.constexpr,
    DENSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = (tl.program_id(0) // blocks).to(tl.int64)
    element = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = element < elements
    params_at = params_ptr + image * params_batch + image_offsets(element, n1, n2, params_0, params_1, params_2, DENSE)
    target_at = target_ptr + image * target_batch + image_offsets(element, n1, n2, target_0, target_1, target_2, DENSE)
    upstream_offset = image_offsets(element, n1, n2, upstream_0, upstream_1, upstream_2, DENSE)
    grad_at = grad_ptr + image * grad_batch + image_offsets(element, n1, n2, grad_0, grad_1, grad_2, DENSE)
    first = tl.load(params_at, mask=inside, other=0.0).to(tl.float32)
    target = tl.load(target_at, mask=inside, other=0).to(tl.float32)
    upstream = tl.load(upstream_ptr + image * upstream_batch + upstream_offset, mask=inside, other=0.0)
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


# --- softmax over K levels: one program for a tile of elements of one image and all their levels


@triton.jit
def load_logits(params_at, level, classes, params_plane, inside):
    """Logits [BLOCK, BLOCK_K] in float32, -inf beyond the last level."""
    valid = inside[:, None] & (level < classes)[None, :]
    logits = tl.load(params_at[:, None] + level.to(tl.int64)[None, :] * params_plane, mask=valid, other=0.0)
    logits = saturate(logits.to(tl.float32), -LOGIT_LIMIT, LOGIT_LIMIT)
    return tl.where((level < classes)[None, :], logits, -float("inf"))


@triton.jit
def categorical_forward_kernel(
    params_ptr,  # (B, K, E)
    target_ptr,  # integers (B, E)
    out_ptr,  # float32: partial sums (B, blocks), or the map (B, E)
    elements,
    blocks,
    classes,
    n1,
    n2,
    params_batch,
    params_plane,
    params_0,
    params_1,
    params_2,
    target_batch,
    target_0,
    target_1,
    target_2,
    out_batch,
    out_0,
    out_1,
    out_2,
    MAP: tl.constexpr,
    DENSE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    image = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    element = block * BLOCK + tl.arange(0, BLOCK)
    inside = element < elements
    level = tl.arange(0, BLOCK_K)
    params_at = params_ptr + image * params_batch + image_offsets(element, n1, n2, params_0, params_1, params_2, DENSE)
    target_at = target_ptr + image * target_batch + image_offsets(element, n1, n2, target_0, target_1, target_2, DENSE)
    target = tl.load(target_at, mask=inside, other=0).to(tl.int64)
    logits = load_logits(params_at, level, classes, params_plane, inside)
    largest = tl.max(logits, 1)
    total = tl.sum(tl.exp(logits - largest[:, None]), 1)
    # A target that names no level reads nothing and is NaN.
    named = inside & (target >= 0) & (target < classes)
    chosen = tl.load(params_at + target * params_plane, mask=named, other=float("nan")).to(tl.float32)
    nll = (largest - saturate(chosen, -LOGIT_LIMIT, LOGIT_LIMIT)) + tl.log(total)
    if MAP:
        out_at = out_ptr + image * out_batch + image_offsets(element, n1, n2, out_0, out_1, out_2, DENSE)
        tl.store(out_at, nll, mask=inside)
    else:
        tl.store(out_ptr + image * blocks + block, tl.sum(tl.where(inside, nll, 0.0), 0))


@triton.jit
def categorical_backward_kernel(
    params_ptr,  # (B, K, E)
    target_ptr,  # integers (B, E)
    upstream_ptr,  # float32 (B, E); strides 0 where it is one number an image
    grad_ptr,  # (B, K, E), every element is written
    elements,
    blocks,
    classes,
    n1,
    n2,
    params_batch,
    params_plane,
    params_0,
    params_1,
    params_2,
    target_batch,
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
    DENSE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    image = (tl.program_id(0) // blocks).to(tl.int64)
    element = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = element < elements
    level = tl.arange(0, BLOCK_K)
    params_at = params_ptr + image * params_batch + image_offsets(element, n1, n2, params_0, params_1, params_2, DENSE)
    target_at = target_ptr + image * target_batch + image_offsets(element, n1, n2, target_0, target_1, target_2, DENSE)
    upstream_offset = image_offsets(element, n1, n2, upstream_0, upstream_1, upstream_2, DENSE)
    grad_at = grad_ptr + image * grad_batch + image_offsets(element, n1, n2, grad_0, grad_1, grad_2, DENSE)
    target = tl.load(target_at, mask=inside, other=0).to(tl.int64)
    upstream = tl.load(upstream_ptr + image * upstream_batch + upstream_offset, mask=inside, other=0.0)
    logits = load_logits(params_at, level, classes, params_plane, inside)
    weights = tl.exp(logits - tl.max(logits, 1)[:, None])
    slope = weights / tl.sum(weights, 1)[:, None] - tl.where(level[None, :] == target[:, None], 1.0, 0.0)
    slope = tl.where(tl.abs(logits) == LOGIT_LIMIT, 0.0, slope)
    valid = inside[:, None] & (level < classes)[None, :]
    grad = (upstream[:, None] * slope).to(grad_ptr.dtype.element_ty)
    tl.store(grad_at[:, None] + level.to(tl.int64)[None, :] * grad_plane, grad, mask=valid)


# --- launching


@dataclass(frozen=True)
class Tile:
    """One program's share of an image and its warps."""

    block: int
    block_k: int
    warps: int


def pointwise_tile(elements: int) -> Tile:
    """1024 elements in 4 warps, so that a thread loads 16 bytes at a time in any dtype; less for a small image."""
    return Tile(min(1024, max(64, triton.next_power_of_2(elements))), 1, 4)


def categorical_tile(classes: int, elements: int, coalesced: bool) -> Tile:
    """A whole softmax (at most 4096 levels) and as many elements as registers allow, in 8 warps.

    Where neighbours in memory are elements (`coalesced`), 8192 logits: for 256 levels 32 elements, a 128-byte line in
    float32, at about 116 registers. Elsewhere (levels side by side, or an image that is no dense run) each row has an
    address of its own: 4096 logits, at most 186 registers, where 8192 would spill."""
    block_k = max(2, triton.next_power_of_2(classes))
    block = max(1, (8192 if coalesced else 4096) // block_k)
    return Tile(min(block, triton.next_power_of_2(elements)), block_k, 8)


def collapse(sizes: tuple[int, ...], *strides: tuple[int, ...]) -> tuple[tuple[int, int, int], list[tuple[int, ...]]]:
    """At most three image dimensions in the order of the first tensor's memory, joined where all tensors allow it.

    Returns the sizes (n0, n1, n2) and each tensor's strides; n0 = n1 = 1 where the image is one dense run in all.
    """
    joined: list[tuple[int, list[int]]] = []
    for dim in sorted((d for d in range(len(sizes)) if sizes[d] > 1), key=lambda d: -strides[0][d]):
        inner = [stride[dim] for stride in strides]
        if joined and all(a == b * sizes[dim] for a, b in zip(joined[-1][1], inner, strict=True)):
            joined[-1] = (joined[-1][0] * sizes[dim], inner)
        else:
            joined.append((sizes[dim], inner))
    joined = [(1, [0] * len(strides))] * (3 - len(joined)) + joined
    n0, n1, n2 = (size for size, _ in joined)
    return (n0, n1, n2), [tuple(inner[tensor] for _, inner in joined) for tensor in range(len(strides))]


def forward(params: Tensor, target: Tensor, kind: str, per_element: bool) -> Tensor:
    """Nats: (B,), or the map (B, C, H, W). params (B, P, C, H, W) and target (B, C, H, W), any strides."""
    batch, classes = params.shape[:2]
    if target.numel() == 0:
        return params.new_zeros(target.shape if per_element else (batch,), dtype=torch.float32)
    sizes, elements = tuple(target.shape[1:]), target[0].numel()
    out_strides = (sizes[1] * sizes[2], sizes[2], 1) if per_element else (0, 0, 0)
    (n0, n1, n2), image = collapse(sizes, params.stride()[2:], target.stride()[1:], out_strides)
    dense = n0 == n1 == 1
    tile = _tile(kind, classes, elements, dense and image[0][2] == 1)
    blocks = triton.cdiv(elements, tile.block)
    out = params.new_empty(target.shape if per_element else (batch, blocks), dtype=torch.float32)
    strides = (params.stride(0), params.stride(1), *image[0], target.stride(0), *image[1], out.stride(0), *image[2])
    options = {"MAP": per_element, "DENSE": dense, "BLOCK": tile.block, "num_warps": tile.warps}
    pointers, grid = (params, target, out), (batch * blocks,)
    if kind == "categorical":
        numbers = (elements, blocks, classes, n1, n2)
        categorical_forward_kernel[grid](*pointers, *numbers, *strides, BLOCK_K=tile.block_k, **options)
    else:
        options["GAUSSIAN"] = kind == "gaussian"
        pointwise_forward_kernel[grid](*pointers, elements, blocks, n1, n2, *strides, **options)
    if per_element:
        return out
    return out.sum(1) if blocks > 1 else out.squeeze(1)


def backward(params: Tensor, target: Tensor, upstream: Tensor, grad: Tensor, kind: str) -> None:
    """Writes the gradient of params into grad, of the same shape; upstream float32, expanded to (B, C, H, W)."""
    if target.numel() == 0:
        return
    batch, classes = params.shape[:2]
    sizes, elements = tuple(target.shape[1:]), target[0].numel()
    tensors = (params.stride()[2:], target.stride()[1:], upstream.stride()[1:], grad.stride()[2:])
    (n0, n1, n2), image = collapse(sizes, *tensors)
    dense = n0 == n1 == 1
    tile = _tile(kind, classes, elements, dense and image[0][2] == 1)
    blocks = triton.cdiv(elements, tile.block)
    strides = (params.stride(0), params.stride(1), *image[0], target.stride(0), *image[1])
    strides += (upstream.stride(0), *image[2], grad.stride(0), grad.stride(1), *image[3])
    options = {"DENSE": dense, "BLOCK": tile.block, "num_warps": tile.warps}
    pointers, grid = (params, target, upstream, grad), (batch * blocks,)
    if kind == "categorical":
        numbers = (elements, blocks, classes, n1, n2)
        categorical_backward_kernel[grid](*pointers, *numbers, *strides, BLOCK_K=tile.block_k, **options)
    else:
        options["GAUSSIAN"] = kind == "gaussian"
        pointwise_backward_kernel[grid](*pointers, elements, blocks, n1, n2, *strides, **options)


def _tile(kind: str, classes: int, elements: int, coalesced: bool) -> Tile:
    return categorical_tile(classes, elements, coalesced) if kind == "categorical" else pointwise_tile(elements)


# --- the compile gate


def entry(kernel, config: str, params: str, target: str, unit: tuple[str, ...], warps: int, **constexprs) -> Entry:
    """A catalogue entry: types of params and target, the strides that are 1, the kernel's constexprs."""
    kinds = {"params_ptr": f"*{params}", "grad_ptr": f"*{params}", "target_ptr": f"*{target}", "half": "fp32"}
    kinds |= {"out_ptr": "*fp32", "upstream_ptr": "*fp32", "log_half": "fp32"}
    constexprs |= dict.fromkeys(unit, 1)
    signature = {name: kinds.get(name, "i32") for name in kernel.arg_names if name not in constexprs}
    aligned = tuple(name for name in signature if name.endswith(("_batch", "_plane")))
    return Entry(kernel, config, signature, constexprs, aligned=aligned, num_warps=warps)


_INNER, _INNER_GRAD = ("params_2", "target_2"), ("params_2", "target_2", "grad_2")
_ROW = {"BLOCK": 32, "BLOCK_K": 256, "DENSE": True}
_SCATTERED = {"BLOCK": 16, "BLOCK_K": 256, "DENSE": False}
_POINT = {"BLOCK": 1024, "DENSE": True}
CATALOGUE: list[Entry] = [
    entry(pointwise_forward_kernel, "bernoulli fp32", "fp32", "u8", _INNER, 4, GAUSSIAN=False, MAP=False, **_POINT),
    entry(pointwise_forward_kernel, "gaussian bf16", "bf16", "fp32", _INNER, 4, GAUSSIAN=True, MAP=False, **_POINT),
    entry(pointwise_forward_kernel, "map", "bf16", "i64", (), 4, GAUSSIAN=False, MAP=True, BLOCK=1024, DENSE=False),
    entry(pointwise_backward_kernel, "bernoulli fp32", "fp32", "u8", _INNER_GRAD, 4, GAUSSIAN=False, **_POINT),
    entry(pointwise_backward_kernel, "gaussian bf16", "bf16", "fp32", (), 4, GAUSSIAN=True, BLOCK=1024, DENSE=False),
    entry(categorical_forward_kernel, "fp32", "fp32", "u8", _INNER, 8, MAP=False, **_ROW),
    entry(
        categorical_forward_kernel,
        "map, levels inside, bf16",
        "bf16",
        "i64",
        ("params_plane",),
        8,
        MAP=True,
        **_SCATTERED,
    ),
    entry(categorical_backward_kernel, "fp32", "fp32", "u8", _INNER_GRAD, 8, **_ROW),
    entry(
        categorical_backward_kernel,
        "levels inside, bf16",
        "bf16",
        "i64",
        ("params_plane", "grad_plane"),
        8,
        **_SCATTERED,
    ),
    entry(categorical_backward_kernel, "scattered, bf16", "bf16", "u8", ("params_2", "grad_2"), 8, **_SCATTERED),
    entry(categorical_backward_kernel, "4096 levels", "fp32", "i64", _INNER_GRAD, 8, BLOCK=2, BLOCK_K=4096, DENSE=True),
]
