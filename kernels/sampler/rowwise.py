"""Instructions along rows, as `instructions` has the others."""

import triton
import triton.language as tl

from fastgen.kernels.sampler.instructions import places, rounded, rows_in
from fastgen.kernels.sampler.words import (
    ALONG,
    AMAX,
    DEPTH,
    LOG_SOFTMAX,
    MEAN,
    NORMALIZED,
    NUMBER,
    OP,
    OUT,
    SOFTMAX,
    SUM,
    A,
)


@triton.jit
def rowwise(memory_ptr, code, offsets, first_image, images, first, apart, BR: tl.constexpr, BP: tl.constexpr):
    """Along a row of A: its sum, mean, greatest number; its softmax, logarithm of that, or the row normalized."""
    op, along, across = tl.load(code + OP), tl.load(code + ALONG), tl.load(code + OUT + 6)
    rows, depth = rows_in(code, images), tl.load(code + DEPTH).to(tl.int32)
    eps = tl.load(code + NUMBER).to(tl.int32).to(tl.float32, bitcast=True)
    k = tl.arange(0, BP)
    for tile in range(first, tl.cdiv(rows, BR), apart):
        m = tile * BR + tl.arange(0, BR)
        real = m < rows
        m = tl.where(real, m, 0)
        a_ptr = memory_ptr + places(code, A, offsets, first_image, m)
        out_ptr = memory_ptr + places(code, OUT, offsets, first_image, m)
        exponential = (op == SOFTMAX) | (op == LOG_SOFTMAX)
        greatest = tl.full((BR, BP), float("-inf"), tl.float32)
        sums = tl.zeros((BR, BP), tl.float32)
        nan = tl.zeros((BR, BP), tl.int32)
        for start in range(0, depth, BP):
            inside = real[:, None] & (start + k < depth)[None, :]
            a = tl.load(a_ptr[:, None] + ((start + k) * along)[None, :], mask=inside, other=0.0)
            greatest = tl.maximum(greatest, tl.where(inside, a, float("-inf")))
            sums += a
            nan |= (a != a).to(tl.int32)
        shift, total = tl.max(greatest, 1), tl.sum(sums, 1)
        if op == AMAX:
            tl.store(out_ptr, tl.where(tl.max(nan, 1) > 0, float("nan"), shift), mask=real)
        elif (op == SUM) | (op == MEAN):
            tl.store(out_ptr, rounded(tl.where(op == MEAN, total / depth, total), code), mask=real)
        else:
            shift = tl.where(exponential, shift, total / depth)  # what is taken off each number
            sums = tl.zeros((BR, BP), tl.float32)
            for start in range(0, depth, BP):
                inside = real[:, None] & (start + k < depth)[None, :]
                a = tl.load(a_ptr[:, None] + ((start + k) * along)[None, :], mask=inside, other=0.0) - shift[:, None]
                sums += tl.where(inside, tl.where(exponential, tl.exp(a), a * a), 0.0)
            total = tl.where(real, tl.sum(sums, 1), 1.0)
            scale = tl.div_rn(1.0, tl.where(op == NORMALIZED, tl.sqrt_rn(total / depth + eps), total))
            for start in range(0, depth, BP):
                inside = real[:, None] & (start + k < depth)[None, :]
                a = tl.load(a_ptr[:, None] + ((start + k) * along)[None, :], mask=inside, other=0.0) - shift[:, None]
                if op == LOG_SOFTMAX:
                    a -= tl.log(total)[:, None]
                else:
                    a = tl.where(exponential, tl.exp(a), a) * scale[:, None]
                tl.store(out_ptr[:, None] + ((start + k) * across)[None, :], rounded(a, code), mask=inside)
