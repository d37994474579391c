"""One rule for every kind of operation: when its results are ready, what they need, how a part of them is computed."""

import torch

from fastgen.sampling.rules.base import Analysis, Rule, constant_operand
from fastgen.sampling.rules.convolution import Convolution
from fastgen.sampling.rules.matmul import MatMul
from fastgen.sampling.rules.pointwise import Pointwise
from fastgen.sampling.rules.pooling import MaxPool2d
from fastgen.sampling.rules.reduction import Concatenation, Cumulative, Lookup, Opaque, Reduction, Softmax
from fastgen.sampling.rules.scan import DiagonalScan, RowScan
from fastgen.sampling.rules.slicewise import Slicewise
from fastgen.sampling.trace.graph import Value

__all__ = ["Analysis", "Rule", "rule_for"]

POINTWISE = {
    "clone", "_to_copy", "masked_fill", "where", "complex", "polar", "fake_quantize_per_tensor_affine_cachemask",
    "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
}  # fmt: skip
CUMULATIVE = {"cumsum", "cumprod", "logcumsumexp", "cummax", "cummin"}
MATMUL = {"mm", "addmm", "bmm", "baddbmm"}
SOFTMAX = {"_softmax", "_log_softmax", "_safe_softmax"}
REDUCTION = {"native_layer_norm", "linalg_vector_norm", "logsumexp", "argmax", "argmin", "norm", "var"}


def rule_for(value: Value, analysis: Analysis) -> Rule:
    """The rule of a computed value."""
    name = value.op._schema.name.split("::")[1]
    if name == "convolution":
        return Convolution(value, analysis)
    if name in MATMUL:
        return MatMul(value, analysis)
    if name in SOFTMAX:
        return Softmax(value, analysis)
    if name in ("cat", "stack"):
        return Concatenation(value, analysis)
    if name == "max_pool2d_with_indices" and MaxPool2d.takes(value):
        return MaxPool2d(value, analysis)
    if name in CUMULATIVE:
        return Cumulative(value, analysis)
    if name == "diagonal_lstm":
        return DiagonalScan(value, analysis)
    if name == "row_lstm":
        return RowScan(value, analysis)
    if name == "embedding" and constant_operand(value.args[0]):
        return Lookup(value, analysis)
    if name == "index" and constant_operand(value.args[0]) and len(value.args[1]) == 1:
        return Lookup(value, analysis)
    if Slicewise.takes(value):
        return Slicewise(value, analysis)
    if name in REDUCTION or torch.Tag.reduction in value.op.tags:
        return Reduction(value, analysis)
    if name in POINTWISE or torch.Tag.pointwise in value.op.tags:
        return Pointwise(value, analysis)
    return Opaque(value, analysis)
