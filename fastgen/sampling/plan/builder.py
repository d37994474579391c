"""Takes the boxes of one step; gives its program. Rules ask for views of their operands, for a place for the result."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgen.sampling.machine.language import (
    AffineOffset,
    Call,
    Fixed,
    Lookup,
    Memory,
    Pointwise,
    Product,
    Program,
    Rowwise,
    Temporary,
    View,
    constant,
    dense_strides,
)
from fastgen.sampling.plan.indexed import Indexed, IndexedRead, Region
from fastgen.sampling.plan.layout import Box, Layout
from fastgen.sampling.trace.graph import Map, Operand, Value

MOST_RUNS = 16  # copies that gather scattered elements


class NeedsStorage(Exception):
    """A value was taken for local to its step, but is read elsewhere too."""

    def __init__(self, value: Value) -> None:
        super().__init__(value.name)
        self.value = value


class Storage:
    """Where every value lies: in memory for the whole image, as a constant, or in scratch for the length of a step."""

    def __init__(self, layouts: dict[Value, Layout], stored: set[Value]) -> None:
        self.layouts = layouts
        self.stored = stored
        self.memories: dict[Value, Memory] = {}
        self._indexed: dict[Operand, Indexed] = {}

    def memory(self, value: Value) -> Memory:
        """The block of a value that is stored, or of a constant."""
        if value not in self.memories:
            if value.kind == "constant":
                self.memories[value] = constant(value.data).memory
            else:
                size = self.layouts[value].numel
                self.memories[value] = Memory("stored", value.index, size, value.data.dtype)
        return self.memories[value]

    def indexed(self, operand: Operand) -> Indexed:
        if operand not in self._indexed:
            self._indexed[operand] = Indexed.of(operand, self.strides)
        return self._indexed[operand]

    def strides(self, value: Value) -> tuple[tuple[int, ...], int]:
        """Strides of a value in its block, and the place of its first element."""
        if value.kind == "constant":
            return dense_strides(value.shape), 0
        found = self.layouts[value]
        return found.strides, found.origin


@dataclass(frozen=True)
class Check:
    """Where a box must lie relative to another of the same step: offset(of task) == start[dim] of other + distance."""

    offset: AffineOffset
    task: int
    other: int
    dim: int
    distance: int


class Builder:
    """Args:
    storage: of the plan.
    starts: of the step's boxes, by task.

    Attributes:
        task: that of the value which is being written.
        checks: each once.
        local: value -> the boxes of it that this step has computed into scratch: task, box, scratch.
    """

    def __init__(self, storage: Storage, starts: Sequence[tuple[int, ...]]) -> None:
        self.storage = storage
        self.starts_of = starts
        self.program = Program()
        self.listed = 0
        self.indexed_reads: list[IndexedRead] = []
        self.task = 0
        self.checks: dict[Check, None] = {}
        self.temporaries = 0
        self.scratches = 0
        self.local: dict[Value, list[tuple[int, Box, View]]] = {}

    # --- what rules use

    def starts(self, box: Box) -> tuple[AffineOffset, ...]:
        """The start of the task's box along each dimension, as it changes from step to step."""
        return _starts(len(box.start))

    def region(self, box: Box) -> list[tuple[AffineOffset, int, int]]:
        return list(zip(self.starts(box), box.sizes, box.steps, strict=True))

    def out(self, value: Value, box: Box) -> View:
        """Where the result of this task goes, dimensions in the value's order."""
        if value in self.storage.stored:
            return self._view(Map.identity(value), self.region(box))
        view = self.scratch(box.sizes, value.data.dtype, self.storage.layouts[value].order)
        self.local.setdefault(value, []).append((self.task, box, view))
        return view

    def read(self, operand: Operand, region: Region) -> View:
        """A region of an operand, dimensions in the operand's order."""
        if operand.map is None:
            return self._read_indexed(operand, region)
        return self._view(operand.map, region)

    def broadcast(self, operand: Operand, region: Region) -> View:
        """What a region of the result reads of an operand that is broadcast to it, with the sizes of the region."""
        aligned = region[len(region) - len(operand.shape) :]
        one = (AffineOffset(0), 1, 1)
        cut = [along if size > 1 else one for along, size in zip(aligned, operand.shape, strict=True)]
        return self.read(operand, cut).expand([size for _, size, _ in region])

    def scratch(self, sizes: Sequence[int], dtype: torch.dtype, order: Sequence[int] | None = None) -> View:
        """A new block of these sizes, contiguous with its dimensions in the given order."""
        self.scratches += 1
        memory = Memory("scratch", self.scratches, torch.Size(sizes).numel(), dtype)
        return View(memory, tuple(sizes), dense_strides(sizes, order), AffineOffset(0), self.task)

    def product(self, out: View, rows: View, weight: View, added: View | None = None) -> None:
        if len(weight.sizes) == 2 and weight.memory.kind == "constant":  # without the dimensions of size 1
            kept = [*(d for d, size in enumerate(out.sizes[:-1]) if size > 1), len(out.sizes) - 1]
            if added is not None and len(added.sizes) == len(out.sizes):
                added = added.order(kept)
            out, rows = out.order(kept), rows.order(kept)
        self.program.instructions.append(Product(out, rows, weight, added))

    def pointwise(self, op: str, out: View, *operands: View | float) -> None:
        self.program.instructions.append(Pointwise(op, out, operands))

    def rowwise(self, op: str, out: View, source: View, *numbers: float) -> None:
        self.program.instructions.append(Rowwise(op, out, source, numbers))

    def lookup(self, out: View, table: View, index: View) -> None:
        self.program.instructions.append(Lookup(out, table, index))

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        self.program.instructions.append(Call(function, *_frozen(args, kwargs)))

    def make(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Temporary:
        """A call whose result is a new tensor."""
        self.temporaries += 1
        result = Temporary(self.temporaries)
        self.program.instructions.append(Call(function, *_frozen(args, kwargs), result))
        return result

    def fill(self, out: View, source: Temporary | Tensor | float) -> None:
        """Puts the result of a call, or a number, where `out` is."""
        self.call(_fill, out, source)

    # --- where things are

    def _view(self, where: Map, region: Region) -> View:
        value = where.value
        sizes = tuple(size for _, size, _ in region)
        if value.kind != "computed" or value in self.storage.stored:
            strides, origin = self.storage.strides(value)
            units = [sum(s * t for s, t in zip(step, strides, strict=True)) for step in where.steps]
            origin += sum(s * t for s, t in zip(where.start, strides, strict=True))
            offset = AffineOffset.weighted(origin, [(one[0], unit) for one, unit in zip(region, units, strict=True)])
            along = tuple(unit * step for unit, (_, _, step) in zip(units, region, strict=True))
            return View(self.storage.memory(value), sizes, along, offset, self.task)
        for task, box, view in self.local.get(value, ()):
            if task == self.task and where.is_identity and self._is_box(region, box, value):
                return view
            found = self._local_view(where, region, task, box, view)
            if found is not None:
                return found
        raise NeedsStorage(value)

    def _is_box(self, region: Region, box: Box, value: Value) -> bool:
        """Whether a region is that of a box; where there is but one element it may have any name."""
        return all(
            size == sizes and step == steps and (along == 1 or first == start)
            for (first, size, step), (start, sizes, steps), along in zip(
                region, self.region(box), value.shape, strict=True
            )
        )

    def _local_view(self, where: Map, region: Region, task: int, box: Box, view: View) -> View | None:
        """A region of an operand in a box of its value; None where that does not hold all of it."""
        offset, strides, checks = 0, [0] * len(region), []
        for k, (along, unit) in enumerate(zip(where.along, box.steps, strict=True)):
            first = AffineOffset.weighted(where.start[k], [(region[d][0], step) for d, step in along])
            distance = first.at(self.starts_of[self.task]) - box.start[k]
            reach = 0
            for d, step in along:
                step *= region[d][2]
                if step % unit and region[d][1] > 1:
                    return None
                reach += max(step * (region[d][1] - 1), 0)
                strides[d] += step // unit * view.strides[k]
            if distance < 0 or distance % unit or (distance + reach) // unit >= box.sizes[k]:
                return None
            if task != self.task or first != self.starts(box)[k] + distance:
                checks.append(Check(first, self.task, task, k, distance))
            offset += distance // unit * view.strides[k]
        self.checks.update(dict.fromkeys(checks))
        return View(view.memory, tuple(size for _, size, _ in region), tuple(strides), AffineOffset(offset), task)

    def _read_indexed(self, operand: Operand, region: Region) -> View:
        indexed = self.storage.indexed(operand)
        read = IndexedRead(indexed, self.task, region, [], [])
        here = np.array([self.starts_of[self.task]], dtype=np.int64).reshape(1, -1)
        which, places = (one[0] for one in read.at(here))
        sizes = which.shape
        read.numbers = np.unique(which).tolist()
        read.listed = [self.listed + k for k in range(len(read.numbers))]
        self.listed += len(read.numbers)
        self.indexed_reads.append(read)
        values = [indexed.values[number] for number in read.numbers]
        for value in values:
            if value.kind == "computed" and value not in self.storage.stored:
                raise NeedsStorage(value)
        strides = _strides_of(places) if len(values) == 1 else None
        if strides is not None:
            memory = self.storage.memory(values[0])
            return View(memory, sizes, strides, AffineOffset(0), self.task, listed=read.listed[0])
        # Elements of several values, or in no regular order.
        dtype = values[-1].data.dtype
        target = self.scratch((math.prod(sizes),), dtype)
        found = [np.flatnonzero(which == number) for number in read.numbers]  # places in the region
        distances = [places.reshape(-1)[inside] - places.reshape(-1)[inside].min() for inside in found]
        runs = [_runs(inside, distance) for inside, distance in zip(found, distances, strict=True)]
        if sum(map(len, runs)) > MOST_RUNS and dtype.is_floating_point:
            self._gather(target, values, found, distances, read.listed)
        else:
            for value, of_value, listed in zip(values, runs, read.listed, strict=True):
                for size, (to, to_step), (of, of_step) in of_value:
                    place = View(target.memory, (size,), (to_step,), AffineOffset(to), self.task)
                    memory = self.storage.memory(value)
                    source = View(memory, (size,), (of_step,), AffineOffset(of), self.task, listed)
                    self.pointwise("copy", place, source)
        return target.as_strided(sizes, dense_strides(sizes))

    def _gather(
        self,
        target: View,
        values: Sequence[Value],
        found: Sequence[np.ndarray],
        distances: Sequence[np.ndarray],
        listed: Sequence[int],
    ) -> None:
        """The elements of all values side by side, then in their places."""
        several = len(values) > 1
        together = self.scratch(target.sizes, target.memory.dtype) if several else target
        start = 0
        for value, distance, number in zip(values, distances, listed, strict=True):
            reach = (int(distance.max()) + 1, 1)
            source = View(self.storage.memory(value), reach, (1, 1), AffineOffset(0), self.task, number)
            part = together.narrow(0, start, len(distance)).unsqueeze(1)
            self.lookup(part, source, constant(torch.from_numpy(distance)))
            start += len(distance)
        if several:
            order = torch.from_numpy(np.argsort(np.concatenate(found)))
            self.lookup(target.unsqueeze(1), together.unsqueeze(1), constant(order))


@cache
def _starts(rank: int) -> tuple[AffineOffset, ...]:
    return tuple(AffineOffset(0, tuple(int(k == d) for k in range(d + 1))) for d in range(rank))


def _frozen(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], tuple[tuple[str, Any], ...]]:
    """Arguments that can be compared: tuples for lists, tensors by their identity."""

    def freeze(one: Any) -> Any:
        if isinstance(one, (list, tuple)):
            return tuple(freeze(inner) for inner in one)
        return Fixed(one) if isinstance(one, Tensor) else one

    return freeze(args), tuple((name, freeze(one)) for name, one in kwargs.items())


