"""Reparameterization and KL of a diagonal Gaussian posterior, forward and backward, one pass each.

B rows, D columns (all trailing dimensions, in the order of mu's memory). For each element, with mean m and
log-variance v:

    z  = m + exp(clip(v) / 2) * eps                       clip to [-100, 80]
    kl = (exp(clip(v)) - 1 - min(v, 80) + m^2) / 2        not below free_bits, summed over the columns

Noise is not stored: four neighbours share one Philox counter, (row * D + column) // 4, so that the backward kernel
draws the same numbers again, and neither tile sizes nor dtypes change them.
Traffic in fp32: 12 bytes an element forward (read m, v; write z), 20 backward (read dz, m, v; write dm, dv).

Arguments and the shape of tiles: `fastgen.kernels.vae.addresses`.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels.catalogue_entry import Entry
from fastgen.kernels.common import cdiv, launch, next_power_of_2
from fastgen.kernels.maps import empty_in_order, order_of
from fastgen.kernels.vae.addresses import fours_of, in_fours, offsets, sums_of_rows, tile_of
from fastgen.kernels.vae.entries import entry
from fastgen.kernels.vae.gaussian import exp_of_half, expm1_and_excess, limited, normal_of_counter
from fastgen.kernels.vae.layout import TILE, as_rows, tiles_of

MAX_FLOAT = tl.constexpr(3.4028234663852886e38)


@triton.jit
def reparameterize_kl_forward_kernel(
    mu_ptr,  # (B, D), any float dtype, strides below
    logvar_ptr,  # (B, D)
    eps_ptr,  # (B, D), or None: drawn from seed
    seed_ptr,  # (1,) int64; unused where eps is given
    z_ptr,  # (B, D) contiguous, written
    kl_ptr,  # (B, gridDim.y) fp32, written: each program's part of its rows' sums
    rows, columns,
    outers,  # lengths of a row's two dimensions
    inner,
    mu_row_stride, mu_outer_stride, mu_inner_stride,
    logvar_row_stride, logvar_outer_stride, logvar_inner_stride,
    eps_row_stride, eps_outer_stride, eps_inner_stride,
    tiles,  # of a program
    free_bits,
    ROWS: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr, ODD: tl.constexpr, ALIGNED: tl.constexpr,
    FOURS: tl.constexpr, DIVIDED: tl.constexpr, WIDE: tl.constexpr, PACKED: tl.constexpr,
    BOUNDED: tl.constexpr,  # whether free_bits is above 0
):  # fmt: skip
    UNIT: tl.constexpr = 4 if FOURS else 1  # so that the compiler knows rows to begin at multiples of four
    columns *= UNIT
    mu_strides = (mu_row_stride * UNIT, mu_outer_stride, mu_inner_stride)
    logvar_strides = (logvar_row_stride * UNIT, logvar_outer_stride, logvar_inner_stride)
    eps_strides = (eps_row_stride * UNIT, eps_outer_stride, eps_inner_stride)
    total = tl.zeros((1, 1, IN) if PACKED else (ROWS, OUT, IN), tl.float32)
    if eps_ptr is None:
        seed = tl.load(seed_ptr)
    for tile in range(tiles):
        row, column, outer, within, at, counter, own, inside = tile_of(
            tile, tiles, rows, columns, outers, inner, ROWS, OUT, IN, ODD, ALIGNED, WIDE, PACKED
        )
        at_mu = offsets(at, row, column, outer, within, inner, mu_strides, ALIGNED, DIVIDED, OUT, PACKED)
        at_logvar = offsets(at, row, column, outer, within, inner, logvar_strides, ALIGNED, DIVIDED, OUT, PACKED)
        m = tl.load(mu_ptr + at_mu, inside, other=0.0).to(tl.float32)
        v = tl.load(logvar_ptr + at_logvar, inside, other=0.0).to(tl.float32)
        if eps_ptr is None:
            eps = normal_of_counter(seed, counter)
        else:
            at_eps = offsets(at, row, column, outer, within, inner, eps_strides, ALIGNED, DIVIDED, OUT, PACKED)
            eps = tl.load(eps_ptr + at_eps, inside, other=0.0).to(tl.float32)
        clipped, linear = limited(v)
        scale = exp_of_half(clipped)
        z = m + scale * eps
        tl.store(z_ptr + at, z.to(z_ptr.dtype.element_ty), inside)
        _, excess = expm1_and_excess(clipped, linear, scale)
        kl = 0.5 * (excess + m * m)
        if BOUNDED:
            kl = tl.maximum(kl, free_bits, propagate_nan=tl.PropagateNan.ALL)
        if BOUNDED or ALIGNED > 0:  # else it is 0 where nothing is read
            kl = tl.where(own, kl, 0.0)
        total += kl
    part = sums_of_rows(total, columns, ROWS, OUT, IN, PACKED)
    part = tl.where(part > MAX_FLOAT, MAX_FLOAT, part)
    held = outers if PACKED else ROWS
    row_1d = tl.program_id(0).to(tl.int64) * held + tl.arange(0, ROWS)
    tl.store(
        kl_ptr + row_1d * tl.num_programs(1) + tl.program_id(1), part, (row_1d < rows) & (tl.arange(0, ROWS) < held)
    )


@triton.jit
def reparameterize_kl_sum_kernel(
    part_ptr,  # (B, PARTS) fp32 contiguous
    kl_ptr,  # (B,) fp32, written
    rows, parts,
    ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The second stage of the sum over a row, always in the same order."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    part = tl.arange(0, PARTS)
    inside = (row < rows)[:, None] & (part < parts)[None, :]
    total = tl.sum(tl.load(part_ptr + row[:, None] * parts + part[None, :], inside, other=0.0), axis=1)
    tl.store(kl_ptr + row, tl.where(total > MAX_FLOAT, MAX_FLOAT, total), row < rows)


@triton.jit
def reparameterize_kl_backward_kernel(
    grad_z_ptr,  # (B, D), strides below, or None
    grad_kl_ptr,  # (B,), stride below, or None
    mu_ptr,
    logvar_ptr,
    eps_ptr,
    seed_ptr,  # as in the forward kernel
    grad_mu_ptr,  # (B, D) contiguous, written, or None
    grad_logvar_ptr,
    grad_eps_ptr,
    rows, columns, outers, inner,
    grad_z_row_stride, grad_z_outer_stride, grad_z_inner_stride,
    mu_row_stride, mu_outer_stride, mu_inner_stride,
    logvar_row_stride, logvar_outer_stride, logvar_inner_stride,
    eps_row_stride, eps_outer_stride, eps_inner_stride,
    grad_kl_stride, tiles, free_bits,
    ROWS: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr, ODD: tl.constexpr, ALIGNED: tl.constexpr,
    FOURS: tl.constexpr, DIVIDED: tl.constexpr, WIDE: tl.constexpr, PACKED: tl.constexpr,
    BOUNDED: tl.constexpr,  # whether free_bits is above 0
):  # fmt: skip
    UNIT: tl.constexpr = 4 if FOURS else 1
    columns *= UNIT
    grad_z_strides = (grad_z_row_stride * UNIT, grad_z_outer_stride, grad_z_inner_stride)
    mu_strides = (mu_row_stride * UNIT, mu_outer_stride, mu_inner_stride)
    logvar_strides = (logvar_row_stride * UNIT, logvar_outer_stride, logvar_inner_stride)
    eps_strides = (eps_row_stride * UNIT, eps_outer_stride, eps_inner_stride)
    if grad_kl_ptr is not None and PACKED:
        row_of_four, _four = fours_of(rows, columns // 4, outers, IN)
        grad_of_four = tl.load(grad_kl_ptr + row_of_four * grad_kl_stride).to(tl.float32)
        grad_of_row = in_fours(grad_of_four)
    elif grad_kl_ptr is not None:
        row_1d = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        # Loaded with one dimension: with three, each thread would load a row's number once an element.
        grad_at = grad_kl_ptr + row_1d * grad_kl_stride
        grad_of_row = tl.load(grad_at, row_1d < rows, other=0.0).to(tl.float32)[:, None, None]
        if ALIGNED > 0:  # of the neighbours that share a group with the row
            split = tl.program_id(1) + tl.zeros_like(row_1d)  # a mask of numbers and tensors is none to the interpreter
            has_before = (split == 0) & (row_1d > 0) & (row_1d < rows)
            has_after = ((split + 1) * tiles * IN > columns) & (row_1d + 1 < rows)
            grad_before = tl.load(grad_at - grad_kl_stride, has_before, other=0.0).to(tl.float32)[:, None, None]
            grad_after = tl.load(grad_at + grad_kl_stride, has_after, other=0.0).to(tl.float32)[:, None, None]
    if eps_ptr is None:
        seed = tl.load(seed_ptr)
    for tile in range(tiles):
        row, column, outer, within, at, counter, _own, inside = tile_of(
            tile, tiles, rows, columns, outers, inner, ROWS, OUT, IN, ODD, ALIGNED, WIDE, PACKED
        )
        at_mu = offsets(at, row, column, outer, within, inner, mu_strides, ALIGNED, DIVIDED, OUT, PACKED)
        at_logvar = offsets(at, row, column, outer, within, inner, logvar_strides, ALIGNED, DIVIDED, OUT, PACKED)
        m = tl.load(mu_ptr + at_mu, inside, other=0.0).to(tl.float32)
        v = tl.load(logvar_ptr + at_logvar, inside, other=0.0).to(tl.float32)
        clipped, linear = limited(v)
        scale = exp_of_half(clipped)
        grad_mu = tl.zeros_like(m)
        grad_logvar = tl.zeros_like(m)
        if grad_z_ptr is not None:
            at_grad = offsets(at, row, column, outer, within, inner, grad_z_strides, ALIGNED, DIVIDED, OUT, PACKED)
            grad_mu = tl.load(grad_z_ptr + at_grad, inside, other=0.0).to(tl.float32)
            grad_eps = grad_mu * scale
            if grad_eps_ptr is not None:
                tl.store(grad_eps_ptr + at, grad_eps.to(grad_eps_ptr.dtype.element_ty), inside)
            if grad_logvar_ptr is not None:
                if eps_ptr is None:
                    eps = normal_of_counter(seed, counter)
                else:
                    at_eps = offsets(at, row, column, outer, within, inner, eps_strides, ALIGNED, DIVIDED, OUT, PACKED)
                    eps = tl.load(eps_ptr + at_eps, inside, other=0.0).to(tl.float32)
                # Outside the range z no longer depends on the log-variance.
                grad_logvar = tl.where(clipped == v, grad_eps * eps, 0.0)
        if grad_kl_ptr is not None:
            # Outside the range the slope of its end goes on, so that the KL can pull the log-variance back.
            expm1, excess = expm1_and_excess(clipped, linear, scale)
            grad_kl = grad_of_row
            if ALIGNED > 0:
                after = tl.where(column >= columns, grad_after, grad_of_row)
                grad_kl = tl.where(column < 0, grad_before, after)
            if BOUNDED:
                grad_kl = tl.where(excess + m * m < 2 * free_bits, 0.0, grad_kl)
            grad_mu += grad_kl * m
            grad_logvar += grad_kl * expm1
        if grad_mu_ptr is not None:
            tl.store(grad_mu_ptr + at, grad_mu.to(grad_mu_ptr.dtype.element_ty), inside)
        if grad_logvar_ptr is not None:
            tl.store(grad_logvar_ptr + at, (0.5 * grad_logvar).to(grad_logvar_ptr.dtype.element_ty), inside)


def forward(mu: Tensor, logvar: Tensor, eps: Tensor | None, seed: Tensor, free_bits: float) -> tuple[Tensor, Tensor]:
    """z like mu, dense, and kl (B,) fp32, of mu, logvar and eps (B, D...)."""
    order = order_of(mu)
    z = empty_in_order(mu, order, mu.dtype if mu.dtype == logvar.dtype else torch.promote_types(mu.dtype, logvar.dtype))
    if mu.numel() == 0:
        return z, torch.zeros(mu.shape[0], dtype=torch.float32, device=mu.device)
    inputs, rows = as_rows(order, mu, logvar, eps)
    tiles = tiles_of(rows, min(mu.element_size(), logvar.element_size()))
    parts = torch.empty(rows.rows, tiles.splits, dtype=torch.float32, device=mu.device)
    args = (*inputs, seed, z, parts, *tiles.numbers(rows), tiles.tiles, float(free_bits))
    constants = {**tiles.constants, "BOUNDED": free_bits > 0}
    launch(reparameterize_kl_forward_kernel, (cdiv(rows.rows, tiles.held), tiles.splits), args, constants)
    if tiles.splits == 1:
        return z, parts.view(-1)
    kl = torch.empty(rows.rows, dtype=torch.float32, device=mu.device)
    width = next_power_of_2(tiles.splits)
    height = max(1, TILE // width)
    args = (parts, kl, rows.rows, tiles.splits)
    launch(reparameterize_kl_sum_kernel, (cdiv(rows.rows, height),), args, {"ROWS": height, "PARTS": width})
    return z, kl


def backward(
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    mu: Tensor,
    logvar: Tensor,
    eps: Tensor | None,
    seed: Tensor,
    free_bits: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of mu, logvar and eps, in the order of mu's memory, None where `needs` says that they are not asked
    for."""
    order = order_of(mu)
    grads = [
        empty_in_order(x, order, x.dtype) if x is not None and needed else None
        for x, needed in zip((mu, logvar, eps), needs, strict=True)
    ]
    if mu.numel() == 0:
        return grads[0], grads[1], grads[2]
    if grad_z is None and grads[2] is not None:
        grads[2].zero_()
    (grad_z, *inputs), rows = as_rows(order, grad_z, mu, logvar, eps)
    tiles = tiles_of(rows, min(mu.element_size(), logvar.element_size()))
    numbers = (*tiles.numbers(rows), 0 if grad_kl is None else grad_kl.stride(0), tiles.tiles)
    args = (grad_z, grad_kl, *inputs, seed, *grads, *numbers, float(free_bits))
    constants = {**tiles.constants, "BOUNDED": free_bits > 0}
    launch(reparameterize_kl_backward_kernel, (cdiv(rows.rows, tiles.held), tiles.splits), args, constants)
    return grads[0], grads[1], grads[2]


