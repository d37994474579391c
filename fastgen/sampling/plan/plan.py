"""Takes a `Network`; gives its `Plan`: the drawing order, the schedule, where values lie, the programs of all steps."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgen.distributions import Distribution
from fastgen.sampling.causality.drawing_order import ordered
from fastgen.sampling.causality.draws import Order, draw_index_of
from fastgen.sampling.causality.ready_times import Timed
from fastgen.sampling.machine.language import Memory, Product, Program
from fastgen.sampling.plan.builder import Builder, NeedsStorage, Storage
from fastgen.sampling.plan.layout import Box, layout
from fastgen.sampling.plan.renewal import Traced, renew
from fastgen.sampling.plan.schedule import Schedule, row_ends, running_times, schedule
from fastgen.sampling.plan.sliding_rows import Candidate, Ring, make_rings
from fastgen.sampling.plan.split_convolution import split_rows
from fastgen.sampling.plan.temporaries import Scratch, share_scratch
from fastgen.sampling.rules.convolution import Convolution
from fastgen.sampling.trace.element_times import compact
from fastgen.sampling.trace.graph import CONSTANT, Map, Operand, Value
from fastgen.sampling.trace.network import Network


@dataclass
class Step:
    """Attributes:
    program: its number.
    offsets: (moving views,) int64, where the program's views begin.
    """

    program: int
    offsets: np.ndarray


@dataclass(repr=False)
class Plan:
    """All that sampling needs besides memory: which program runs at which step, with which offsets.

    Attributes:
        order: (channel, row, column) of the draws; all channels of a pixel at once where `whole_pixels`.
        programs: the distinct ones; those of a step are in `steps`.
        rings: a memory -> what of its value it holds, where that is not all.
        scratch: the blocks that programs compute in.
        steps: number -1, 0, ..., each after the draw of its number.
        rows: the output's map of a pixel, see `Engine`.
    """

    timed: Timed
    schedule: Schedule
    storage: Storage
    order: Order
    whole_pixels: bool
    output: Operand
    leaves: list[Value]
    network: Network
    traced: list[Traced]
    remarks: list[str]
    programs: list[Program] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    scratch: Scratch = field(default_factory=Scratch)
    rings: dict[Memory, Ring] = field(default_factory=dict)

    def renew(self) -> bool:
        """Takes over the model's weights as they are now; False, and nothing changed, where that needs another plan."""
        return renew(self.network, self.traced, self.timed, self.programs)

    @property
    def levels(self) -> Value:
        return self.timed.graph.values[0]

    @property
    def bytes_of_image(self) -> int:
        """Of stored values and scratch memory, for one image."""
        scratch = zip(self.scratch.sizes, self.scratch.dtypes, strict=True)
        total = sum(size * dtype.itemsize for size, dtype in scratch)
        for memory in self.storage.memories.values():
            if memory.kind == "stored":
                kept = self.rings.get(memory, memory)
                total += kept.numel * memory.dtype.itemsize
        return total

    @property
    def computes_in_half(self) -> bool:
        """Whether some of it is in half precision, which rounds coarsely."""
        return any(value.data.dtype in (torch.bfloat16, torch.float16) for value in self.timed.computed)

    @cached_property
    def output_dtype(self) -> torch.dtype:
        return self.timed.graph.data_of(self.output).dtype

    @cached_property
    def multiply_adds(self) -> int:
        """Of the products of all steps, for one image."""
        of_program = [
            sum(one.multiply_adds for one in program.instructions if isinstance(one, Product))
            for program in self.programs
        ]
        return sum(of_program[step.program] for step in self.steps)

    @cached_property
    def work_ratio(self) -> float:
        """Multiply-adds of all steps over those of the same activations computed once each.

        Both are counted with dense kernels. Activations that no draw reads (features of the last pixel) are left out
        of both, so that the least is 1.
        """
        done, once = 0.0, 0.0
        by_value: dict[Value, list[Box]] = {}
        for tasks in self.schedule.steps:
            for value, box in tasks:
                by_value.setdefault(value, []).append(box)
        for value, boxes in by_value.items():
            cost = self.timed.rules[value].multiply_adds
            if cost:
                computed = torch.zeros(value.shape, dtype=torch.bool)
                for box in boxes:
                    computed[box.slices] = True
                done += sum(math.prod(box.sizes) for box in boxes) * cost
                once += int(computed.sum()) * cost
        return done / once if once else 1.0


