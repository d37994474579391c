"""Reparameterization and KL of a diagonal Gaussian posterior, forward and backward, one pass each.

B rows, D columns (all trailing dimensions, in row-major order). For each element, with mean m and log-variance v:

    z  = m + exp(clip(v) / 2) * eps                       clip to [-100, 80]
    kl = (exp(clip(v)) - 1 - min(v, 80) + m^2) / 2        not below free_bits, summed over the columns

Noise is not stored: four neighbours of a row share one Philox counter, row * ceil(D / 4) + column // 4, so that
the backward kernel draws the same numbers again, and tile sizes, strides and dtypes do not change them.
Traffic in fp32: 12 bytes an element forward (read m, v; write z), 20 backward (read dz, m, v; write dm, dv).
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels.catalogue_entry import Entry
from fastgen.kernels.common import cdiv, launch, next_power_of_2

MIN_LOGVAR = tl.constexpr(-100.0)
MAX_LOGVAR = tl.constexpr(80.0)
MAX_FLOAT = tl.constexpr(3.4028234663852886e38)


@triton.jit
def exponential(x):
    """exp(x) for x in [-87, 88] to 2 units in the last place: `tl.exp` alone loses 5e-6 at x = 80 on a GPU."""
    shifted = x * 1.4426950408889634 + 12583039.0  # 2^23 + 2^22 + 127: rounds, and leaves n + 127 in the last bits
    n = shifted - 12583039.0
    r = (x - n * 0.693145751953125) - n * 1.428606820309417e-06  # x - n * ln 2, the first product exact
    power = (shifted.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)  # 2^n
    return tl.exp(r) * power


@triton.jit
def expm1_minus(x, root):
    """exp(x) - 1 - x for x in [-100, 80], never negative, without cancellation near 0: Taylor series within 1 of it.

    root: exp(x / 2). Where its square leaves the normal floats, it is lost beside 1.
    """
    series = 1.0 / 3628800
    series = series * x + 1.0 / 362880
    series = series * x + 1.0 / 40320
    series = series * x + 1.0 / 5040
    series = series * x + 1.0 / 720
    series = series * x + 1.0 / 120
    series = series * x + 1.0 / 24
    series = series * x + 1.0 / 6
    series = series * x + 0.5
    return tl.where(tl.abs(x) < 1.0, series * x * x, root * root - 1.0 - x)


@triton.jit
def limited(v):
    """The log-variance limited to its range, and how far it lies below it (negative); NaN stays."""
    above = tl.maximum(v, MIN_LOGVAR, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(above, MAX_LOGVAR, propagate_nan=tl.PropagateNan.ALL), v - above


@triton.jit
def kl_of_element(m, below, excess):
    """(exp(clip(v)) - 1 - min(v, 80) + m^2) / 2, in nats; excess: `expm1_minus` of the clipped v.

    The linear term alone goes on below the range.
    """
    return 0.5 * (excess - below + m * m)


@triton.jit
def radius_of(word):
    """sqrt(-2 log u) of a random 32-bit word, u = (word + 1/2) / 2^32: at most 6.8."""
    uniform = word.to(tl.uint32, bitcast=True).to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    # u = 2^k * (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)), and -2 log(1 + f) / f as a polynomial, to 2e-7 of it.
    bits = uniform.to(tl.int32, bitcast=True)
    k = (bits - 0x3F3504F3) >> 23
    f = (bits - (k << 23)).to(tl.float32, bitcast=True) - 1.0
    series = 0.20268139 * f - 0.32468414
    series = series * f + 0.34494033
    series = series * f - 0.39797127
    series = series * f + 0.49940142
    series = series * f - 0.66670227
    series = series * f + 1.0000073
    series = series * f - 1.9999999
    return tl.sqrt(series * f - 1.3862943611198906 * k.to(tl.float32))


@triton.jit
def box_muller(word0, word1):
    """Two independent standard normals from two random 32-bit words (Box & Muller 1958), at most 6.8 in size.

    The angle is one of four quarter turns plus one in [-pi/4, pi/4), where short series reach float32 precision; the
    library's cosine would bring a slow path for huge angles that spills registers.
    """
    radius = radius_of(word0)
    turn = word1.to(tl.int32, bitcast=True)
    angle = turn.to(tl.float32) * 3.657291918165171e-10  # pi / 4 / 2^31
    q = angle * angle
    cosine = 1.0 + q * (-1 / 2 + q * (1 / 24 + q * (-1 / 720 + q * (1 / 40320))))
    sine = angle * (1.0 + q * (-1 / 6 + q * (1 / 120 + q * (-1 / 5040 + q * (1 / 362880)))))
    swap = (turn & 1) == 1
    sign = tl.where((turn & 2) == 2, -radius, radius)
    return sign * tl.where(swap, -sine, cosine), sign * tl.where(swap, cosine, sine)


@triton.jit
def tile_noise(seed, row, column, columns):
    """Standard normals for rows (ROWS, 1) and the first columns (1, COLS / 4) of groups of four: (ROWS, COLS).

    Seven rounds of Philox are the fewest that pass BigCrush (Salmon et al. 2011, table 2).
    """
    counter = row * ((columns + 3) // 4) + column // 4
    word0, word1, word2, word3 = tl.randint4x(seed, counter, n_rounds=7)
    n0, n1 = box_muller(word0, word1)
    n2, n3 = box_muller(word2, word3)
    grouped = tl.join(tl.join(n0, n2), tl.join(n1, n3))
    return tl.reshape(grouped, (counter.shape[0], counter.shape[1] * 4))


@triton.jit
def tile_offsets(row, column, inner, row_stride, outer_stride, inner_stride, FLAT: tl.constexpr):
    """Element offsets of a tile: a row is (outer, inner), or a single dimension if FLAT."""
    if FLAT:
        return row * row_stride + column * inner_stride
    return row * row_stride + (column // inner) * outer_stride + (column % inner) * inner_stride


@triton.jit
def reparameterize_kl_forward_kernel(
    mu_ptr,  # (B, D), any float dtype, strides below
    logvar_ptr,  # (B, D)
    eps_ptr,  # (B, D), or None: drawn from seed
    seed_ptr,  # (1,) int64; unused where eps is given
    z_ptr,  # (B, D) contiguous, written
    kl_ptr,  # (B, gridDim.y) fp32, written: each program's part of its rows' sums
    rows,
    columns,
    inner,  # length of the last of a row's two dimensions
    mu_row_stride,
    mu_outer_stride,
    mu_inner_stride,
    logvar_row_stride,
    logvar_outer_stride,
    logvar_inner_stride,
    eps_row_stride,
    eps_outer_stride,
    eps_inner_stride,
    tiles,  # tiles of COLS columns for one program
    free_bits,
    FLAT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    total = tl.zeros((ROWS, COLS), tl.float32)
    if eps_ptr is None:
        seed = tl.load(seed_ptr)
    for tile in range(tiles):
        start = (tl.program_id(1).to(tl.int64) * tiles + tile) * COLS
        column = (start + tl.arange(0, COLS))[None, :]
        inside = (row < rows) & (column < columns)
        at_mu = tile_offsets(row, column, inner, mu_row_stride, mu_outer_stride, mu_inner_stride, FLAT)
        at_logvar = tile_offsets(row, column, inner, logvar_row_stride, logvar_outer_stride, logvar_inner_stride, FLAT)
        m = tl.load(mu_ptr + at_mu, inside, other=0.0).to(tl.float32)
        v = tl.load(logvar_ptr + at_logvar, inside, other=0.0).to(tl.float32)
        if eps_ptr is None:
            group = (start + 4 * tl.arange(0, COLS // 4))[None, :]
            eps = tile_noise(seed, row, group, columns)
        else:
            at_eps = tile_offsets(row, column, inner, eps_row_stride, eps_outer_stride, eps_inner_stride, FLAT)
            eps = tl.load(eps_ptr + at_eps, inside, other=0.0).to(tl.float32)
        clipped, below = limited(v)
        scale = exponential(0.5 * clipped)
        z = m + scale * eps
        tl.store(z_ptr + row * columns + column, z.to(z_ptr.dtype.element_ty), inside)
        kl = kl_of_element(m, below, expm1_minus(clipped, scale))
        kl = tl.maximum(kl, free_bits, propagate_nan=tl.PropagateNan.ALL)
        total += tl.where(inside, kl, 0.0)
    part = tl.sum(total, axis=1)
    part = tl.where(part > MAX_FLOAT, MAX_FLOAT, part)
    row_1d = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tl.store(kl_ptr + row_1d * tl.num_programs(1) + tl.program_id(1), part, row_1d < rows)


@triton.jit
def reparameterize_kl_sum_kernel(
    part_ptr,  # (B, PARTS) fp32 contiguous
    kl_ptr,  # (B,) fp32, written
    rows,
    parts,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):
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
    rows,
    columns,
    inner,
    grad_z_row_stride,
    grad_z_outer_stride,
    grad_z_inner_stride,
    grad_kl_stride,
    mu_row_stride,
    mu_outer_stride,
    mu_inner_stride,
    logvar_row_stride,
    logvar_outer_stride,
    logvar_inner_stride,
    eps_row_stride,
    eps_outer_stride,
    eps_inner_stride,
    tiles,
    free_bits,
    FLAT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    if grad_kl_ptr is not None:
        grad_of_row = tl.load(grad_kl_ptr + row * grad_kl_stride, row < rows, other=0.0).to(tl.float32)
    if eps_ptr is None:
        seed = tl.load(seed_ptr)
    for tile in range(tiles):
        start = (tl.program_id(1).to(tl.int64) * tiles + tile) * COLS
        column = (start + tl.arange(0, COLS))[None, :]
        inside = (row < rows) & (column < columns)
        at_mu = tile_offsets(row, column, inner, mu_row_stride, mu_outer_stride, mu_inner_stride, FLAT)
        at_logvar = tile_offsets(row, column, inner, logvar_row_stride, logvar_outer_stride, logvar_inner_stride, FLAT)
        m = tl.load(mu_ptr + at_mu, inside, other=0.0).to(tl.float32)
        v = tl.load(logvar_ptr + at_logvar, inside, other=0.0).to(tl.float32)
        clipped, below = limited(v)
        scale = exponential(0.5 * clipped)
        grad_mu = tl.zeros((ROWS, COLS), tl.float32)
        grad_logvar = tl.zeros((ROWS, COLS), tl.float32)
        at = row * columns + column
        if grad_z_ptr is not None:
            at_grad = tile_offsets(
                row, column, inner, grad_z_row_stride, grad_z_outer_stride, grad_z_inner_stride, FLAT
            )
            grad_mu = tl.load(grad_z_ptr + at_grad, inside, other=0.0).to(tl.float32)
            grad_eps = grad_mu * scale
            if grad_eps_ptr is not None:
                tl.store(grad_eps_ptr + at, grad_eps.to(grad_eps_ptr.dtype.element_ty), inside)
            if grad_logvar_ptr is not None:
                if eps_ptr is None:
                    group = (start + 4 * tl.arange(0, COLS // 4))[None, :]
                    eps = tile_noise(seed, row, group, columns)
                else:
                    at_eps = tile_offsets(row, column, inner, eps_row_stride, eps_outer_stride, eps_inner_stride, FLAT)
                    eps = tl.load(eps_ptr + at_eps, inside, other=0.0).to(tl.float32)
                # Outside the range z no longer depends on the log-variance.
                grad_logvar = tl.where(clipped == v, 0.5 * grad_eps * eps, 0.0)
        if grad_kl_ptr is not None:
            # Outside the range the slope of its end goes on, so that the KL can pull the log-variance back.
            excess = expm1_minus(clipped, scale)
            counts = kl_of_element(m, below, excess) >= free_bits
            grad_mu += tl.where(counts, grad_of_row * m, 0.0)
            grad_logvar += tl.where(counts, grad_of_row * 0.5 * (excess + clipped), 0.0)
        if grad_mu_ptr is not None:
            tl.store(grad_mu_ptr + at, grad_mu.to(grad_mu_ptr.dtype.element_ty), inside)
        if grad_logvar_ptr is not None:
            tl.store(grad_logvar_ptr + at, grad_logvar.to(grad_logvar_ptr.dtype.element_ty), inside)


@dataclass(frozen=True)
class Launch:
    """Tile of one program, and how many programs share a row; `tiles` is the number of tiles each of them walks."""

    ROWS: int
    COLS: int
    splits: int
    tiles: int
    num_warps: int = 4


TILE = 1024  # 8 elements a thread: two 16-byte loads of each fp32 input in flight
PROGRAMS = 1024  # enough to fill the chip; fixed, so that sums do not depend on the device


@functools.lru_cache(4096)
def launch_configuration(rows: int, columns: int) -> Launch:
    """Wide rows get a tile each, short ones share it. Rows are split where there are too few of them for the chip."""
    tile_columns = min(next_power_of_2(max(columns, 4)), TILE)
    tile_rows = TILE // tile_columns
    tiles = cdiv(columns, tile_columns)
    splits = min(cdiv(PROGRAMS, cdiv(rows, tile_rows)), tiles)
    per_program = cdiv(tiles, splits)
    return Launch(tile_rows, tile_columns, cdiv(tiles, per_program), per_program)


Strides = tuple[int, ...]


@functools.lru_cache(4096)
def rows_of(shape: tuple[int, ...], *strides: Strides | None) -> tuple[int, bool, tuple[Strides, ...]] | None:
    """Tensors of one shape (B, D...) as rows of at most two dimensions (outer, inner), shared by all of them.

    Returns:
        The inner length, whether one dimension is enough, and (row, outer, inner) strides of each tensor (zeros for an
        absent one); or None where their layouts together need more than two dimensions.
    """
    present = [stride for stride in strides if stride is not None]
    merged: list[tuple[int, list[int]]] = []
    for axis in range(1, len(shape)):
        steps = [stride[axis] for stride in present]
        if shape[axis] == 1:
            continue
        if merged and all(last == s * shape[axis] for last, s in zip(merged[-1][1], steps, strict=True)):
            merged[-1] = (merged[-1][0] * shape[axis], steps)
        else:
            merged.append((shape[axis], steps))
    if len(merged) > 2:
        return None
    (_, outer), (inner_length, inner) = ([(1, [0] * len(present))] * 2 + merged)[-2:]
    found = iter(zip([stride[0] for stride in present], outer, inner, strict=True))
    return inner_length, len(merged) <= 1, tuple((0, 0, 0) if stride is None else next(found) for stride in strides)


def as_rows(*tensors: Tensor | None) -> tuple[tuple[Tensor | None, ...], int, bool, tuple[Strides, ...]]:
    """The tensors, copied only if their layouts together need more than two dimensions, and their `rows_of`."""
    shape = next(tensor.shape for tensor in tensors if tensor is not None)
    found = rows_of(tuple(shape), *(None if tensor is None else tensor.stride() for tensor in tensors))
    if found is None:
        return as_rows(*(None if tensor is None else tensor.contiguous() for tensor in tensors))
    return tensors, *found


def forward(mu: Tensor, logvar: Tensor, eps: Tensor | None, seed: Tensor, free_bits: float) -> tuple[Tensor, Tensor]:
    """z like mu (contiguous) and kl (B,) fp32, of mu, logvar and eps (B, D...)."""
    dtype = mu.dtype if mu.dtype == logvar.dtype else torch.promote_types(mu.dtype, logvar.dtype)
    z = torch.empty(mu.shape, dtype=dtype, device=mu.device)
    rows = mu.shape[0]
    if mu.numel() == 0:
        return z, torch.zeros(rows, dtype=torch.float32, device=mu.device)
    columns = mu.numel() // rows
    choice = launch_configuration(rows, columns)
    inputs, inner, flat, strides = as_rows(mu, logvar, eps)
    parts = torch.empty(rows, choice.splits, dtype=torch.float32, device=z.device)
    constants = {"FLAT": flat, "ROWS": choice.ROWS, "COLS": choice.COLS, "num_warps": choice.num_warps}
    args = (*inputs, seed, z, parts, rows, columns, inner, *itertools.chain(*strides), choice.tiles, float(free_bits))
    launch(reparameterize_kl_forward_kernel, (cdiv(rows, choice.ROWS), choice.splits), args, constants)
    if choice.splits == 1:
        return z, parts.view(rows)
    kl = torch.empty(rows, dtype=torch.float32, device=z.device)
    width = next_power_of_2(choice.splits)
    height = max(1, TILE // width)
    args = (parts, kl, rows, choice.splits)
    launch(reparameterize_kl_sum_kernel, (cdiv(rows, height),), args, {"ROWS": height, "PARTS": width})
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
    """Gradients of mu, logvar and eps, contiguous, None where `needs` says that they are not asked for."""
    rows = mu.shape[0]
    inputs = (mu, logvar, eps)
    grads = [
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if x is not None and needed else None
        for x, needed in zip(inputs, needs, strict=True)
    ]
    if mu.numel() == 0:
        return grads[0], grads[1], grads[2]
    if grad_z is None and grads[2] is not None:
        grads[2].zero_()
    columns = mu.numel() // rows
    choice = launch_configuration(rows, columns)
    tensors, inner, flat, strides = as_rows(grad_z, mu, logvar, eps)
    constants = {"FLAT": flat, "ROWS": choice.ROWS, "COLS": choice.COLS, "num_warps": choice.num_warps}
    of_kl = 0 if grad_kl is None else grad_kl.stride(0)
    sizes = (rows, columns, inner, *strides[0], of_kl, *itertools.chain(*strides[1:]), choice.tiles, float(free_bits))
    args = (tensors[0], grad_kl, *tensors[1:], seed, *grads, *sizes)
    launch(reparameterize_kl_backward_kernel, (cdiv(rows, choice.ROWS), choice.splits), args, constants)
    return grads[0], grads[1], grads[2]


def _entry(kernel, dtype: str, rows: int, columns: int, *, eps_given: bool, flat: bool) -> Entry:
    """Rows are contiguous (flat) or have two strides, as those of a channels-last tensor."""
    fixed: dict[str, Any] = {"FLAT": flat, "ROWS": rows, "COLS": columns}
    if flat:
        fixed |= {f"{name}_inner_stride": 1 for name in ("mu", "logvar", "grad_z")}
    if not eps_given:
        fixed |= {"eps_ptr": None, "grad_eps_ptr": None}
    fixed = {name: value for name, value in fixed.items() if name in kernel.arg_names}
    kinds = {"seed_ptr": "*i64", "kl_ptr": "*fp32", "grad_kl_ptr": "*fp32", "free_bits": "fp32"}
    signature = {
        name: kinds.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
        if name not in fixed
    }
    aligned = tuple(name for name in signature if name == "columns" or name.endswith("row_stride"))
    config = f"{dtype} {rows}x{columns}, eps {'given' if eps_given else 'drawn'}, {'flat' if flat else 'two strides'}"
    # ptxas stops at 72 of 255 registers for sm_100, whatever is taken out of the loop: two words, hit in L1.
    spills = {"sm_100": 8} if kernel is reparameterize_kl_backward_kernel and not eps_given else {}
    reason = "a choice of ptxas for sm_100, far from the register limit" if spills else ""
    return Entry(kernel, config, signature, fixed, aligned=aligned, spills=spills, reason=reason)


SUM_SIGNATURE = {"part_ptr": "*fp32", "kl_ptr": "*fp32", "rows": "i32", "parts": "i32"}
CATALOGUE = [
    entry
    for kernel in (reparameterize_kl_forward_kernel, reparameterize_kl_backward_kernel)
    for entry in (
        _entry(kernel, "fp32", 1, 1024, eps_given=False, flat=True),
        _entry(kernel, "bf16", 1, 1024, eps_given=False, flat=True),
        _entry(kernel, "fp32", 32, 32, eps_given=True, flat=False),
    )
] + [
    Entry(reparameterize_kl_sum_kernel, "1x1024", SUM_SIGNATURE, {"ROWS": 1, "PARTS": 1024}),
    Entry(reparameterize_kl_sum_kernel, "256x4", SUM_SIGNATURE, {"ROWS": 256, "PARTS": 4}),
]
