"""Operations that may hide what they read, so that ready times claim too much.

A weight that is not zero, a relu, a product or a softmax lets through what it reads for some input: what reaches the
output through such operations alone is a dependence for certain. Five kinds of operations are not so:

- a difference or a quotient of two things that depend on the same level, as in `x.cumsum(-1) - x`;
- a comparison, a rounding, an argmax, whose result may be the same for all inputs, as in `x.mean() > 9`, and what is
  multiplied by it, or by a share of a softmax that is next to nothing;
- an activation of something so large that it is the same whatever is added, as where a mask is added to scores, and
  what puts a number in the place of infinity;
- a choice by computed indices or conditions, or an operator that is not known;
- a Fourier transform, whose inverse may put all in its place again, as in a causal convolution by FFT.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastgen.sampling.rules import Analysis, Opaque, Slicewise, rule_kind
from fastgen.sampling.rules.base import constant_operand
from fastgen.sampling.rules.pointwise import SWALLOWS
from fastgen.sampling.trace.graph import Operand, Value

DISCRETE = {
    "lt", "le", "gt", "ge", "eq", "ne", "logical_and", "logical_or", "logical_xor", "logical_not", "bitwise_and",
    "bitwise_or", "bitwise_xor", "bitwise_not", "floor", "ceil", "round", "trunc", "frac", "fmod", "remainder", "sign",
    "sgn", "signbit", "argmax", "argmin", "isnan", "isinf", "any", "all", "max", "min", "heaviside", "floor_divide",
}  # fmt: skip
SATURATES = {
    "exp", "exp2", "expm1", "sigmoid", "tanh", "relu", "silu", "gelu", "softplus", "elu", "clamp", "clamp_min",
    "clamp_max",
}  # fmt: skip
CHOICES = {"where", "masked_fill", "index", "masked_scatter"}
CLEAR = {"linalg_cross", "view_as_real_copy"}  # those of `Slicewise` that hide nothing
CHAIN = 4  # operations on one operand, between a negation and the sum that it takes part in


def erased(value: Value, bound: Analysis, certain: Analysis, ready: Tensor) -> Tensor | None:
    """Where the result of an operation may not depend on what it reads; None: nowhere.

    Args:
        bound: the ready times, an upper bound.
        certain: the times of certain dependences of its operands, of which `ready` have been found.
    """
    name = value.op_name
    variable = [one for one in value.operands if not constant_operand(one)]
    if len(variable) > 1 and _may_cancel(value, variable, name):
        return _difference(value, variable, bound, certain, ready)
    everywhere = torch.ones((), dtype=torch.bool)
    if name == "nan_to_num":
        return ~bound.data(value.operands[0]).isfinite()
    if name in SATURATES:
        return bound.data(value.operands[0]).abs() >= SWALLOWS
    if name == "eq" and all(not one.dtype.is_floating_point for one in variable):
        return None  # a level is equal to one of the levels sometimes: one_hot
    rounds = name in DISCRETE or value.kwargs.get("rounding_mode") is not None
    if rounds and not (name in ("max", "min") and value.output == 0):
        return everywhere
    if name == "_to_copy" and variable and variable[0].dtype.is_floating_point:
        return None if value.data.is_floating_point() or value.data.is_complex() else everywhere
    if name in CHOICES and _chooses(value, name):
        return everywhere
    kind = rule_kind(value)
    if kind is Opaque or (kind is Slicewise and name not in CLEAR):
        return everywhere
    return None


def _may_cancel(value: Value, variable: list[Operand], name: str) -> bool:
    """Whether an operation takes one of its operands from another, or divides by it."""
    if name in ("sub", "rsub", "div"):
        return True
    if name == "add":
        alpha = value.kwargs.get("alpha", 1)
        return (not isinstance(alpha, complex) and alpha < 0) or any(_passes(one, _negates) for one in variable)
    return name == "mul" and any(_passes(one, _inverts) for one in variable)


def _passes(operand: Operand, through: Callable[[Value, str], bool]) -> bool:
    """Whether such an operation is the last on the way to an operand, or others with one operand come after it."""
    for _ in range(CHAIN):
        if len(operand.values) != 1 or operand.values[0].kind != "computed":
            return False
        value = operand.values[0]
        if through(value, value.op_name):
            return True
        variable = [one for one in value.operands if not constant_operand(one)]
        if len(variable) != 1:
            return False
        operand = variable[0]
    return False


def _negates(value: Value, name: str) -> bool:
    if name in ("mul", "div"):
        factors = [torch.as_tensor(one) for one in value.args if not isinstance(one, Operand)]
        factors += [one.graph.data_of(one) for one in value.operands if constant_operand(one)]
        return any(one.is_complex() or bool((one < 0).any()) for one in factors)
    return name in ("neg", "rsub") or (name == "sub" and constant_operand(value.args[0]))


def _inverts(value: Value, name: str) -> bool:
    return name in ("reciprocal", "rsqrt", "exp", "pow") or (name == "div" and constant_operand(value.args[0]))


def _difference(
    value: Value, variable: list[Operand], bound: Analysis, certain: Analysis, ready: Tensor
) -> Tensor | None:
    """Of two operands that may depend on the same level: unless one of them is ready before the other's last."""
    shape, (first, second) = value.shape, variable[:2]
    times = [certain.ready(one).expand(shape) for one in (first, second)]
    latest = [bound.ready(one).expand(shape) for one in (first, second)]
    apart = ((times[0] > latest[1]) & (ready == times[0])) | ((times[1] > latest[0]) & (ready == times[1]))
    return ~apart


def _chooses(value: Value, name: str) -> bool:
    """Whether by something computed."""
    if name == "index":
        chosen = value.args[1]
        return not constant_operand(value.args[0]) or any(one is not None for one in chosen[1:])
    by = value.args[0 if name == "where" else 1]
    return isinstance(by, Operand) and not constant_operand(by)
