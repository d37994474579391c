"""Takes ready times and deadlines; gives the step at which each element is computed, and in which boxes: `Schedule`.

Step s follows the draw of place s of the drawing order; step -1 comes before the first. An element is computed at the
step of its ready time, or, where that is not too late for any element that needs it, at the end of a later row: so the
vertical stack of a gated PixelCNN and the coarse levels of a strided model run a row at a time.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgen.sampling.causality.ready_times import Timed
from fastgen.sampling.plan.layout import Box
from fastgen.sampling.rules import Rule
from fastgen.sampling.trace.element_times import Distinct, ElementTimes, compact
from fastgen.sampling.trace.graph import CONSTANT, NEVER, READY, Value, coordinates


@dataclass(frozen=True, eq=False)
class Boxes:
    """In which boxes a value is computed, in the order of their steps. Values that are computed alike share them.

    Attributes:
        at: (boxes,), the number of each one's step: 0 is step -1.
        start, sizes, steps: (dimensions, boxes), as of a `Box`.
        first: the number of the first step that computes each element of a value, -1 where none does; of size 1 along
            dimensions that all boxes hold whole.
    """

    at: np.ndarray
    start: np.ndarray
    sizes: np.ndarray
    steps: np.ndarray
    first: np.ndarray

    @cached_property
    def kinds(self) -> np.ndarray:
        """(boxes,), equal for boxes of equal sizes and steps."""
        kinds = np.zeros(len(self.at), dtype=np.int64)
        for along in (*self.sizes, *self.steps):
            kinds = pairs(kinds, along)
        return kinds

    @cached_property
    def nth(self) -> np.ndarray:
        """(boxes,), how many of its step come before each."""
        return np.arange(len(self.at)) - np.searchsorted(self.at, self.at)

    def places(self, nth: int, steps: np.ndarray) -> np.ndarray:
        """Start (steps, dimensions) of the box of that number in each of these steps."""
        return self.start[:, np.searchsorted(self.at, steps) + nth].T

    def __getitem__(self, k: int) -> Box:
        start, sizes, steps = (tuple(one[:, k].tolist()) for one in (self.start, self.sizes, self.steps))
        return Box(start, sizes, steps)


@dataclass(eq=False)
class Schedule:
    """Attributes:
    draws: of an image; there is a step before the first, and one after each.
    boxes: of each value that steps compute, in the order of computation.
    times: when each element is computed, see `running_times`.
    """

    draws: int
    boxes: dict[Value, Boxes]
    times: ElementTimes

    def tasks(self, steps: Sequence[int]) -> dict[int, list[tuple[Value, Boxes, int]]]:
        """What each of these steps computes: the value, and which of its boxes."""
        found: dict[int, list[tuple[Value, Boxes, int]]] = {step: [] for step in steps}
        wanted = np.array(steps, dtype=np.int64)
        for value, boxes in self.boxes.items():
            first, last = np.searchsorted(boxes.at, wanted), np.searchsorted(boxes.at, wanted, side="right")
            for number in np.flatnonzero(last > first).tolist():
                found[steps[number]] += [(value, boxes, k) for k in range(first[number], last[number])]
        return found

    def alike(self, rules: Mapping[Value, Rule]) -> list[np.ndarray]:
        """Groups of steps that compute boxes of the same values and sizes."""
        group = np.zeros(self.draws + 1, dtype=np.int64)
        seen = set()
        for value, boxes in self.boxes.items():
            kinds = boxes.kinds
            for along in rules[value].fixed(boxes):
                kinds = pairs(kinds, along)
            key = id(boxes), kinds.tobytes()
            for nth in range(0 if key in seen else 1 + int(boxes.nth.max())):
                of_step, chosen = np.full(len(group), -1), boxes.nth == nth
                of_step[boxes.at[chosen]] = kinds[chosen]
                group = pairs(group, of_step)
            seen.add(key)
        by_group = group.argsort(kind="stable")
        found = np.split(by_group, np.flatnonzero(np.diff(group[by_group])) + 1)
        return sorted(found, key=lambda steps: int(steps[0]))


def pairs(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Equal where both are; numbers from 0 on."""
    low = second.min(initial=0)
    return np.unique(first * (second.max(initial=0) - low + 1) + second - low, return_inverse=True)[1]


def row_ends(order: Sequence[tuple[int, int, int]]) -> Tensor:
    """Places after which the drawing order goes on elsewhere than one pixel along the same line."""
    index = torch.tensor([(i, j) for _, i, j in order])
    moves = index[1:] - index[:-1]
    moved = moves.abs().sum(1) > 0
    line = moves[moved][0] if moved.any() else None
    ends = [] if line is None else torch.nonzero(moved & (moves != line).any(1)).flatten().tolist()
    return torch.tensor([-1, *ends, len(order) - 1], dtype=torch.int32)


