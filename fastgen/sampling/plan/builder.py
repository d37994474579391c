"""Writes the program of one step: rules ask it for views of their operands and for a place for their result."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgen.sampling.plan.layout import Box, Layout, dense_strides
from fastgen.sampling.plan.program import Check, Instruction, Linear, Listed, Memory, Program, Temporary, View, scratch
from fastgen.sampling.trace.graph import Map, Operand, Value

Region = Sequence[tuple[Linear, int, int]]  # first element, number of elements and step along each dimension


class NeedsStorage(Exception):
    """A value was taken for local to its step, but is read elsewhere too."""

    def __init__(self, value: Value) -> None:
        super().__init__(value.name)
        self.value = value


class Storage:
    """Where every value lies: in memory for the whole image, as a constant, or in scratch for the length of a step."""

    def __init__(self, layouts: dict[int, Layout], stored: set[int]) -> None:
        self.layouts = layouts
        self.stored = stored
        self.memories: dict[int, Memory] = {}

    def memory(self, value: Value) -> Memory:
        """The block of a value that is stored, or of a constant."""
        if value.index not in self.memories:
            if value.kind == "constant":
                self.memories[value.index] = Memory("constant", value.numel, value.data.dtype, value.data.reshape(-1))
            else:
                size = self.layouts[value.index].numel
                self.memories[value.index] = Memory("stored", size, value.data.dtype)
        return self.memories[value.index]

    def strides(self, value: Value) -> tuple[tuple[int, ...], int]:
        """Strides of a value in its block, and the place of its first element."""
        if value.kind == "constant":
            return dense_strides(value.shape, range(len(value.shape))), 0
        found = self.layouts[value.index]
        return found.strides, found.origin


class Builder:
    def __init__(self, storage: Storage, tasks: Sequence[tuple[Value, Box]]) -> None:
        self.storage = storage
        self.tasks = tasks
        self.program = Program()
        self.payload: list[Any] = []
        self.task = 0
        self.local: dict[int, tuple[int, Box, View]] = {}  # value -> its task, box and scratch in this step

    # --- what rules use

    def starts(self, box: Box) -> list[Linear]:
        """The start of the task's box along each dimension, as it changes from step to step."""
        return [Linear(0, tuple(int(k == d) for k in range(d + 1))) for d in range(len(box.start))]

    def region(self, box: Box) -> list[tuple[Linear, int, int]]:
        return list(zip(self.starts(box), box.sizes, box.steps, strict=True))

    def out(self, value: Value, box: Box) -> View:
        """Where the result of this task goes, dimensions in the value's order."""
        if value.index in self.storage.stored:
            return self._view(Map.identity(value), self.region(box))
        if value.index in self.local:
            raise NeedsStorage(value)
        view = scratch(box.sizes, value.data.dtype, self.storage.layouts[value.index].order)
        view = replace(view, task=self.task)
        self.local[value.index] = (self.task, box, view)
        return view

    def read(self, operand: Operand, region: Region) -> View:
        """A region of an operand, dimensions in the operand's order."""
        if operand.map is None:
            return self._read_ids(operand, region)
        return self._view(operand.map, region)

    def emit(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        self.program.instructions.append(Instruction(function, args, kwargs, None))

    def make(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Temporary:
        """An instruction whose result is a new tensor."""
        self.program.temporaries += 1
        result = Temporary(self.program.temporaries)
        self.program.instructions.append(Instruction(function, args, kwargs, result))
        return result

    def scratch(self, sizes: Sequence[int], dtype: torch.dtype) -> View:
        return scratch(sizes, dtype)

    # --- where things are

    def _view(self, where: Map, region: Region) -> View:
        value = where.value
        sizes = tuple(size for _, size, _ in region)
        if value.kind != "computed" or value.index in self.storage.stored:
            strides, origin = self.storage.strides(value)
            units = [sum(s * t for s, t in zip(step, strides, strict=True)) for step in where.steps]
            offset = Linear(origin + sum(s * t for s, t in zip(where.start, strides, strict=True)))
            for (start, _, _), unit in zip(region, units, strict=True):
                if unit and (start.const or start.coefficients):
                    offset = offset + start * unit
            along = tuple(unit * step for unit, (_, _, step) in zip(units, region, strict=True))
            return View(self.storage.memory(value), sizes, along, offset, self.task)
        if value.index not in self.local:
            raise NeedsStorage(value)
        first = [Linear(k) for k in where.start]
        steps = []
        for (start, _, step), along_value in zip(region, where.steps, strict=True):
            for k, s in enumerate(along_value):
                if s:
                    first[k] = first[k] + start * s
            steps.append([s * step for s in along_value])
        return self._local_view(value, first, steps, sizes)

    def _local_view(self, value: Value, first: list[Linear], steps: list[list[int]], sizes: tuple[int, ...]) -> View:
        task, box, view = self.local[value.index]
        here = self.tasks[self.task][1].start
        offset = 0
        along = [0] * len(sizes)
        for k in range(len(box.sizes)):
            distance = first[k].at(here) - box.start[k]
            reach = sum(max(step[k] * (size - 1), 0) for step, size in zip(steps, sizes, strict=True))
            unit = box.steps[k]
            if distance < 0 or distance % unit or (distance + reach) // unit >= box.sizes[k]:
                raise NeedsStorage(value)
            if any(step[k] % unit for step, size in zip(steps, sizes, strict=True) if size > 1):
                raise NeedsStorage(value)
            self.program.checks.append(Check(first[k], self.task, task, k, distance))
            offset += distance // unit * view.strides[k]
            for d, step in enumerate(steps):
                along[d] += step[k] // unit * view.strides[k] if sizes[d] > 1 else 0
        return View(view.memory, sizes, tuple(along), Linear(offset), task)

    def _read_ids(self, operand: Operand, region: Region) -> View:
        assert operand.ids is not None
        here = self.tasks[self.task][1].start
        ids = operand.ids[
            tuple(slice(first.at(here), first.at(here) + (size - 1) * step + 1, step) for first, size, step in region)
        ]
        found = self.resolve(operand, ids)
        self.payload.append(found[2])
        number = len(self.payload) - 1
        if found[0] == "view":
            value, strides = found[1]
            return View(self.storage.memory(value), tuple(ids.shape), strides, Linear(0), self.task, listed=number)
        # Elements of several values, or in no regular order: gathered one by one.
        values, counts, dtype = found[1]
        target = scratch((ids.numel(),), dtype)
        done = 0
        for k, (value, count) in enumerate(zip(values, counts, strict=True)):
            memory = self.storage.memory(value)
            whole = View(memory, (memory.numel,), (1,), Linear(0), self.task)
            rows = self.make(torch.index_select, whole, 1, Listed(number + 1 + 2 * k))
            self.payload += list(found[3][k])
            self.emit(torch.Tensor.index_copy_, target, 1, Listed(number + 2 + 2 * k), rows)
            done += count
        if done < ids.numel():
            raise ValueError("an element of an operand belongs to no value")
        strides = dense_strides(tuple(ids.shape), range(ids.dim()))
        return View(target.memory, tuple(ids.shape), strides, Linear(0), self.task)

    def resolve(self, operand: Operand, ids: Tensor) -> tuple[Any, ...]:
        """Where elements given by number lie.

        Returns:
            ("view", (value, strides), offset), where one strided view holds them; else ("gather", (values, counts,
            dtype), 0, [(places in the block, places in the region) for each value]).
        """
        graph = operand.graph
        values = graph.values_of(ids)
        flat = ids.reshape(-1)
        if bool((flat == 0).any()):
            values = [graph.zero(values[0].data.dtype if values else torch.float32), *values]
        parts = []
        for value in values:
            low = 0 if value.kind == "constant" and value.base == 0 else value.base
            inside = flat == 0 if low == 0 else (flat >= low) & (flat < low + value.numel)
            places = torch.nonzero(inside).flatten()
            if value.kind == "computed" and value.index not in self.storage.stored:
                raise NeedsStorage(value)
            strides, origin = self.storage.strides(value)
            numbers = torch.zeros_like(flat[places]) if low == 0 else flat[places] - low
            coordinates = torch.unravel_index(numbers, value.shape) if value.shape else ()
            offsets = torch.full_like(numbers, origin)
            for coordinate, stride in zip(coordinates, strides, strict=True):
                offsets += coordinate * stride
            parts.append((offsets, places))
        if len(values) == 1:
            places_in_block = parts[0][0].view(ids.shape).numpy()
            along = _strides_of(places_in_block)
            if along is not None:
                return "view", (values[0], along), int(places_in_block.flat[0])
        dtype = values[-1].data.dtype
        return "gather", (values, [len(p) for _, p in parts], dtype), 0, parts


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