def _fill(out: Tensor, source: Tensor | float) -> Tensor:
    return out.copy_(source) if isinstance(source, Tensor) else out.fill_(source)


def _runs(to: np.ndarray, of: np.ndarray) -> list[tuple[int, tuple[int, int], tuple[int, int]]]:
    """Pairs of places as runs with equal steps: the number of pairs in it, and the first place and the step of each."""
    found, first = [], 0
    steps = np.stack((np.diff(to), np.diff(of)), 1)
    while first < len(to):
        size = 1
        if first < len(steps) and steps[first, 1] >= 0:
            others = np.flatnonzero((steps[first:] != steps[first]).any(1))
            size += int(others[0]) if len(others) else len(steps) - first
        step = steps[first] if size > 1 else (0, 0)
        found.append((size, (int(to[first]), int(step[0])), (int(of[first]), int(step[1]))))
        first += size
    return found


def _strides_of(offsets: np.ndarray) -> tuple[int, ...] | None:
    """Strides of a view with these offsets, or None where there is none."""
    first = int(offsets.flat[0])
    strides = []
    expected = np.full((1,) * offsets.ndim, first)
    for d, size in enumerate(offsets.shape):
        second = tuple(1 if k == d else 0 for k in range(offsets.ndim))
        stride = int(offsets[second]) - first if size > 1 else 0
        if stride < 0:
            return None
        strides.append(stride)
        expected = expected + (np.arange(size) * stride).reshape([-1 if k == d else 1 for k in range(offsets.ndim)])
    return tuple(strides) if np.array_equal(expected, offsets) else None
