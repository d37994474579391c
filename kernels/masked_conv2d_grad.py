"""The gradient of the weight of a masked convolution, and with it that of the bias.

A program owns one live pair (tile of rows of the weight, block of columns) and a share of the pixels. Its sum goes to a
buffer of its own (float32); a second kernel adds the shares in a fixed order and writes every weight, exactly zero
where masked. With atomics the shares are added in the first kernel, in any order.

The first of the programs that see a tile of rows also adds up the gradient of the sums, which is that of the bias: it
has loaded it anyway. That may be the gradient of a result, taken through the activation on loading; see
masked_conv2d_activation.py.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels.catalogue_entry import Entry
from fastgen.kernels.masked_conv2d_activation import Incoming, absent_maps, back, catalogue_entry
from fastgen.kernels.masked_conv2d_config import Tile
from fastgen.kernels.masked_conv2d_gemm import AMD, INTS, ONLY_AMD, WGMMA, product
from fastgen.kernels.masked_conv2d_plan import Geometry, Plan

# Shares are cut so that about as many programs run, two on each multiprocessor of a Hopper: every share is written and
# read again, which with more would be more than the maps for few images. A constant: sums do not depend on the chip.
PROGRAMS = 256


@triton.jit
def masked_conv2d_weight_kernel(
    grad_ptr,  # (B, height, width, rows), channels side by side: gradient of the sums, or of what SAVED leads back from
    first_ptr,  # of the same strides; see `back`
    second_ptr,
    x_ptr,  # (B, x_height, x_width, channels)
    partial_ptr,  # (shares, parts * rows, columns) float32, written; zeros before, with atomics
    sums_ptr,  # (shares, parts * rows) float32, written: sums over pixels, or None
    entries_ptr,
    starts_ptr,
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
    rows,  # of a part
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
    SAVED: tl.constexpr,
    PRECISION: tl.constexpr,
    M: tl.constexpr,  # pixels a step
    N: tl.constexpr,  # rows
    K: tl.constexpr,  # columns
):
    parts: tl.constexpr = 2 if SAVED == "valve" else 1
    entry = entries_ptr + tl.program_id(0) * INTS
    column = tl.load(entry + 3) * K
    tile = tl.load(entry + 4)
    n = tile * N + tl.arange(0, N)
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
    total_second = tl.zeros((N, K), tl.float32)
    sums = tl.zeros((N,), tl.float32)
    sums_second = tl.zeros((N,), tl.float32)
    is_first = tl.program_id(0) == tl.load(starts_ptr + tile)
    start = tl.program_id(1) * steps * M
    for step in range(steps):
        pixel = (start + step * M + tl.arange(0, M))[:, None]
        image = (pixel // (height * width)).to(tl.int64)
        i, j = pixel // width % height, pixel % width
        at = image * grad_image + i.to(tl.int64) * grad_y + j.to(tl.int64) * grad_x + n[None, :]
        inside = (pixel < pixels) & (n < rows)[None, :]
        if SAVED == "none":
            first = tl.load(grad_ptr + at, mask=inside, other=0.0)
            second = first
        else:
            first, second = back(grad_ptr, first_ptr, second_ptr, at, at, inside, SAVED)
        if sums_ptr is not None and is_first:
            sums += tl.sum(first.to(tl.float32), 0)
            if parts == 2:
                sums_second += tl.sum(second, 0)
        y, x = i * x_step_y, j * x_step_x
        seen = (pixel < pixels) & real[None, :]
        seen = seen & (y + dy >= 0) & (y + dy < x_height) & (x + dx >= 0) & (x + dx < x_width)
        at = image * x_image + y.to(tl.int64) * x_y + x.to(tl.int64) * x_x + within
        read = tl.load(x_ptr + at, mask=seen, other=0.0)
        kind = x_ptr.dtype.element_ty
        total = product(tl.trans(first.to(kind)), read, total, PRECISION)
        if parts == 2:
            total_second = product(tl.trans(second.to(kind)), read, total_second, PRECISION)
    at = n.to(tl.int64)[:, None] * columns + column + k[None, :]
    if ATOMIC:
        tl.atomic_add(partial_ptr + at, total, mask=(n < rows)[:, None], sem="relaxed")
        if parts == 2:
            at += rows.to(tl.int64) * columns
            tl.atomic_add(partial_ptr + at, total_second, mask=(n < rows)[:, None], sem="relaxed")
    else:
        at += tl.program_id(1).to(tl.int64) * (parts * rows) * columns
        tl.store(partial_ptr + at, total, mask=(n < rows)[:, None])
        if parts == 2:
            tl.store(partial_ptr + at + rows.to(tl.int64) * columns, total_second, mask=(n < rows)[:, None])
    if sums_ptr is not None and is_first:
        at_sums = sums_ptr + tl.program_id(1).to(tl.int64) * (parts * rows) + n
        tl.store(at_sums, sums, mask=n < rows)
        if parts == 2:
            tl.store(at_sums + rows, sums_second, mask=n < rows)


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


def shares_of(pixels: int, tile: Tile, pairs: int) -> tuple[int, int]:
    """(shares of the pixels, blocks of `tile.M` pixels that a program walks through), 512 pixels a share at least: what
    a share of 128 x 128 sums writes is then half of what it loads."""
    blocks = triton.cdiv(pixels, tile.M)
    steps = triton.cdiv(blocks, max(1, min(PROGRAMS // pairs, pixels // 512)))
    return triton.cdiv(blocks, steps), steps


def sum_weight_gradient(
    incoming: Incoming,
    x: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    plan: Plan,
    geometry: Geometry,
    tile: Tile,
    precision: str,
    atomic: bool,
    adds_up: bool,
) -> tuple[Tensor, Tensor | None]:
    """Of the shape of weight, contiguous; and where `adds_up`, sums of the gradient of the sums, (1, O) float32.

    The gradient has its channels side by side, what leads back from it the same strides; x as from `channels_last`.
    `adds_up` needs a plan in which all rows have entries.
    """
    grad = incoming.grad
    batch, rows, height, width = grad.shape
    columns = plan.columns.shape[1]
    pixels = batch * height * width
    out = torch.empty_like(weight, memory_format=torch.contiguous_format)
    if plan.pairs == 0:
        return out.zero_(), None
    shares, steps = shares_of(pixels, tile, plan.pairs)
    all_rows = incoming.parts * rows
    make = weight.new_zeros if atomic else weight.new_empty
    partial = make(1 if atomic else shares, all_rows, columns, dtype=torch.float32)
    sums = weight.new_empty(shares, all_rows, dtype=torch.float32) if adds_up else None
    masked_conv2d_weight_kernel[(plan.pairs, shares)](
        grad, *incoming.maps, x, partial, sums, plan.entries, plan.starts, plan.columns, pixels, steps, height, width,
        x.shape[2], x.shape[3], *geometry.stride, x.shape[1], rows, columns,
        grad.stride(0), grad.stride(2), grad.stride(3), x.stride(0), x.stride(2), x.stride(3), x.stride(1),
        GATHER=plan.blocks.gather, ATOMIC=atomic, SAVED=incoming.saved, PRECISION=precision,
        M=tile.M, N=tile.N, K=tile.K, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    block = 256
    masked_conv2d_weight_sum_kernel[(triton.cdiv(weight.numel(), block),)](
        partial, None if mask is None else mask.contiguous(), out, plan.places, partial.shape[0], all_rows, columns,
        weight[0].numel(), BLOCK=block,
    )  # fmt: skip
    return out, None if sums is None else sums.sum(0, keepdim=True)


# --- what ships, for the compile gate


def _weight_entry(
    dtype: str,
    tile: Tile,
    saved: str = "none",
    *,
    gather: bool = False,
    atomic: bool = False,
    adds_up: bool = False,
    **more: Any,
) -> Entry:
    fixed: dict[str, Any] = {
        "GATHER": gather, "ATOMIC": atomic, "SAVED": saved, "M": tile.M, "N": tile.N, "K": tile.K,
        "PRECISION": "tf32" if dtype == "fp32" and tile.M * tile.N > 1024 else "ieee", "x_step_y": 1, "x_step_x": 1,
    }  # fmt: skip
    fixed |= absent_maps(saved)
    if not gather:
        fixed["x_channel"] = 1
    if not adds_up:
        fixed |= {"sums_ptr": None}
    kind = f"{', gathered' if gather else ''}{', atomic' if atomic else ''}{', adds up' if adds_up else ''}"
    through = "" if saved == "none" else f", through {saved}"
    config = f"{dtype} {tile.N}x{tile.K} of {tile.M} pixels{through}{kind}"
    return catalogue_entry(masked_conv2d_weight_kernel, config, dtype, fixed, tile, **more)


CATALOGUE = [
    _weight_entry("bf16", Tile(64, 128, 128, 8, 3), requires=WGMMA, skips=AMD),
    _weight_entry("bf16", Tile(64, 128, 128, 8, 3), atomic=True, requires=WGMMA, skips=AMD),
    _weight_entry("bf16", Tile(64, 128, 128, 8, 2), skips=ONLY_AMD),
    _weight_entry("bf16", Tile(64, 128, 128, 8, 3), adds_up=True, requires=WGMMA, skips=AMD),
    _weight_entry(
        "bf16",
        Tile(16, 64, 128, 8, 3),
        "valve",
        adds_up=True,
        requires=WGMMA,
        skips=AMD,
        spills={"sm_100": 40},
        reason="ptxas stops at 80 there",
    ),
    _weight_entry("bf16", Tile(32, 128, 128, 8, 3), "sign", adds_up=True, requires=WGMMA, skips=AMD),
    _weight_entry("bf16", Tile(16, 64, 128, 8, 2), "valve", adds_up=True, skips=ONLY_AMD),
    _weight_entry("bf16", Tile(16, 64, 32, 4, 3), "valve", gather=True, adds_up=True, skips=AMD),
    _weight_entry("fp32", Tile(32, 128, 128, 8, 3), adds_up=True, skips=AMD),
    _weight_entry("fp32", Tile(16, 64, 128, 8, 3), "valve", adds_up=True, skips=AMD),
    _weight_entry("fp32", Tile(16, 128, 128, 8, 3), "relu", adds_up=True, skips=AMD),
    _weight_entry("fp32", Tile(16, 32, 32, 4, 2), "valve", adds_up=True),
    _weight_entry(
        "fp32", Tile(32, 128, 128, 8, 3), skips=AMD, spills={"sm_120": 16}, reason="ptxas stops at 128 there"
    ),
    _weight_entry("fp32", Tile(16, 64, 32, 4, 2)),
    _weight_entry("bf16", Tile(64, 128, 32, 4, 3), gather=True, skips=AMD),
    catalogue_entry(masked_conv2d_weight_sum_kernel, "bf16", "bf16", {"BLOCK": 256}, Tile(0, 0, 0, 4, 3)),
]
