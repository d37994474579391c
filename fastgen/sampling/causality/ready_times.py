"""Takes a graph and a drawing order; gives ready times: the draw index of the last level that an element depends on.

A level is ready when it is drawn, a constant always. Every operation says which elements of its operands an element
reads, and the element is ready with the last of them. A convolution with the kernel [[1, 1, 1], [1, 0, 0], [0, 0, 0]]
(a masked one of type A) over an image of 3x3 pixels, drawn in raster order:

    draw index    ready times
    0 1 2         -  0  1
    3 4 5         1  3  4
    6 7 8         4  6  7

Its centre reads the draws 0, 1, 2 and 3, so that it is ready after draw 3. Each element is ready before its own draw:
the layer is causal. Only weights that are exactly zero hide anything. The times hold for all inputs, and are an upper
bound: `x - x` counts as depending on x. So they prove that a model is causal, not that it leaks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastgen.sampling.causality.doubt import erased
from fastgen.sampling.rules import Analysis, Rule, rule_for
from fastgen.sampling.trace.graph import NEVER, READY, Graph, Operand, Value, coordinates


@dataclass(eq=False)
class Timed:
    """A graph with the rule of every computed value, and ready times for one drawing order."""

    graph: Graph
    analysis: Analysis
    rules: dict[Value, Rule]

    @property
    def computed(self) -> list[Value]:
        return [value for value in self.graph.values if value.kind == "computed"]

    def output_ready(self) -> Tensor:
        return self.analysis.ready(self.graph.output)


def ready_times(graph: Graph, draw_index: Tensor, bound: Timed | None = None) -> Timed:
    """Ready times for one drawing order.

    Args:
        draw_index: of every level, int32, of the shape of the levels.
        bound: the ready times, where those of dependences are asked for that no operation can hide: of each element the
            last level that it certainly depends on.
    """
    analysis = Analysis(graph, certain=bound is not None)
    rules: dict[Value, Rule] = {}
    for value in list(graph.values):
        if value.kind == "levels":
            analysis.set(value, draw_index)
        elif value.kind == "condition":
            analysis.set(value, torch.full((), READY, dtype=torch.int32).expand(value.shape))
        elif value.kind == "constant":
            continue
        else:
            rule = rules[value] = rule_for(value, analysis)
            ready, low = rule.ready()
            if bound is not None:
                doubtful = erased(value, bound.analysis, analysis, ready)
                ready = ready if doubtful is None else torch.where(doubtful & (ready >= 0), READY, ready)
            analysis.set(value, ready, low)
    return Timed(graph, analysis, rules)


def path_to_input(timed: Timed, operand: Operand, element: tuple[int, ...]) -> list[tuple[Value, tuple[int, ...]]]:
    """A chain of elements, each computed from the next, from an element of an operand to the level it waits for."""
    number = int(operand.element_ids()[element])
    target = None
    path: list[tuple[Value, tuple[int, ...]]] = []
    while True:
        value = next(v for v in reversed(timed.graph.numbered) if v.base <= number)
        place = tuple(int(k) for k in coordinates(torch.tensor(number - value.base), value.shape))
        path.append((value, place))
        ready = timed.analysis.ready_of(value)
        target = int(ready[place]) if target is None else target
        if value.kind != "computed":
            return path
        times = torch.full(value.shape, NEVER, dtype=torch.int32)
        times[place] = 0
        following = None
        for one, wanted in timed.rules[value].needs(times):
            found = (wanted == 0) & (timed.analysis.ready(one) == target)
            if found.any():
                first = torch.nonzero(found)[0]
                following = int(one.element_ids()[tuple(first.tolist())])
                break
        if following is None:
            return path
        number = following