def make_plan(network: Network, distribution: Distribution) -> Plan:
    """Raises NotCausalError, or Unsupported where the engine cannot take the model."""
    shape = network.shape
    draws, timed, conditions = ordered(network, distribution)
    traced = Traced.all_of(timed.graph)
    output, order, ends = timed.graph.output, draws.order, row_ends(draws.order)
    times = running_times(timed, ends, draws.of_outputs() - 1, partial(split_rows, timed, ends))
    when = schedule(timed, len(order), times)
    storage = _storage(timed, when, order, shape)
    whole_pixels = len(order) == shape[1] * shape[2]
    plan = Plan(timed, when, storage, order, whole_pixels, output, conditions, network, traced, timed.graph.remarks)
    groups = _alike(plan)
    built: Built = {}
    while not _write_programs(plan, groups, built):
        pass  # again, with what was found to need storage
    plan.scratch = share_scratch(program.views for program in plan.programs)
    plan.rings = make_rings(_windows(plan), plan.programs, plan.steps)
    return plan


def _windows(plan: Plan) -> Iterator[Candidate]:
    """Values of which a ring may hold some rows: steps compute them, and only steps read them."""
    boxes: dict[Value, list[tuple[int, Box]]] = {}
    for step, tasks in enumerate(plan.schedule.steps):
        for value, box in tasks:
            boxes.setdefault(value, []).append((step, box))
    for value, memory in plan.storage.memories.items():
        if value.kind != "computed" or value in plan.output.values or plan.timed.rules[value].keeps_state:
            continue
        found = plan.storage.layouts[value]
        if found.order:
            outer = found.order[0]
            constant = compact(plan.schedule.times.of(value)) == CONSTANT
            constant_rows = constant.movedim(outer, 0)
            in_row = constant_rows.reshape(len(constant_rows), -1).any(1).expand(value.shape[outer])
            rows = torch.nonzero(in_row).flatten().tolist()
            late = bool(in_row[1:].any())
            written = _written(value, boxes.get(value, []), constant.expand(value.shape), outer) if late else {}
            begun = max((row + 1 for row in rows if row == 0 or row not in written), default=0)
            yield Candidate(memory, found, begun, {row: step for row, step in written.items() if row >= begun})


def _written(value: Value, boxes: list[tuple[int, Box]], constant: Tensor, outer: int) -> dict[int, int]:
    """Rows whose constants are all computed again, with others in their boxes, and by which step they are.

    Args:
        boxes: of the value, with their steps, in order.
        constant: which of its elements are.
        outer: the dimension of rows.
    """
    never = 2**31 - 1
    first = torch.full(value.shape, never, dtype=torch.int32)
    for step, box in reversed(boxes):
        first[box.slices] = step
    last = torch.where(constant, first, -1).movedim(outer, 0).reshape(value.shape[outer], -1).amax(1).tolist()
    return {row: step for row, step in enumerate(last) if 0 <= step < never}


