"""Convolutions in two parts: what they sum from earlier rows of an image is computed for a whole row at once."""

from typing import Any

import torch
from torch import Tensor

from fastgen.sampling.causality import Order
from fastgen.sampling.graph import CONSTANT, NEVER, Map, Operand, Value
from fastgen.sampling.ready import Timed
from fastgen.sampling.rules import Rule
from fastgen.sampling.rules.convolution import Convolution
from fastgen.sampling.schedule import at_row_end, row_ends


class Onto:
    """A convolution added to a map."""

    def __call__(self, x: Tensor, weight: Tensor, onto: Tensor, *rest: Any) -> Tensor:
        return torch.ops.aten.convolution.default(x, weight, None, *rest) + onto

    def __str__(self) -> str:
        return "aten.convolution"


def split_rows(timed: Timed, order: Order, times: Tensor) -> bool:
    """Splits, in place, convolutions that run pixel by pixel and part of which can run row by row; whether any did.

    The rows of the kernel before its last live one go to a value of their own. One product computes it for a whole
    row of the image, where each pixel by itself would have to fetch all of those weights for the few numbers it has.

    Args:
        times: when each element is computed as things are.
    """
    graph, ends = timed.graph, row_ends(order)
    values: list[Value] = []
    rules: dict[int, Rule] = {}
    known = list(graph.values)
    for value in known:
        rule: Rule | None = timed.rules.get(value.index)
        values.append(value)
        if isinstance(rule, Convolution):
            parts = _split(timed, rule, ends, graph.of(times, value))
            if parts is not None:
                values.insert(-1, parts[0].value)
                rules[id(parts[0].value)], rule = parts
        if rule is not None:
            rules[id(value)] = rule
    if len(values) > len(known):
        graph.values = [*values, *graph.values[len(known) :]]  # the last are constants of the parts
        for index, value in enumerate(graph.values):
            value.index = index
        timed.rules = {value.index: rules[id(value)] for value in graph.values if id(value) in rules}
    return len(values) > len(known)


def _split(timed: Timed, rule: Convolution, ends: Tensor, times: Tensor) -> tuple[Convolution, Convolution] | None:
    """The rules of the two parts; None where they would not run at fewer steps, or there are no two."""
    value, graph, analysis = rule.value, timed.graph, timed.analysis
    if rule.transposed or rule.groups > 1 or rule.rank < 2 or _steps(times) <= 2 * len(ends):
        return None
    live = torch.nonzero(rule.live.movedim(2, 0).flatten(1).any(1)).flatten().tolist()
    if len(live) < 2:
        return None
    x, _, bias, *rest = value.args
    weights = [rule.weight.clone(), rule.weight.clone()]
    weights[0][:, :, live[-1] :] = 0
    weights[1][:, :, : live[-1]] = 0
    first = Value("computed", value.shape, value.data, value.op, (x, analysis.constant(weights[0]), bias, *rest))
    first.module = value.module
    first.data = first.compute(*(graph.data_of(one) for one in first.operands)).contiguous()
    earlier = Convolution(first, analysis)
    ready, low = earlier.ready()
    if 2 * _steps(at_row_end(ends, ready, times)) > _steps(times):
        return None
    graph.number(first)
    analysis.grow()
    analysis.set(first, ready, low)
    onto = Operand(graph, first.shape, map=Map.identity(first))
    value.op, value.args = Onto(), (x, analysis.constant(weights[1]), onto, *rest)
    return earlier, Convolution(value, analysis)


def _steps(times: Tensor) -> int:
    """At how many of them something is computed."""
    return int(((times != CONSTANT) & (times != NEVER)).any() and len(times.unique()))
