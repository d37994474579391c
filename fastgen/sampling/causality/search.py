"""An order in which a model is causal, from ready times in orders in which it is not.

Ready times in any order name, for every draw, the last draw that it depends on: one dependence each. The next order
puts every draw behind all draws that it is known to depend on, otherwise by chance, and is tried in turn. A model that
draws d, b, a, c, each from all before, tried in the order a b c d:

    order tried    last dependence of each            known: behind
    a b c d        a: d   b: d   c: d   d: -          d, then a b c
    d c a b        a: b   b: d   c: b   d: -          d, b, then a c
    d b c a        a: b   b: d   c: a                 d, b, a, c

Each order tried splits the groups of draws that are not told apart yet, as in quicksort, so that few are needed. Where
the known dependences make a circle, no order exists.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgen.sampling.causality.draws import Draws, raster_variants

MOST_ROUNDS = 64  # orders tried


@dataclass(frozen=True)
class Found:
    """What a search has found.

    Attributes:
        draws: in an order in which the model is causal; None: there is none, or none was found.
        circle: draws, each of which depends on the next, and the last on the first; empty where there is none.
    """

    draws: Draws | None
    circle: list[tuple[int, int, int]]


def search(output_ready: Callable[[Tensor], Tensor], draws: Draws, depends: Tensor) -> Found:
    """Looks for an order of these draws: as they are, in raster orders from other corners, in any order.

    Args:
        output_ready: the draw index of every level -> ready times of the output.
        draws: in raster order.
        depends: dependences that are known already, bool, [a, b] where draw a depends on draw b by their numbers in
            `draws`.
    """
    depends, numbers = depends.clone(), torch.arange(len(draws))
    generator = torch.Generator().manual_seed(0)
    orders = [numbers, *raster_variants(draws)]
    for k in range(MOST_ROUNDS):
        level = _levels(depends)
        if level is None:
            return Found(None, [draws.order[a] for a in _circle(depends)])
        by_chance = torch.randperm(len(draws), generator=generator)
        order = orders[k] if k < len(orders) else by_chance[level[by_chance].argsort(stable=True)]
        tried = draws.reordered(order)
        latest = tried.latest_of(output_ready(tried.of_levels()))
        known = torch.nonzero(latest >= 0).flatten()
        depends[order[known], order[latest[known]]] = True
        # Every draw comes after all that it is known to depend on: of each the last of these is known.
        if not bool(depends[order][:, order].triu().any()):
            return Found(tried if k < len(orders) else _near(draws, depends, output_ready) or tried, [])
    return Found(None, [])


def _near(draws: Draws, depends: Tensor, output_ready: Callable[[Tensor], Tensor]) -> Draws | None:
    """The order nearest to that of `draws` that the known dependences allow, where it is one that all of them allow."""
    order = topological_order(depends)
    assert order is not None
    tried = draws.reordered(torch.tensor(order))
    fits = (tried.latest_of(output_ready(tried.of_levels())) < torch.arange(len(draws))).all()
    return tried if fits else None


def topological_order(depends: Tensor) -> list[int] | None:
    """The order nearest to 0, 1, ... in which every draw comes after what it depends on; None where none does.

    depends[a, b]: draw a depends on the level of draw b.
    """
    count = len(depends)
    waiting = depends.sum(1).tolist()
    dependents = [torch.nonzero(column).flatten().tolist() for column in depends.T]
    heap = [a for a in range(count) if waiting[a] == 0]
    found = []
    while heap:
        b = heapq.heappop(heap)
        found.append(b)
        for a in dependents[b]:
            waiting[a] -= 1
            if waiting[a] == 0:
                heapq.heappush(heap, a)
    return found if len(found) == count else None


def _levels(depends: Tensor) -> Tensor | None:
    """For each draw how many others come before it in the longest chain; None where there is a circle."""
    order = topological_order(depends)
    if order is None:
        return None
    level = [0] * len(depends)
    for a, b in torch.nonzero(depends[order]).tolist():  # all that a draw depends on come before it
        level[order[a]] = max(level[order[a]], 1 + level[b])
    return torch.tensor(level)


def _circle(depends: Tensor) -> list[int]:
    """Draws that depend on each other in turn."""
    alive = torch.ones(len(depends), dtype=torch.bool)
    while True:  # draws without a dependence among those that are left are in no circle
        left = alive & (depends & alive).any(1)
        if bool((left == alive).all()):
            break
        alive = left
    at = int(torch.nonzero(alive)[0])
    path: list[int] = []
    while at not in path:
        path.append(at)
        at = int(torch.nonzero(depends[at] & alive)[0])
    return path[path.index(at) :]
