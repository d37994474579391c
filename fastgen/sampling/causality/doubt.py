"""Operations that may hide what they read, so that ready times claim too much.

A weight that is not zero, a relu, a product or a softmax lets through what it reads for some input: what reaches the
output through such operations alone is a dependence for certain. Three kinds of operations are not so:

- a difference or a quotient of two things that depend on the same level, as in `x.cumsum(-1) - x`;
- a comparison, a rounding, an argmax, whose result may be the same for all inputs, as in `x.mean() > 9`, and what is
  multiplied by it;
- a choice by computed indices or conditions, or an operator that is not known.
"""

import torch
from torch import Tensor

from fastgen.sampling.rules import Analysis, Opaque, Slicewise, rule_kind
from fastgen.sampling.rules.base import constant_operand
from fastgen.sampling.trace.graph import Operand, Value

DISCRETE = {
    "lt", "le", "gt", "ge", "eq", "ne", "logical_and", "logical_or", "logical_xor", "logical_not", "bitwise_and",
    "bitwise_or", "bitwise_xor", "bitwise_not", "floor", "ceil", "round", "trunc", "frac", "fmod", "remainder", "sign",
    "sgn", "signbit", "argmax", "argmin", "isnan", "isinf", "any", "all", "max", "min", "heaviside", "floor_divide",
}  # fmt: skip
DIFFERENCES = {"sub", "rsub", "div", "add"}
CHOICES = {"where", "masked_fill", "index", "masked_scatter"}
ALONG_ONLY = {"linalg_cross", "_fft_r2c", "_fft_c2r", "_fft_c2c", "view_as_real_copy"}  # no choices among `Slicewise`


def erased(value: Value, bound: Analysis, certain: Analysis, ready: Tensor) -> Tensor | None:
    """Where the result of an operation may not depend on what it reads; None: nowhere.

    Args:
        bound: the ready times, an upper bound.
        certain: the times of certain dependences of its operands, of which `ready` have been found.
    """
    name = value.op._schema.name.split("::")[1]
    variable = [one for one in value.operands if not constant_operand(one)]
    if name in DIFFERENCES:
        return _difference(value, variable, bound, certain, ready, name)
    everywhere = torch.ones((), dtype=torch.bool)
    if name == "eq" and all(not one.dtype.is_floating_point for one in variable):
        return None  # a level is equal to one of the levels sometimes: one_hot
    if name in DISCRETE and not (name in ("max", "min") and value.output == 0):
        return everywhere
    if name == "_to_copy" and variable and variable[0].dtype.is_floating_point:
        return None if value.data.is_floating_point() or value.data.is_complex() else everywhere
    if name in CHOICES and _chooses(value, name):
        return everywhere
    kind = rule_kind(value)
    if kind is Opaque or (kind is Slicewise and name not in ALONG_ONLY):
        return everywhere
    return None


def _difference(
    value: Value, variable: list[Operand], bound: Analysis, certain: Analysis, ready: Tensor, name: str
) -> Tensor | None:
    """Of two operands that may depend on the same level: unless one of them is ready before the other's last."""
    if len(variable) < 2:
        return None
    if name == "add" and not _subtracts(value, variable):
        return None
    first, second = variable[:2]
    shape = value.shape
    times = [certain.ready(one).expand(shape) for one in (first, second)]
    latest = [bound.ready(one).expand(shape) for one in (first, second)]
    apart = ((times[0] > latest[1]) & (ready == times[0])) | ((times[1] > latest[0]) & (ready == times[1]))
    return ~apart


def _subtracts(value: Value, variable: list[Operand]) -> bool:
    alpha = value.kwargs.get("alpha", 1)
    sources = [one.map.value for one in variable if one.map is not None]
    negated = any(one.op is not None and one.op._schema.name == "aten::neg" for one in sources)
    return negated or (not isinstance(alpha, complex) and alpha < 0)


def _chooses(value: Value, name: str) -> bool:
    """Whether by something computed."""
    if name == "index":
        chosen = value.args[1]
        return not constant_operand(value.args[0]) or any(one is not None for one in chosen[1:])
    by = value.args[0 if name == "where" else 1]
    return isinstance(by, Operand) and not constant_operand(by)
