"""Takes a timed graph; splits its convolutions in two: what they sum from earlier rows is computed for a whole row at
once, and the rest, pixel by pixel, is added to it."""

from typing import Any

import torch
from torch import Tensor

from fastgen.sampling.causality.ready_times import Timed
from fastgen.sampling.plan.schedule import at_row_end
from fastgen.sampling.rules import Analysis
from fastgen.sampling.rules.convolution import Convolution
from fastgen.sampling.rules.transposed import TransposedConvolution
from fastgen.sampling.trace.element_times import compact
from fastgen.sampling.trace.graph import CONSTANT, NEVER, READY, Map, Operand, Value


class ConvolutionPlusMap:
    """A convolution added to a map."""

    def __call__(self, x: Tensor, weight: Tensor, onto: Tensor, *rest: Any) -> Tensor:
        return torch.ops.aten.convolution.default(x, weight, None, *rest) + onto

    def __str__(self) -> str:
        return "aten.convolution"


def split_rows(timed: Timed, ends: Tensor, value: Value, times: Tensor) -> Value | None:
    """Splits, in place, a convolution that runs pixel by pixel and part of which can run row by row.

    The rows of the kernel before its last live one go to a value of their own. One product computes it for a whole
    row of the image, where each pixel by itself would have to fetch all of those weights for the few numbers it has.

    Args:
        ends: of rows, see `row_ends`.
        value: any of the graph.
        times: when each of its elements is computed.

    Returns:
        The value of that part, None where there is none, or where it would not run at fewer steps.
    """
    rule, graph, analysis = timed.rules[value], timed.graph, timed.analysis
    if not isinstance(rule, Convolution) or isinstance(rule, TransposedConvolution) or value.derive is not None:
        return None
    live = torch.nonzero(rule.live_rows).flatten().tolist() if rule.rank > 1 else []
    steps = _steps(times) if rule.groups == 1 and len(live) > 1 else 0
    if steps <= 2 * len(ends):
        return None
    rows, last_row = (_rows(analysis, rule.weight, kept) for kept in (slice(live[-1]), slice(live[-1], None)))
    x, _, bias, *rest = value.args
    first = Value("computed", value.shape, value.data, value.op, (x, rows, bias, *rest), index=len(graph.values))
    first.module = value.module
    first.derive = lambda: first.compute(*(graph.data_of(one) for one in first.operands)).contiguous()
    first.data = first.derive()
    found = Convolution(first, analysis)
    ready = found.ready()
    if 2 * _steps(at_row_end(ends, ready[0], times)) > steps:
        return None
    graph.number(first)
    graph.values.insert(graph.values.index(value), first)
    analysis.set(first, *ready)
    onto = Operand(graph, value.shape, map=Map.identity(first))
    value.op, value.args = ConvolutionPlusMap(), (x, last_row, onto, *rest)
    timed.rules |= {first: found, value: Convolution(value, analysis)}
    return first


def _rows(analysis: Analysis, weight: Tensor, kept: slice) -> Operand:
    """Some rows of a kernel, zeros in the place of the others."""

    def derive() -> Tensor:
        found = torch.zeros_like(weight)
        found[:, :, kept] = weight[:, :, kept]
        return found

    operand = analysis.constant(derive())
    operand.values[0].derive = derive
    return operand


def _steps(times: Tensor) -> int:
    """At how many of them something is computed."""
    found = compact(times)
    return int((found[(found != CONSTANT) & (found != NEVER)] - READY).bincount().count_nonzero())
