"""Instructions along rows, as `instructions` has the others and says what arguments are."""

import triton
import triton.language as tl

from fastgen.kernels.sampler.sides import places, rounded, rows_in
from fastgen.kernels.sampler.words import (
    ALONG,
    AMAX,
    COLUMN_STRIDE,
    DEPTH,
    LOG_SOFTMAX,
    MEAN,
    NORMALIZED,
    NUMBER,
    OP,
    OUT,
    ROUNDED,
    SOFTMAX,
    SUM,
    A,
)


@triton.jit
def rowwise(arenas, code, share, BM: tl.constexpr, BN: tl.constexpr):
    """Along a row of A: its sum, mean, greatest number; its softmax, logarithm of that, or the row normalized.

    A row is gone through once, or three times: for its sum and greatest number; for the sum of what is computed of its
    numbers, of which the first times' result has been taken off; for results."""
    memory_ptr, _, _, _ = arenas
    _, _, images, first, apart = share
    op, along, across = tl.load(code + OP), tl.load(code + ALONG), tl.load(code + OUT + COLUMN_STRIDE)
    rows, depth, precision = rows_in(code, images), tl.load(code + DEPTH).to(tl.int32), tl.load(code + ROUNDED)
    eps = tl.load(code + NUMBER).to(tl.int32).to(tl.float32, bitcast=True)
    exponential, wide = (op == SOFTMAX) | (op == LOG_SOFTMAX), op < SUM
    k = tl.arange(0, BN)
    for tile in range(first, tl.cdiv(rows, BM), apart):
        m = tile * BM + tl.arange(0, BM)
        real = m < rows
        m = tl.where(real, m, 0)
        a_ptr = memory_ptr + places(code, A, share, m)
        out_ptr = memory_ptr + places(code, OUT, share, m)
        greatest = tl.full((BM, BN), float("-inf"), tl.float32)
        nan = tl.zeros((BM, BN), tl.int32)
        nothing = tl.zeros((BM,), tl.float32)
        shift, total, logarithm, scale = nothing, nothing, nothing, nothing
        for time in range(0, tl.where(wide, 3, 1)):
            sums = tl.zeros((BM, BN), tl.float32)
            for start in range(0, depth, BN):
                inside = real[:, None] & (start + k < depth)[None, :]
                a = tl.load(a_ptr[:, None] + ((start + k) * along)[None, :], mask=inside, other=0.0) - shift[:, None]
                if time == 0:
                    greatest = tl.maximum(greatest, tl.where(inside, a, float("-inf")))
                    nan |= (a != a).to(tl.int32)
                elif (op == SOFTMAX) | (exponential & (time == 1)):
                    a = tl.exp(a)
                if time == 2:
                    a = (a - logarithm[:, None]) * scale[:, None]
                    tl.store(out_ptr[:, None] + ((start + k) * across)[None, :], rounded(a, precision), mask=inside)
                else:
                    sums += tl.where(inside, tl.where((op == NORMALIZED) & (time == 1), a * a, a), 0.0)
            if time == 0:
                total = tl.sum(sums, 1)
                shift = tl.where(exponential, tl.max(greatest, 1), total / depth)
            elif time == 1:
                total = tl.where(real, tl.sum(sums, 1), 1.0)
                logarithm = tl.where(op == LOG_SOFTMAX, tl.log(total), 0.0)
                scale = tl.div_rn(1.0, tl.where(op == NORMALIZED, tl.sqrt_rn(total / depth + eps), total))
                scale = tl.where(op == LOG_SOFTMAX, 1.0, scale)
        if op == AMAX:
            tl.store(out_ptr, tl.where(tl.max(nan, 1) > 0, float("nan"), tl.max(greatest, 1)), mask=real)
        elif (op == SUM) | (op == MEAN):
            tl.store(out_ptr, rounded(tl.where(op == MEAN, total / depth, total), precision), mask=real)
