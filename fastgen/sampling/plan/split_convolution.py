"""Takes a timed graph; splits its convolutions in two: what they sum from earlier rows is computed for a whole row at
once, and the rest, pixel by pixel, is added to it."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastgen.sampling.causality.ready_times import Timed
from fastgen.sampling.plan.schedule import at_row_end
from fastgen.sampling.rules.convolution import Convolution
from fastgen.sampling.rules.transposed import TransposedConvolution
from fastgen.sampling.trace.element_times import compact
from fastgen.sampling.trace.graph import CONSTANT, NEVER, READY, Graph, Value

aten = torch.ops.aten


@dataclass(frozen=True)
class FirstRows:
    """What a convolution sums of the rows of its kernel before `stop`, as an operator of the same arguments."""

    stop: int
    _schema: ClassVar[Any] = aten.convolution.default._schema

    def __str__(self) -> str:
        return "aten.convolution"

    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, *rest: Any
    ) -> Tensor:
        kernel = weight[:, :, : self.stop]
        found = aten.convolution.default(x, kernel, bias, stride, padding, dilation, *rest)
        rows = (x.shape[2] + 2 * padding[0] - dilation[0] * (weight.shape[2] - 1) - 1) // stride[0] + 1
        return found[:, :, :rows]


def split_rows(timed: Timed, ends: Tensor, value: Value, times: Tensor) -> Value | None:
    """Splits a convolution that runs pixel by pixel and part of which can run row by row.

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
    if not isinstance(rule, Convolution) or isinstance(rule, TransposedConvolution) or isinstance(value.op, FirstRows):
        return None
    live = torch.nonzero(rule.live_rows).flatten().tolist() if rule.rank > 1 else []
    steps = _steps(times) if rule.groups == 1 and len(live) > 1 else 0
    if steps <= 2 * len(ends):
        return None
    first = replace(value, op=FirstRows(live[-1]), index=len(graph.values), base=0)
    found = Convolution(first, analysis, slice(live[-1]))
    ready = found.ready()
    if 2 * _steps(at_row_end(ends, ready[0], times)) > steps:
        return None
    first.data = _constants(first, ready[0], graph)
    graph.number(first)
    graph.values.insert(graph.values.index(value), first)
    analysis.set(first, *ready)
    timed.rules |= {first: found, value: Convolution(value, analysis, slice(live[-1], None), graph.whole(first))}
    return first


def _constants(first: Value, ready: Tensor, graph: Graph) -> Tensor:
    """What is constant of a first part that is not computed yet, in its place; the rows after it are 0."""
    found = torch.zeros_like(first.data)
    in_row = (compact(ready) == CONSTANT).transpose(0, 2).flatten(1).any(1).expand(first.shape[2])
    rows = int(torch.nonzero(in_row).max()) + 1 if in_row.any() else 0
    x, *rest = map(graph.data_of, first.operands)
    stride, padding, dilation = (one[0] for one in first.args[3:6])
    seen = (rows - 1) * stride + (rest[0].shape[2] - 1) * dilation + 1 - padding
    found[:, :, :rows] = first.compute(x[:, :, : max(seen, 1)], *rest)[:, :, :rows] if rows else 0
    return found


def _steps(times: Tensor) -> int:
    """At how many of them something is computed."""
    found = compact(times)
    return int(
        torch.where(found == NEVER, 0, found - CONSTANT).flatten().bincount()[READY - CONSTANT :].count_nonzero()
    )
