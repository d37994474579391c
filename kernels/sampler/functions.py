"""Pointwise operations, as `fastgen.sampling.machine.definitions` defines them."""

import triton
import triton.language as tl

from fastgen.kernels.common import tanh
from fastgen.kernels.sampler.words import (
    ABS,
    ADD,
    DIV,
    ELU,
    EQ,
    ERASE,
    ERF,
    EXP,
    EXPM1,
    GATE,
    GELU,
    GELU_TANH,
    GLU,
    HIDE,
    KEEP,
    LE,
    LEAKY_RELU,
    LOG,
    LOG1P,
    LT,
    MAXIMUM,
    MINIMUM,
    MUL,
    NEG,
    RECIPROCAL,
    RELU,
    RSQRT,
    SIGMOID,
    SILU,
    SOFTPLUS,
    SQRT,
    SQUARE,
    SUB,
    TANH,
)


@triton.jit
def expm1(x):
    half = tanh(0.5 * x)
    return tl.where(x < 1, 2 * half / (1 - half), tl.exp(x) - 1)


@triton.jit
def log1p(x):
    """The logarithm of 1 + x, as it is rounded, times what of x that rounding has taken for it."""
    rounded = 1 + x
    found = tl.log(rounded)
    near = tl.where(rounded == 1, x, found * tl.div_rn(x, rounded - 1))
    return tl.where(x < 1, near, found)


@triton.jit
def apply(op, a, b):
    """What the op makes of numbers a and b."""
    if op == ADD:
        a = a + b
    elif op == SUB:
        a = a - b
    elif op == MUL:
        a = a * b
    elif op == DIV:
        a = tl.div_rn(a, b)
    elif op == MAXIMUM:
        a = tl.where((a > b) | (a != a), a, b)
    elif op == MINIMUM:
        a = tl.where((a < b) | (a != a), a, b)
    elif op == NEG:
        a = -a
    elif op == RELU:
        a = tl.where(a < 0, 0.0, a)
    elif op == TANH:
        a = tanh(a)
    elif (op == SIGMOID) | (op == SILU):
        a = tl.sigmoid(a) * tl.where(op == SILU, a, 1.0)
    elif op == EXP:
        a = tl.exp(a)
    elif op == EXPM1:
        a = expm1(a)
    elif op == LOG:
        a = tl.log(a)
    elif op == GELU:
        a = 0.5 * a * (1 + tl.erf(a * 0.7071067811865476))
    elif op == GELU_TANH:
        a = 0.5 * a * (1 + tanh(0.7978845608028654 * (a + 0.044715 * a * a * a)))
    elif op == ELU:
        a = tl.where(a > 0, a, b * expm1(a))
    elif op == LEAKY_RELU:
        a = tl.where(a > 0, a, b * a)
    elif op == SQUARE:
        a = a * a
    elif op == ABS:
        a = tl.abs(a)
    elif op == SQRT:
        a = tl.sqrt_rn(a)
    elif op == RSQRT:
        a = tl.div_rn(1.0, tl.sqrt_rn(a))
    elif op == RECIPROCAL:
        a = tl.div_rn(1.0, a)
    elif op == GATE:
        a = tanh(a) * tl.sigmoid(b)
    elif op == GLU:
        a = a * tl.sigmoid(b)
    elif op == HIDE:
        a = tl.where(b != 0, float("-inf"), a)
    elif op == ERASE:
        a = tl.where(b != 0, 0.0, a)
    elif op == KEEP:
        a = tl.where(b != 0, a, 0.0)
    elif (op == SOFTPLUS) | (op == LOG1P):
        rest = log1p(tl.where(op == LOG1P, a, tl.exp(-tl.abs(a))))
        a = rest + tl.where((op == SOFTPLUS) & (a > 0), a, 0.0)
    elif op == ERF:
        a = tl.erf(a)
    elif op == EQ:
        a = (a == b).to(tl.float32)
    elif op == LT:
        a = (a < b).to(tl.float32)
    elif op == LE:
        a = (a <= b).to(tl.float32)
    return a
