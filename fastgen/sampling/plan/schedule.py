"""Takes ready times and deadlines; gives the step at which each element is computed, and in which boxes: `Schedule`.

Step s follows the draw of place s of the drawing order; step -1 comes before the first. An element is computed at the
step of its ready time, or, where that is not too late for any element that needs it, at the end of a later row: so the
vertical stack of a gated PixelCNN and the coarse levels of a strided model run a row at a time.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastgen.sampling.causality.ready_times import Timed
from fastgen.sampling.plan.layout import Box
from fastgen.sampling.trace.element_times import ElementTimes, compact, shrunk
from fastgen.sampling.trace.graph import CONSTANT, NEVER, READY, Value, coordinates


@dataclass(eq=False)
class Schedule:
    """Attributes:
    steps: step -> (value, box) in the order of computation; the first is step -1.
    times: when each element is computed, see `running_times`.
    """

    steps: list[list[tuple[Value, Box]]]
    times: ElementTimes


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
    pending = timed.computed
    while pending:
        value = pending.pop()
        latest = timed.rules[value].needed_within(shrunk(wanted.of(value)))
        when = at_row_end(ends, timed.analysis.ready_of(value), latest)
        times.set(value, when)
        part = split(value, when)
        pending += [] if part is None else [part]
        running = compact(when)
        running = torch.where(running == CONSTANT, NEVER, running).expand(value.shape)
        for operand, needed in timed.rules[value].needs(running):
            wanted.scatter_min(operand, needed)
    return times


def at_row_end(ends: Tensor, ready: Tensor, latest: Tensor) -> Tensor:
    """When elements are computed that are ready and needed at these times: at the last end of a row in between."""
    shape, ready, latest = ready.shape, compact(ready), compact(latest)
    last_end = ends[(torch.searchsorted(ends, latest.contiguous(), right=True) - 1).clamp(min=0)]
    when = torch.where(last_end >= ready, last_end, ready)
    when = torch.where(ready == READY, READY, when)
    when = torch.where(latest == NEVER, NEVER, when)
    return torch.where(ready == CONSTANT, CONSTANT, when).expand(shape)


def schedule(timed: Timed, draws: int, times: ElementTimes) -> Schedule:
    """The steps of an image of so many draws, from its `running_times`."""
    steps: list[list[tuple[Value, Box]]] = [[] for _ in range(draws + 1)]
    known: dict[bytes, dict[int, list[Box]]] = {}
    for value in timed.computed:
        for step, boxes in _boxes(times.of(value), known).items():
            steps[step + 1] += [(value, box) for box in boxes]
    return Schedule(steps, times)


def _boxes(times: Tensor, known: dict[bytes, dict[int, list[Box]]]) -> dict[int, list[Box]]:
    """Step -> boxes that hold the elements of that step, and perhaps others that are constant or that nobody needs."""
    core = compact(shrunk(times)).contiguous()
    full = [d for d, size in enumerate(core.shape) if size < times.shape[d]]
    key = bytes(str((tuple(times.shape), tuple(full))), "ascii") + core.numpy().tobytes()
    if key not in known:
        found = {}
        flat = core.reshape(-1)
        active = torch.nonzero((flat != CONSTANT) & (flat != NEVER)).flatten()
        if len(active):
            order = active[flat[active].argsort(stable=True)]
            steps, counts = flat[order].unique_consecutive(return_counts=True)
            covers: dict[bytes, list[Box]] = {}
            free = (core == CONSTANT) | (core == NEVER)
            growing = bool(free.any())
            where = coordinates(order, core.shape)
            for step, places, dense in zip(
                steps.tolist(), where.split(counts.tolist()), _dense_boxes(where, counts), strict=True
            ):
                boxes = _cover_anywhere(places, covers) if dense is None else [dense]
                grown = [_grown(box, free) for box in boxes] if growing else boxes
                found[step] = [
                    replace(box, sizes=tuple(times.shape[d] if d in full else size for d, size in enumerate(box.sizes)))
                    for box in grown
                ]
        known[key] = found
    return known[key]


def _dense_boxes(places: Tensor, counts: Tensor) -> list[Box | None]:
    """For every group of places the box that they fill without gaps, None where they fill none.

    Args:
        places: their coordinates, (places, dimensions), the groups one after the other.
        counts: (groups,), places of each.
    """
    dimensions = places.shape[1]
    group = torch.arange(len(counts)).repeat_interleave(counts)[:, None].expand(-1, dimensions)
    blank = places.new_zeros(len(counts), dimensions)
    first = blank.scatter_reduce(0, group, places, "amin", include_self=False)
    sizes = blank.scatter_reduce(0, group, places, "amax", include_self=False) - first + 1
    filled = (sizes.prod(1) == counts).tolist()
    ones = (1,) * dimensions
    return [
        Box(tuple(start), tuple(size), ones) if full else None
        for start, size, full in zip(first.tolist(), sizes.tolist(), filled, strict=True)
    ]


def _cover_anywhere(places: Tensor, known: dict[bytes, list[Box]]) -> list[Box]:
    """As `_cover`; the same pattern at another place has the same boxes there."""
    corner = places.amin(0)
    pattern = (places - corner).contiguous().numpy().tobytes()
    if pattern not in known:
        known[pattern] = _cover(places - corner)
    moved = corner.tolist()
    return [
        Box(tuple(a + b for a, b in zip(box.start, moved, strict=True)), box.sizes, box.steps) for box in known[pattern]
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
    for coordinate in places[:, d].unique():
        rows = places[places[:, d] == coordinate]
        rest = torch.cat((rows[:, :d], rows[:, d + 1 :]), 1).contiguous()
        parts.setdefault(rest.numpy().tobytes(), []).append(rows)
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


def _grown(box: Box, free: Tensor) -> Box:
    """The box over a whole dimension where all elements that are added are free: constant, or nobody needs them."""
    for d, size in enumerate(free.shape):
        if box.steps[d] != 1 or box.sizes[d] in (1, size):
            continue
        outside = free
        for e in range(free.dim()):
            if e != d:
                outside = outside.narrow(e, box.start[e], (box.sizes[e] - 1) * box.steps[e] + 1)[
                    (slice(None),) * e + (slice(None, None, box.steps[e]),)
                ]
        before, after = (
            outside.narrow(d, 0, box.start[d]),
            outside.narrow(d, box.start[d] + box.sizes[d], size - box.start[d] - box.sizes[d]),
        )
        if before.all() and after.all():
            start = (*box.start[:d], 0, *box.start[d + 1 :])
            box = replace(box, start=start, sizes=(*box.sizes[:d], size, *box.sizes[d + 1 :]))
    return box
