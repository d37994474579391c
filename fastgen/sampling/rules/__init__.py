"""One rule for every kind of operation: when its results are ready, what they need, how a part of them is computed."""

import torch

from fastgen.sampling.rules.base import Analysis, Rule, constant_operand
from fastgen.sampling.rules.concatenation import Concatenation
from fastgen.sampling.rules.condition import Condition
from fastgen.sampling.rules.convolution import Convolution
from fastgen.sampling.rules.grouped_convolution import FEW_GROUPS, GroupedConvolution
from fastgen.sampling.rules.matmul import MatMul
from fastgen.sampling.rules.pointwise import Pointwise
from fastgen.sampling.rules.reduction import Cumulative, Lookup, Opaque, Reduction, Softmax
from fastgen.sampling.rules.scan import DiagonalScan, RowScan
from fastgen.sampling.rules.selection import Selection
from fastgen.sampling.rules.slicewise import Slicewise
from fastgen.sampling.rules.transposed import TransposedConvolution
from fastgen.sampling.trace.graph import Value

__all__ = ["Analysis", "Opaque", "Rule", "Slicewise", "rule_for", "rule_kind"]

POINTWISE = {
    "clone", "_to_copy", "view", "complex", "polar",
    "fake_quantize_per_tensor_affine_cachemask", "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
}  # fmt: skip
BY_NAME: dict[str, type[Rule]] = {
    "convolution": Convolution,
    "diagonal_lstm": DiagonalScan,
    "row_lstm": RowScan,
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm"), MatMul),
    **dict.fromkeys(("_softmax", "_log_softmax", "_safe_softmax"), Softmax),
    **dict.fromkeys(("cat", "stack"), Concatenation),
    **dict.fromkeys(("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin"), Cumulative),
}
REDUCTION = {"native_layer_norm", "linalg_vector_norm", "logsumexp", "argmax", "argmin", "norm", "var"}


def rule_for(value: Value, analysis: Analysis) -> Rule:
    """The rule of a computed value."""
    return rule_kind(value)(value, analysis)


def rule_kind(value: Value) -> type[Rule]:
    name = value.op_name
    if name == "convolution" and value.args[6]:
        return TransposedConvolution
    if name == "convolution" and value.args[8] > FEW_GROUPS:
        return GroupedConvolution
    if name in BY_NAME:
        return BY_NAME[name]
    if name == "embedding" and constant_operand(value.args[0]):
        return Lookup
    if name == "index" and constant_operand(value.args[0]) and len(value.args[1]) == 1:
        return Lookup
    for kind in (Slicewise, Selection, Condition):
        if kind.takes(value):
            return kind
    if name in REDUCTION or torch.Tag.reduction in value.op.tags:
        return Reduction
    if name in POINTWISE or torch.Tag.pointwise in value.op.tags:
        return Pointwise
    return Opaque