def _storage(timed: Timed, when: Schedule, order: Order, shape: Sequence[int]) -> Storage:
    graph = timed.graph
    maps: dict[Value, list[Map]] = {}
    # Programs show which other values must be, see `NeedsStorage`.
    stored = {*graph.output.values, *(value for value, rule in timed.rules.items() if rule.keeps_state)}
    for operand in (graph.output, *(one for rule in timed.rules.values() for one in rule.reads())):
        if operand.map is not None:
            maps.setdefault(operand.map.value, []).append(operand.map)
        if operand.map is None or operand.map.padded:
            stored |= set(operand.values)
    layouts = {}
    feature_maps = _feature_maps(timed)
    for value in graph.values:
        if value.kind != "constant":
            times = draw_index_of(order, shape) if value.kind == "levels" else when.times.of(value)
            rule = timed.rules.get(value)
            channels = 1 if value in feature_maps else rule.channels if rule is not None else None
            layouts[value] = layout(value, times, maps.get(value, []), channels)
    return Storage(layouts, stored)


def _feature_maps(timed: Timed) -> set[Value]:
    """Values (1, C, ...) that convolutions compute or read, and what is computed from them place by place."""
    found: set[Value] = set()
    for value in timed.computed:
        sources = [source for operand in value.operands for source in operand.values]
        if isinstance(timed.rules[value], Convolution):
            found |= {value, *(one for one in sources if len(one.shape) == len(value.shape))}
        elif any(one in found and len(one.shape) == len(value.shape) for one in sources):
            found.add(value)
    return found


Built = dict[int, tuple[Builder, frozenset[Value]]]  # step -> what wrote its program, values local to it


def _alike(plan: Plan) -> list[list[int]]:
    """Groups of steps that compute boxes of the same values and sizes."""
    rules = plan.timed.rules
    groups: dict[Any, list[int]] = {}
    for step, tasks in enumerate(plan.schedule.steps):
        key = tuple((value, box.sizes, box.steps, rules[value].fixed(box)) for value, box in tasks)
        groups.setdefault(key, []).append(step)
    return list(groups.values())


def _write_programs(plan: Plan, groups: list[list[int]], built: Built) -> bool:
    """Whether the programs are right: not where values were found on the way that need storage."""
    before = len(plan.storage.stored)
    plan.programs = []
    tasks_of = plan.schedule.steps
    steps: dict[int, Step] = {}
    numbers: dict[Any, int] = {}

    pending = list(groups)
    while pending:
        group = pending.pop(0)
        builder = _build(plan, group[0], built)
        starts = [
            np.array([tasks_of[step][k][1].start for step in group], dtype=np.int64).reshape(len(group), -1)
            for k in range(len(tasks_of[group[0]]))
        ]
        fits = np.ones(len(group), dtype=bool)
        for check in builder.checks:
            fits &= check.offset.over(starts[check.task]) == starts[check.other][:, check.dim] + check.distance
        listed = np.zeros((len(group), builder.listed), dtype=np.int64)
        for read in builder.indexed_reads:
            alike, listed[:, read.listed] = read.over(starts[read.task])
            fits &= alike
        if not fits.all():
            pending.append([step for step, fit in zip(group, fits, strict=True) if not fit])
        program = builder.program
        number = numbers.setdefault(program.key, len(plan.programs))
        if number == len(plan.programs):
            plan.programs.append(program)
        offsets = program.offsets([one[fits] for one in starts], listed[fits])
        for step, row in zip(np.flatnonzero(fits).tolist(), offsets, strict=True):
            steps[group[step]] = Step(number, row)
    plan.steps = [steps[step] for step in range(len(tasks_of))]
    return len(plan.storage.stored) == before


def _build(plan: Plan, step: int, built: Built) -> Builder:
    if step in built and not built[step][1] & plan.storage.stored:
        return built[step][0]
    tasks = plan.schedule.steps[step]
    while True:
        before = len(plan.storage.stored)
        builder = Builder(plan.storage, tasks)
        for number, (value, box) in enumerate(tasks):
            builder.task, written = number, False
            while not written:
                try:
                    plan.timed.rules[value].emit(builder, box)
                    written = True
                except NeedsStorage as missing:  # the rest is written all the same, to find all that is missing
                    plan.storage.stored.add(missing.value)
        if len(plan.storage.stored) == before:
            built[step] = builder, frozenset(builder.local)
            return builder