def running_times(
    timed: Timed, ends: Tensor, deadline: Tensor, split: Callable[[Value, Tensor], Value | None]
) -> ElementTimes:
    """When each element is computed, for those of the output and all that they need, from the last value to the first.

    CONSTANT where it needs no computation, NEVER where nobody needs it.

    Args:
        ends: of rows, see `row_ends`.
        deadline: when the output is needed.
        split: given a value and its times, may write it as a sum with another value, new in the graph, which it gives.
    """
    wanted, times = ElementTimes(NEVER), ElementTimes(CONSTANT)
    wanted.scatter_min(timed.graph.output, deadline)
    same = Distinct()
    known: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    pending = timed.computed
    while pending:
        value = pending.pop()
        latest = same.shrunk(timed.rules[value].needed_within(wanted.of(value)))
        ready = same.shrunk(timed.analysis.ready_of(value))
        key = id(ready), id(latest)
        if key not in known:
            when = same.shrunk(at_row_end(ends, ready, latest))
            core = compact(when)
            known[key] = when, torch.where(core == CONSTANT, NEVER, core).expand(when.shape)
        when, running = known[key]
        times.set(value, when)
        part = split(value, when)
        pending += [] if part is None else [part]
        for operand, needed in timed.rules[value].needs(running):
            wanted.scatter_min(operand, needed)
    return times


def at_row_end(ends: Tensor, ready: Tensor, latest: Tensor) -> Tensor:
    """When elements are computed that are ready and needed at these times: at the last end of a row in between."""
    shape, ready, latest = ready.shape, compact(ready), compact(latest)
    places = torch.arange(-1, int(ends[-1]) + 1, dtype=torch.int32)
    last_ends = ends[torch.searchsorted(ends, places, right=True) - 1]  # up to each place
    number = latest.clamp(-1, int(ends[-1])) + 1
    when = torch.maximum(last_ends.index_select(0, number.reshape(-1)).view(latest.shape), ready)
    when = torch.where(ready == READY, READY, when)
    when = torch.where(latest == NEVER, NEVER, when)
    return torch.where(ready == CONSTANT, CONSTANT, when).expand(shape)


def schedule(timed: Timed, draws: int, times: ElementTimes) -> Schedule:
    """The steps of an image of so many draws, from its `running_times`."""
    known: dict[int, Boxes] = {}  # by times, of which values that are computed alike share a tensor
    for when in map(times.of, timed.computed):
        if id(when) not in known:
            known[id(when)] = _boxes(when)
    found = {value: known[id(times.of(value))] for value in timed.computed}
    return Schedule(draws, {value: boxes for value, boxes in found.items() if len(boxes.at)}, times)


def _boxes(times: Tensor) -> Boxes:
    """They hold the elements of their steps, and perhaps others that are constant or that nobody needs."""
    core = compact(times)
    busy = (core != CONSTANT) & (core != NEVER)
    at, found = _each_box(core)
    first = torch.where(busy, core + 1, -1).numpy()
    if not busy.all():
        found = _all_grown(found, busy.numpy())
        for step, box in zip(reversed(at), reversed(found), strict=True):
            first[box.slices] = step
    start, sizes, steps = (
        np.array([getattr(box, name) for box in found], dtype=np.int64).reshape(len(found), times.dim()).T
        for name in ("start", "sizes", "steps")
    )
    for d, size in enumerate(times.shape):
        if core.shape[d] < size:
            sizes[d] = size
    return Boxes(np.array(at, dtype=np.int64), start, sizes, steps, first)


def _each_box(core: Tensor) -> tuple[list[int], list[Box]]:
    """The numbers of steps, and their boxes, from times without the dimensions along which they are the same."""
    small, edges = _without_repeats(core)
    flat = small.reshape(-1)
    active = torch.nonzero((flat != CONSTANT) & (flat != NEVER)).flatten()
    order = active[flat[active].argsort(stable=True)]
    steps, counts = flat[order].unique_consecutive(return_counts=True)
    where = coordinates(order, small.shape)
    dense = _dense_boxes(where, counts, edges)
    single = torch.tensor([len(edge) == size + 1 for edge, size in zip(edges, core.shape, strict=True)])
    covers: dict[bytes, list[Box]] = {}
    at, found = [], []
    ends = counts.cumsum(0).tolist()
    for step, begin, end, box in zip(steps.tolist(), [0, *ends], ends, dense, strict=False):
        if box is None:  # the same pattern at another place has the same boxes there
            corner = where[begin:end].amin(0) * single
            pattern = (where[begin:end] - corner).contiguous().numpy().tobytes()
            if pattern not in covers:
                covers[pattern] = _cover(torch.nonzero(core == step) - corner)
            boxes = [one.moved(corner.tolist()) for one in covers[pattern]]
        else:
            boxes = [box]
        at += [step + 1] * len(boxes)
        found += boxes
    return at, found


