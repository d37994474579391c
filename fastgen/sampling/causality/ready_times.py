"""Ready times of a traced network, and where it is not causal."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgen.sampling.rules import Analysis, Rule, rule_for
from fastgen.sampling.trace.graph import CONSTANT, NEVER, READY, Graph, Operand, Value


@dataclass(eq=False)
class Timed:
    """A graph with the rule of every computed value, and ready times for one drawing order."""

    graph: Graph
    analysis: Analysis
    rules: dict[int, Rule]

    @property
    def computed(self) -> list[Value]:
        return [value for value in self.graph.values if value.kind == "computed"]

    def output_ready(self) -> Tensor:
        return self.analysis.ready(self.graph.output)


def ready_times(graph: Graph, places: Tensor) -> Timed:
    """places: of the shape of the levels, int32, the place of each of them in the drawing order."""
    analysis = Analysis(graph)
    rules: dict[int, Rule] = {}
    for value in graph.values:
        if value.kind == "levels":
            analysis.set(value, places)
        elif value.kind == "condition":
            analysis.set(value, torch.full(value.shape, READY, dtype=torch.int32))
        elif value.kind == "constant":
            if value.base:
                analysis.set(value, torch.full(value.shape, CONSTANT, dtype=torch.int32))
        else:
            rule = rules[value.index] = rule_for(value, analysis)
            ready, low = rule.ready()
            analysis.set(value, ready, low)
    return Timed(graph, analysis, rules)


def path_to_input(timed: Timed, operand: Operand, element: tuple[int, ...]) -> list[tuple[Value, tuple[int, ...]]]:
    """A chain of elements, each computed from the next, from an element of an operand to the level it waits for."""
    number = int(operand.element_ids()[element])
    target = None
    path: list[tuple[Value, tuple[int, ...]]] = []
    while True:
        value = next(v for v in reversed(timed.graph.numbered) if v.base <= number)
        place = tuple(int(k) for k in torch.unravel_index(torch.tensor(number - value.base), value.shape))
        path.append((value, place))
        ready = timed.analysis.ready_of(value)
        target = int(ready[place]) if target is None else target
        if value.kind != "computed":
            return path
        times = torch.full(value.shape, NEVER, dtype=torch.int32)
        times[place] = 0
        following = None
        for one, wanted in timed.rules[value.index].needs(times):
            found = (wanted == 0) & (timed.analysis.ready(one) == target)
            if found.any():
                first = torch.nonzero(found)[0]
                following = int(one.element_ids()[tuple(first.tolist())])
                break
        if following is None:
            return path
        number = following


def order_places(order: Sequence[tuple[int, int, int]], shape: tuple[int, int, int]) -> Tensor:
    """Place of every level (1, C, H, W) in a drawing order given as channels, rows and columns."""
    places = torch.empty((1, *shape), dtype=torch.int32)
    index = torch.tensor(order)
    places[0, index[:, 0], index[:, 1], index[:, 2]] = torch.arange(len(order), dtype=torch.int32)
    return places
