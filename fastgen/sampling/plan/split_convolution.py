"""Takes a timed graph; splits its convolutions in two: what they sum from earlier rows is computed for a whole row at
once, and the rest, pixel by pixel, is added to it."""

from typing import Any

import torch
from torch import Tensor

from fastgen.sampling.causality.draws import Order
from fastgen.sampling.causality.ready_times import Timed
from fastgen.sampling.plan.schedule import at_row_end, row_ends
from fastgen.sampling.rules import Analysis, Rule
from fastgen.sampling.rules.convolution import Convolution
from fastgen.sampling.rules.transposed import TransposedConvolution
from fastgen.sampling.trace.element_times import ElementTimes, compact
from fastgen.sampling.trace.graph import CONSTANT, NEVER, Map, Operand, Value


class ConvolutionPlusMap:
    """A convolution added to a map."""

    def __call__(self, x: Tensor, weight: Tensor, onto: Tensor, *rest: Any) -> Tensor:
        return torch.ops.aten.convolution.default(x, weight, None, *rest) + onto

    def __str__(self) -> str:
        return "aten.convolution"


def split_rows(timed: Timed, order: Order, times: ElementTimes) -> bool:
    """Splits, in place, convolutions that run pixel by pixel and part of which can run row by row; whether any did.

    The rows of the kernel before its last live one go to a value of their own. One product computes it for a whole
    row of the image, where each pixel by itself would have to fetch all of those weights for the few numbers it has.

    Args:
        times: when each element is computed as things are.
    """
    graph, analysis, ends = timed.graph, timed.analysis, row_ends(order)
    known = list(graph.values)
    earlier: dict[int, tuple[Convolution, Operand]] = {}
    for value in known:
        rule = timed.rules.get(value.index)
        if isinstance(rule, Convolution):
            found = _earlier_rows(timed, rule, ends, times.of(value))
            if found is not None:
                graph.number(found[0].value)
                earlier[value.index] = found
    if not earlier:
        return False
    values: list[Value] = []
    rules: list[Rule] = []
    for value in known:
        rule = timed.rules.get(value.index)
        if value.index in earlier:
            first, last_row = earlier[value.index]
            analysis.set(first.value, *first.ready())
            onto = Operand(graph, value.shape, map=Map.identity(first.value))
            value.op, value.args = ConvolutionPlusMap(), (value.args[0], last_row, onto, *value.args[3:])
            values.append(first.value)
            rules.append(first)
            rule = Convolution(value, analysis)
        values.append(value)
        rules += [] if rule is None else [rule]
    graph.values = [*values, *graph.values[len(known) :]]  # the last are constants of the parts
    for index, value in enumerate(graph.values):
        value.index = index
    timed.rules = {rule.value.index: rule for rule in rules}
    return True


def _earlier_rows(timed: Timed, rule: Convolution, ends: Tensor, times: Tensor) -> tuple[Convolution, Operand] | None:
    """The convolution by all rows of the kernel but its last live one, and the weights of that one; None where it would
    not run at fewer steps, or there is one row alone."""
    value, graph, analysis = rule.value, timed.graph, timed.analysis
    if isinstance(rule, TransposedConvolution) or rule.groups > 1 or rule.rank < 2 or _steps(times) <= 2 * len(ends):
        return None
    live = torch.nonzero(rule.live.movedim(2, 0).flatten(1).any(1)).flatten().tolist()
    if len(live) < 2:
        return None
    rows, last_row = (_rows(analysis, rule.weight, kept) for kept in (slice(live[-1]), slice(live[-1], None)))
    x, _, bias, *rest = value.args
    first = Value("computed", value.shape, value.data, value.op, (x, rows, bias, *rest))
    first.module = value.module
    first.derive = lambda: first.compute(*(graph.data_of(one) for one in first.operands)).contiguous()
    first.data = first.derive()
    found = Convolution(first, analysis)
    fewer = 2 * _steps(at_row_end(ends, found.ready()[0], times)) <= _steps(times)
    return (found, last_row) if fewer else None


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
    found = compact(times).unique()
    return int(((found != CONSTANT) & (found != NEVER)).sum())
