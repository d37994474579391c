"""Backward of the masked convolution: through the activation, and the gradient of the weight and the biases.

Through the activation: one pass reads the incoming gradient and what was kept, writes the gradient of the sums
(channels-last, for the two products that follow) and adds it up for the biases. With a gate, out = t * s with
t = tanh(a), s = sigmoid(b), kept are out and b: t = out / s, and

    da = g * s * (1 - t^2) = g * (s - out * t)        db = g * t * s * (1 - s) = g * out * (1 - s)

Doing this inside the two products instead would repeat it for every tap and tile, and would keep their loads from
being asynchronous; the pass costs about 5 C of 16-bit traffic a pixel, beside products that are bound by operations.

Gradient of the weight: a program owns one live pair (tile of O rows, block of columns) and a share of the pixels. Its
sum goes to a buffer of its own (float32); a second kernel adds the shares in a fixed order and writes every weight,
exactly zero where masked. With atomics the shares are added in the first kernel, in any order.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels.masked_conv2d_config import Tile
from fastgen.kernels.masked_conv2d_gemm import AMD, INTS, ONLY_AMD, WGMMA, catalogue_entry, product
from fastgen.kernels.masked_conv2d_plan import Geometry, Plan

PROGRAMS = 512  # shares are cut so that about as many programs run; a constant, so that sums do not depend on the chip
SUM_PROGRAMS = 1024


@triton.jit
def masked_conv2d_activation_backward_kernel(
    grad_ptr,  # (B, height, width, rows), strides below, or None for zeros
    grad_pre_ptr,  # (B, height, width, parts * rows) or None: gradient of the sums themselves, added
    out_ptr,  # (B, height, width, rows) contiguous: the result; not read without an activation
    kept_ptr,  # gate: (.., rows) the second half, or (.., 2 * rows) both halves
    grad_sums_ptr,  # written: (B, height, width, parts * rows) at `pitch` a pixel, or None
    sums_ptr,  # written: (programs along the pixels, parts * rows) float32, or None
    group,  # pixels that share a bias: height * width for an image's own, all of them for none
    shares,  # programs of a group
    steps,  # blocks of pixels a program walks through
    height,
    width,
    rows,
    pitch,
    grad_image,
    grad_y,
    grad_x,
    grad_channel,
    grad_pre_image,
    grad_pre_y,
    grad_pre_x,
    grad_pre_channel,
    ACTIVATION: tl.constexpr,
    KEPT_BOTH: tl.constexpr,
    PIXELS: tl.constexpr,
    ROWS: tl.constexpr,
):
    n = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[None, :]
    start = tl.program_id(0) // shares * group
    end = start + group
    start += tl.program_id(0) % shares * steps * PIXELS
    first_sum = tl.zeros((1, ROWS), tl.float32)
    second_sum = tl.zeros((1, ROWS), tl.float32)
    for step in range(steps):
        pixel = (start + step * PIXELS + tl.arange(0, PIXELS))[:, None]
        inside = (pixel < end) & (n < rows)
        image = (pixel // (height * width)).to(tl.int64)
        y = (pixel // width % height).to(tl.int64)
        x = (pixel % width).to(tl.int64)
        pixel = pixel.to(tl.int64)
        first = tl.zeros((PIXELS, ROWS), tl.float32)
        second = tl.zeros((PIXELS, ROWS), tl.float32)
        if grad_ptr is not None:
            at = grad_ptr + image * grad_image + y * grad_y + x * grad_x + n.to(tl.int64) * grad_channel
            first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            if ACTIVATION == "relu":
                out = tl.load(out_ptr + pixel * rows + n, mask=inside, other=0.0).to(tl.float32)
                first = tl.where(out > 0, first, tl.where(out == 0, 0.0, first * out))  # NaN stays NaN
            if ACTIVATION == "gated":
                out = tl.load(out_ptr + pixel * rows + n, mask=inside, other=0.0).to(tl.float32)
                kept = kept_ptr + pixel * rows + n
                if KEPT_BOTH:
                    kept = kept_ptr + pixel * (2 * rows) + rows + n
                s = tl.sigmoid(tl.load(kept, mask=inside, other=0.0).to(tl.float32))
                t = tl.where(s > 0, out / s, 0.0)
                t = tl.where(t > 1, 1.0, tl.where(t < -1, -1.0, t))
                second = first * out * (1 - s)
                first = first * (s - out * t)
        if grad_pre_ptr is not None:
            at = grad_pre_ptr + image * grad_pre_image + y * grad_pre_y + x * grad_pre_x
            first += tl.load(at + n.to(tl.int64) * grad_pre_channel, mask=inside, other=0.0).to(tl.float32)
            if ACTIVATION == "gated":
                at += (n + rows).to(tl.int64) * grad_pre_channel
                second += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        if grad_sums_ptr is not None:
            at = grad_sums_ptr + pixel * pitch + n
            tl.store(at, first.to(grad_sums_ptr.dtype.element_ty), mask=inside)
            if ACTIVATION == "gated":
                tl.store(at + rows, second.to(grad_sums_ptr.dtype.element_ty), mask=inside)
        first_sum += tl.sum(tl.where(inside, first, 0.0), 0)[None, :]
        second_sum += tl.sum(tl.where(inside, second, 0.0), 0)[None, :]
    if sums_ptr is not None:
        parts: tl.constexpr = 2 if ACTIVATION == "gated" else 1
        at = sums_ptr + tl.program_id(0).to(tl.int64) * (parts * rows) + n
        tl.store(at, first_sum, mask=n < rows)
        if ACTIVATION == "gated":
            tl.store(at + rows, second_sum, mask=n < rows)


@triton.jit
def masked_conv2d_weight_kernel(
    grad_ptr,  # gradient of the sums (B, height, width, rows), channels side by side
    x_ptr,  # (B, x_height, x_width, channels)
    partial_ptr,  # (shares, rows, columns) float32, written; zeros before, with atomics
    entries_ptr,
    columns_ptr,
    pixels,
    steps,  # blocks of pixels a program walks through
    height,
    width,
    x_height,
    x_width,
    x_step_y,
    x_step_x,
    channels,
    rows,
    columns,
    grad_image,
    grad_y,
    grad_x,
    x_image,
    x_y,
    x_x,
    x_channel,
    GATHER: tl.constexpr,
    ATOMIC: tl.constexpr,
    PRECISION: tl.constexpr,
    M: tl.constexpr,  # pixels a step
    N: tl.constexpr,  # rows
    K: tl.constexpr,  # columns
):
    entry = entries_ptr + tl.program_id(0) * INTS
    column = tl.load(entry + 3) * K
    n = tl.load(entry + 4) * N + tl.arange(0, N)
    k = tl.arange(0, K)
    if GATHER:
        channel = tl.load(columns_ptr + column + k)
        dy = tl.load(columns_ptr + 3 * columns + column + k)[None, :]
        dx = tl.load(columns_ptr + 4 * columns + column + k)[None, :]
        real = channel >= 0
    else:
        dy = tl.load(entry)
        dx = tl.load(entry + 1)
        channel = tl.load(entry + 2) * K + k
        real = channel < channels
    within = channel.to(tl.int64)[None, :] * x_channel + dy.to(tl.int64) * x_y + dx.to(tl.int64) * x_x
    total = tl.zeros((N, K), tl.float32)
    start = tl.program_id(1) * steps * M
    for step in range(steps):
        pixel = (start + step * M + tl.arange(0, M))[:, None]
        image = (pixel // (height * width)).to(tl.int64)
        i, j = pixel // width % height, pixel % width
        at = grad_ptr + image * grad_image + i.to(tl.int64) * grad_y + j.to(tl.int64) * grad_x + n[None, :]
        grad = tl.load(at, mask=(pixel < pixels) & (n < rows)[None, :], other=0.0)
        y, x = i * x_step_y, j * x_step_x
        seen = (pixel < pixels) & real[None, :]
        seen = seen & (y + dy >= 0) & (y + dy < x_height) & (x + dx >= 0) & (x + dx < x_width)
        at = x_ptr + image * x_image + y.to(tl.int64) * x_y + x.to(tl.int64) * x_x + within
        total = product(tl.trans(grad), tl.load(at, mask=seen, other=0.0), total, PRECISION)
    at = n.to(tl.int64)[:, None] * columns + column + k[None, :]
    if ATOMIC:
        tl.atomic_add(partial_ptr + at, total, mask=(n < rows)[:, None], sem="relaxed")
    else:
        at += tl.program_id(1).to(tl.int64) * rows * columns
        tl.store(partial_ptr + at, total, mask=(n < rows)[:, None])


@triton.jit
def masked_conv2d_weight_sum_kernel(
    partial_ptr,  # (shares, rows, columns) float32
    mask_ptr,  # bool (rows, weights of a row) contiguous, or None
    out_ptr,  # the same shape, contiguous, written whole
    places_ptr,  # (weights of a row,) int32
    shares,
    rows,
    columns,
    weights,
    BLOCK: tl.constexpr,
):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = element // weights
    inside = row < rows
    place = tl.load(places_ptr + element % weights, mask=inside, other=-1)
    live = inside & (place >= 0)
    if mask_ptr is not None:
        live = live & (tl.load(mask_ptr + element, mask=inside, other=0) != 0)
    total = tl.zeros((BLOCK,), tl.float32)
    at = partial_ptr + row * columns + place
    for share in range(shares):
        total += tl.load(at + share * tl.full((), 1, tl.int64) * rows * columns, mask=live, other=0.0)
    tl.store(out_ptr + element, total.to(out_ptr.dtype.element_ty), mask=inside)


# --- launching


def through_activation(
    grad: Tensor | None,
    grad_pre: Tensor | None,
    out: Tensor,
    kept: Tensor,
    activation: str,
    write: bool,
    sums: str,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradient of the sums (B, parts * rows, H, W), where `write`, and its sums over pixels, float32.

    sums: "" for none, "all" (1, parts * rows), "image" (B, parts * rows). out gives the shape (B, rows, H, W).
    """
    batch, rows, height, width = out.shape
    parts = 2 if activation == "gated" else 1
    blocks = (32, 64) if rows > 32 else (128, 16)
    groups = batch if sums == "image" else 1
    group = batch * height * width // groups
    shares = max(1, min(triton.cdiv(group, blocks[0]), SUM_PROGRAMS // (groups * triton.cdiv(rows, blocks[1])) or 1))
    steps = triton.cdiv(triton.cdiv(group, blocks[0]), shares)
    shares = triton.cdiv(group, steps * blocks[0])
    pitch = -(-parts * rows // 16) * 16
    written = None
    if write:
        written = out.new_empty(batch, height, width, pitch)[..., : parts * rows].permute(0, 3, 1, 2)
    found = out.new_empty(groups * shares, parts * rows, dtype=torch.float32) if sums else None
    strides = [0 if one is None else one.stride(axis) for one in (grad, grad_pre) for axis in (0, 2, 3, 1)]
    masked_conv2d_activation_backward_kernel[(groups * shares, triton.cdiv(rows, blocks[1]))](
        grad, grad_pre, out, kept, written, found, group, shares, steps, height, width, rows, pitch, *strides,
        ACTIVATION=activation, KEPT_BOTH=kept.shape[1:2] == (2 * rows,), PIXELS=blocks[0], ROWS=blocks[1],
    )  # fmt: skip
    return written, None if found is None else found.view(groups, shares, parts * rows).sum(1)


def sum_weight_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    plan: Plan,
    geometry: Geometry,
    tile: Tile,
    precision: str,
    atomic: bool,
) -> Tensor:
    """Of the shape of weight, contiguous. grad (B, O, H', W') with channels side by side, x as from `channels_last`."""
    batch, rows, height, width = grad.shape
    columns = plan.columns.shape[1]
    pixels = batch * height * width
    out = torch.empty_like(weight, memory_format=torch.contiguous_format)
    if plan.pairs == 0:
        return out.zero_()
    blocks = triton.cdiv(pixels, tile.M)
    steps = triton.cdiv(blocks, max(1, min(PROGRAMS // plan.pairs, blocks // 8)))
    shares = triton.cdiv(blocks, steps)
    make = weight.new_zeros if atomic else weight.new_empty
    partial = make(1 if atomic else shares, rows, columns, dtype=torch.float32)
    masked_conv2d_weight_kernel[(plan.pairs, shares)](
        grad, x, partial, plan.entries, plan.columns, pixels, steps, height, width, x.shape[2], x.shape[3],
        *geometry.stride, x.shape[1], rows, columns, grad.stride(0), grad.stride(2), grad.stride(3),
        x.stride(0), x.stride(2), x.stride(3), x.stride(1), GATHER=plan.blocks.gather, ATOMIC=atomic,
        PRECISION=precision, M=tile.M, N=tile.N, K=tile.K, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    block = 256
    masked_conv2d_weight_sum_kernel[(triton.cdiv(weight.numel(), block),)](
        partial, None if mask is None else mask.contiguous(), out, plan.places, partial.shape[0], rows, columns,
        weight[0].numel(), BLOCK=block,
    )  # fmt: skip
    return out


# --- what ships, for the compile gate


def _weight_entry(dtype: str, tile: Tile, *, gather: bool = False, atomic: bool = False, **more: Any) -> Any:
    precision = "tf32" if dtype == "fp32" and tile.M > 16 else "ieee"
    fixed = {"GATHER": gather, "ATOMIC": atomic, "PRECISION": precision, "M": tile.M, "N": tile.N, "K": tile.K}
    fixed |= {"x_step_y": 1, "x_step_x": 1}
    if not gather:
        fixed["x_channel"] = 1
    kind = f"{', gathered' if gather else ''}{', atomic' if atomic else ''}"
    config = f"{dtype} {tile.N}x{tile.K} of {tile.M} pixels{kind}"
    return catalogue_entry(masked_conv2d_weight_kernel, config, dtype, fixed, tile, **more)


def _activation_entry(dtype: str, activation: str, pixels: int, rows: int, **absent: None) -> Any:
    fixed = {"ACTIVATION": activation, "KEPT_BOTH": False, "PIXELS": pixels, "ROWS": rows, "grad_channel": 1} | absent
    if "grad_pre_ptr" not in absent:
        fixed |= {"KEPT_BOTH": True, "grad_pre_channel": 1}
    config = f"{dtype} {activation} {pixels}x{rows}{'' if 'grad_pre_ptr' in absent else ', sums used too'}"
    return catalogue_entry(masked_conv2d_activation_backward_kernel, config, dtype, fixed, Tile(0, 0, 0, 4, 3))


CATALOGUE = [
    _weight_entry("bf16", Tile(64, 128, 128, 8, 3), requires=WGMMA, skips=AMD),
    _weight_entry("bf16", Tile(64, 128, 128, 8, 3), atomic=True, requires=WGMMA, skips=AMD),
    _weight_entry("bf16", Tile(64, 128, 128, 8, 2), skips=ONLY_AMD),
    _weight_entry(
        "fp32", Tile(32, 128, 128, 8, 3), skips=AMD, spills={"sm_120": 16}, reason="ptxas stops at 128 there"
    ),
    _weight_entry("fp32", Tile(16, 64, 32, 4, 2)),
    _weight_entry("bf16", Tile(64, 128, 32, 4, 3), gather=True, skips=AMD),
    _activation_entry("bf16", "gated", 32, 64),
    _activation_entry("bf16", "gated", 32, 64, grad_pre_ptr=None),
    _activation_entry("fp32", "relu", 32, 64, grad_pre_ptr=None, kept_ptr=None),
    catalogue_entry(masked_conv2d_weight_sum_kernel, "bf16", "bf16", {"BLOCK": 256}, Tile(0, 0, 0, 4, 3)),
]