SUM_SIGNATURE = {"part_ptr": "*fp32", "kl_ptr": "*fp32", "rows": "i32", "parts": "i32"}
CATALOGUE = [
    made
    for kernel in (reparameterize_kl_forward_kernel, reparameterize_kl_backward_kernel)
    for made in (
        entry(kernel, "fp32", 1, 1, 1024, eps_given=False),
        entry(kernel, "bf16", 1, 1, 1024, eps_given=False),
        entry(kernel, "fp32", 32, 1, 32, eps_given=False, FOURS=True, BOUNDED=True),
        entry(kernel, "fp32", 16, 8, 256, eps_given=False, FOURS=True, PACKED=True),
        entry(kernel, "fp32", 8, 32, 1024, eps_given=False, FOURS=True, PACKED=True),
        entry(kernel, "bf16", 64, 8, 1024, eps_given=True, FOURS=True, PACKED=True),
        entry(kernel, "fp32", 1, 1, 1024, eps_given=False, ODD=True, ALIGNED=8),
        entry(kernel, "bf16", 1, 1, 1024, eps_given=False, ODD=True, ALIGNED=16),
        entry(kernel, "fp32", 32, 1, 32, eps_given=False, ODD=True, ALIGNED=8),
        entry(kernel, "fp32", 32, 1, 32, eps_given=False, across=True),
        entry(kernel, "fp32", 1, 32, 32, eps_given=False),
        entry(kernel, "bf16", 1, 32, 32, eps_given=True),
        entry(kernel, "fp32", 1, 1, 1024, eps_given=True, ODD=True, DIVIDED=True),
    )
] + [
    Entry(reparameterize_kl_sum_kernel, "1x1024", SUM_SIGNATURE, {"ROWS": 1, "PARTS": 1024}),
    Entry(reparameterize_kl_sum_kernel, "256x4", SUM_SIGNATURE, {"ROWS": 256, "PARTS": 4}),
]