def _without_repeats(times: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The times with each slice along a dimension once that is followed by equal ones, as those of features are; where
    these begin along each dimension, and where it ends."""
    edges = []
    for d, size in enumerate(times.shape):
        begins = torch.ones(size, dtype=torch.bool)
        begins[1:] = times.diff(dim=d).movedim(d, 0).unsqueeze(-1).flatten(1).any(1)
        first = torch.nonzero(begins).flatten()
        edges.append(torch.cat((first, torch.tensor([size]))))
        times = times.index_select(d, first)
    return times, edges


def _dense_boxes(places: Tensor, counts: Tensor, edges: list[Tensor]) -> list[Box | None]:
    """For every group of places the box that they fill without gaps, None where they fill none.

    Args:
        places: their coordinates, (places, dimensions), the groups one after the other.
        counts: (groups,), places of each.
        edges: where a place begins along each dimension, and where the last one ends.
    """
    dimensions = places.shape[1]
    group = torch.arange(len(counts)).repeat_interleave(counts)[:, None].expand(-1, dimensions)
    blank = places.new_zeros(len(counts), dimensions)
    first = blank.scatter_reduce(0, group, places, "amin", include_self=False)
    after = blank.scatter_reduce(0, group, places, "amax", include_self=False) + 1
    filled = ((after - first).prod(1) == counts).tolist()
    for d, edge in enumerate(edges):
        first[:, d], after[:, d] = edge[first[:, d]], edge[after[:, d]]
    ones = (1,) * dimensions
    return [
        Box(tuple(start), tuple(size), ones) if full else None
        for start, size, full in zip(first.tolist(), (after - first).tolist(), filled, strict=True)
    ]


def _cover(places: Tensor) -> list[Box]:
    """Boxes that hold all the places, given as rows of coordinates in order."""
    start, sizes, steps = [], [], []
    regular = True
    for d in range(places.shape[1]):
        along = places[:, d].unique()
        gaps = along.diff().unique()
        regular &= len(gaps) <= 1
        start.append(int(along[0]))
        sizes.append(len(along))
        steps.append(int(gaps[0]) if len(gaps) else 1)
    if regular and math.prod(sizes) == len(places):
        return [Box(tuple(start), tuple(sizes), tuple(steps))]
    # Not a box: cut along the first dimension at which the pattern changes.
    d = next(k for k in range(places.shape[1]) if sizes[k] > 1)
    parts: dict[bytes, list[Tensor]] = {}
    for rows in places.split(places[:, d].unique_consecutive(return_counts=True)[1].tolist()):
        parts.setdefault(rows[:, d + 1 :].numpy().tobytes(), []).append(rows)
    boxes = []
    for group in parts.values():
        runs: list[list[Tensor]] = []
        for rows in group:
            here = int(rows[0, d])
            before = [int(one[0, d]) for one in runs[-1][-2:]] if runs else []
            if len(before) == 1 or (before and here - before[1] == before[1] - before[0]):  # at the same distance
                runs[-1].append(rows)
            else:
                runs.append([rows])
        for run in runs:
            if len(parts) == 1 and len(runs) == 1:  # equal in this dimension: the irregularity is further in
                boxes += [box for rows in run for box in _cover(rows)]
            else:
                boxes += _cover(torch.cat(run))
    return boxes


def _all_grown(boxes: list[Box], busy: np.ndarray) -> list[Box]:
    """The boxes, grown where all of the same sizes can grow alike, so that one program serves them all the same.

    Example: row t of a triangle holds t elements, a program each; whole rows are one program, if nobody minds the rest.
    """
    found, kinds = list(boxes), dict[Any, list[int]]()
    for number, box in enumerate(boxes):
        kinds.setdefault((box.sizes, box.steps), []).append(number)
    for (sizes, _), numbers in kinds.items():
        wide = _grown(boxes[numbers[0]], busy).sizes
        if wide != sizes:
            grown = [_grown(boxes[number], busy) for number in numbers]
            for number, box in zip(numbers, grown, strict=True) if all(box.sizes == wide for box in grown) else ():
                found[number] = box
    return found


def _grown(box: Box, busy: np.ndarray) -> Box:
    """The box over a whole dimension where no element that is added is busy: all constant, or nobody needs them."""
    for d, size in enumerate(busy.shape):
        if box.steps[d] == 1 and box.sizes[d] not in (1, size):
            start, sizes = list(box.start), list(box.sizes)
            start[d], sizes[d] = 0, size
            wide = Box(tuple(start), tuple(sizes), box.steps)
            if np.count_nonzero(busy[wide.slices]) == np.count_nonzero(busy[box.slices]):
                box = wide
    return box
