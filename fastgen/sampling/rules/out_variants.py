"""Operators that write into memory which is there already."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

# torch's own functions cost less to call than ATen's overloads.
QUICK = {
    "add", "sub", "mul", "div", "tanh", "sigmoid", "exp", "log", "neg", "sin", "cos", "sqrt", "rsqrt", "abs", "pow",
    "maximum", "minimum", "erf", "square", "eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_not", "log1p",
    "expm1", "reciprocal", "floor", "round",
}  # fmt: skip


# ATen overloads that were found right for an `out` of any strides. gelu.out, _softmax.out and im2col.out of torch 2.13
# write elsewhere than asked into an `out` that is not contiguous, so that nothing else is taken on trust.
TRUSTED = {
    "where", "elu", "silu", "mish", "leaky_relu", "softplus", "hardtanh", "hardswish", "hardsigmoid", "clamp",
    "clamp_min", "clamp_max", "lerp", "addcmul", "nan_to_num", "atan2", "fmod", "remainder", "sign", "ceil", "trunc",
    "bitwise_and", "bitwise_or", "bitwise_not", "logical_or", "logical_xor", "isnan",
}  # fmt: skip


@cache
def out_variant(op: Any) -> Callable[..., Any] | None:
    """The function that does what `op` does, into `out=`; None where there is none that can be trusted."""
    name = op._schema.name.split("::")[1]
    if name in QUICK and op._schema.name.startswith("aten::"):
        return getattr(torch, name)
    if name not in TRUSTED:
        return None
    wanted = [(argument.name, str(argument.type)) for argument in op._schema.arguments]
    for overload_name in op.overloadpacket.overloads():
        overload = getattr(op.overloadpacket, overload_name)
        arguments = overload._schema.arguments
        outs = [a for a in arguments if a.alias_info is not None and a.alias_info.is_write]
        rest = [(a.name, str(a.type)) for a in arguments if a.alias_info is None or not a.alias_info.is_write]
        if len(outs) == 1 and outs[0].name == "out" and rest == wanted:
            return overload
    return None
