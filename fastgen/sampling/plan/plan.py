"""Takes a `Network`; gives its `Plan`: the drawing order, the schedule, where values lie, the programs of all steps."""

from collections import deque
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
from fastgen.sampling.plan.layout import dimension_order, layout
from fastgen.sampling.plan.renewal import renew
from fastgen.sampling.plan.schedule import Boxes, Schedule, row_ends, running_times, schedule
from fastgen.sampling.plan.sliding_rows import Candidate, Ring, make_rings
from fastgen.sampling.plan.split_convolution import split_rows
from fastgen.sampling.plan.temporaries import Scratch, share_scratch
from fastgen.sampling.rules.concatenation import Concatenation
from fastgen.sampling.rules.convolution import Convolution
from fastgen.sampling.trace.element_times import compact
from fastgen.sampling.trace.graph import CONSTANT, NEVER, Map, Operand, Value
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
    traced: list[Value]
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

    @cached_property
    def blocks(self) -> dict[Memory | int, tuple[int, torch.dtype]]:
        """All memory of an image: a stored memory, or the number of a scratch block -> its size and dtype."""
        lasting = (self.levels, *self.leaves, *self.output.values, *self.storage.stored)
        memories = dict.fromkeys((*self.storage.memories.values(), *map(self.storage.memory, lasting)))
        return {
            **dict(enumerate(zip(self.scratch.sizes, self.scratch.dtypes, strict=True))),
            **{one: (self.rings.get(one, one).numel, one.dtype) for one in memories if one.kind == "stored"},
        }

    @property
    def bytes_of_image(self) -> int:
        return sum(size * dtype.itemsize for size, dtype in self.blocks.values())

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
        for value, boxes in self.schedule.boxes.items():
            cost = self.timed.rules[value].multiply_adds
            if cost:
                done += int(boxes.sizes.prod(0).sum()) * cost
                once += float((boxes.first >= 0).mean()) * value.numel * cost
        return done / once if once else 1.0


def make_plan(network: Network, distribution: Distribution) -> Plan:
    """Raises NotCausalError, or Unsupported where the engine cannot take the model."""
    shape = network.shape
    draws, timed, conditions = ordered(network, distribution)
    traced = list(timed.graph.values)
    output, order, ends = timed.graph.output, draws.order, row_ends(draws.order)
    times = running_times(timed, ends, draws.of_outputs() - 1, partial(split_rows, timed, ends))
    when = schedule(timed, len(order), times)
    storage = _storage(timed, when, order, shape)
    whole_pixels = len(order) == shape[1] * shape[2]
    plan = Plan(timed, when, storage, order, whole_pixels, output, conditions, network, traced, timed.graph.remarks)
    groups = when.alike(timed.rules)
    built: Built = {}
    while not _write_programs(plan, groups, built):
        pass  # again, with what was found to need storage
    plan.scratch = share_scratch(program.views for program in plan.programs)
    plan.rings = make_rings(_windows(plan), plan.programs, plan.steps)
    return plan


def _windows(plan: Plan) -> Iterator[Candidate]:
    """Values of which a ring may hold some rows: steps compute them, and only steps read them."""
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
            boxes = plan.schedule.boxes.get(value)
            written = _written(boxes, constant, outer) if late and boxes else {}
            begun = max((row + 1 for row in rows if row == 0 or row not in written), default=0)
            yield Candidate(memory, found, begun, {row: step for row, step in written.items() if row >= begun})


def _written(boxes: Boxes, constant: Tensor, outer: int) -> dict[int, int]:
    """Rows whose constants are all computed again, with others in their boxes, and by which step they are.

    Args:
        boxes: of a value.
        constant: which of its elements are.
        outer: the dimension of rows.
    """
    first = np.where(constant.numpy(), np.where(boxes.first < 0, NEVER, boxes.first), -1)
    last = np.moveaxis(first, outer, 0).reshape(first.shape[outer], -1).max(1).tolist()
    return {row: step for row, step in enumerate(last) if 0 <= step < NEVER}


def _storage(timed: Timed, when: Schedule, order: Order, shape: Sequence[int]) -> Storage:
    graph = timed.graph
    maps: dict[Value, list[Map]] = {}
    # Programs show which other values must be, see `NeedsStorage`.
    stored = {*graph.output.values, *(value for value, rule in timed.rules.items() if rule.keeps_state)}
    reads = {value: rule.reads() for value, rule in timed.rules.items()}
    for operand in (graph.output, *(one for of_value in reads.values() for one in of_value)):
        if operand.map is not None:
            maps.setdefault(operand.map.value, []).append(operand.map)
        if operand.map is None or operand.map.padded:
            stored |= set(operand.values)
    apart: dict[tuple[Boxes, Boxes | None], bool] = {}  # whether there are steps of the first alone
    for value, boxes in when.boxes.items():
        for source in {source for operand in reads[value] for source in operand.values if source.kind == "computed"}:
            of_both = boxes, when.boxes.get(source)
            if of_both not in apart:
                apart[of_both] = of_both[1] is None or not np.isin(boxes.at, of_both[1].at).all()
            if apart[of_both] and not isinstance(timed.rules[value], Concatenation):  # which may read some alone
                stored.add(source)
    layouts = {}
    orders: dict[Any, tuple[int, ...]] = {}  # of values that are computed alike, too
    feature_maps = _feature_maps(timed)
    for value in graph.values:
        if value.kind != "constant":
            times = draw_index_of(order, shape) if value.kind == "levels" else when.times.of(value)
            rule = timed.rules.get(value)
            channels = 1 if value in feature_maps else rule.channels if rule is not None else None
            key = when.boxes.get(value, value), channels
            orders[key] = orders[key] if key in orders else dimension_order(times, channels)
            layouts[value] = layout(value, orders[key], maps.get(value, []))
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


Tasks = list[tuple[Boxes, int]]  # of a step: which boxes, and the number of its own among those of the step
Built = dict[int, tuple[Builder, Tasks]]  # step -> what wrote its program


def _write_programs(plan: Plan, groups: list[np.ndarray], built: Built) -> bool:
    """Whether the programs are right: not where values were found on the way that need storage."""
    before = len(plan.storage.stored)
    plan.programs = []
    steps: dict[int, Step] = {}
    numbers: dict[Any, int] = {}

    pending = deque(groups)
    written = plan.schedule.tasks([int(group[0]) for group in groups])
    while pending:
        group = pending.popleft()
        step = int(group[0])
        if step not in written:  # the first of those that did not fit another's program
            written |= plan.schedule.tasks([step])
        builder, tasks = _build(plan, step, written.pop(step), built)
        starts = [boxes.places(nth, group) for boxes, nth in tasks]
        fits = np.ones(len(group), dtype=bool)
        for check in builder.checks:
            fits &= check.offset.over(starts[check.task]) == starts[check.other][:, check.dim] + check.distance
        listed = np.zeros((len(group), builder.listed), dtype=np.int64)
        for read in builder.indexed_reads:
            alike, listed[:, read.listed] = read.over(starts[read.task])
            fits &= alike
        if not fits.all():
            pending.append(group[~fits])
        program = builder.program
        number = numbers.setdefault(program.key, len(plan.programs))
        if number == len(plan.programs):
            plan.programs.append(program)
        offsets = program.offsets([one[fits] for one in starts], listed[fits])
        for fitting, row in zip(group[fits].tolist(), offsets, strict=True):
            steps[fitting] = Step(number, row)
    plan.steps = [steps[step] for step in range(len(steps))]
    return len(plan.storage.stored) == before


def _build(plan: Plan, step: int, written: Sequence[tuple[Value, Boxes, int]], built: Built) -> tuple[Builder, Tasks]:
    """Writes the program of a step from what it computes, or takes the one that was written before."""
    if step in built and not built[step][0].local.keys() & plan.storage.stored:
        return built[step]
    numbers: dict[tuple[Boxes, int], int] = {}  # of tasks
    for _, boxes, k in written:
        numbers.setdefault((boxes, k), len(numbers))
    starts = [boxes[k].start for boxes, k in numbers]
    while True:
        before = len(plan.storage.stored)
        builder = Builder(plan.storage, starts)
        for value, boxes, k in written:
            builder.task, done = numbers[boxes, k], False
            while not done:
                try:
                    plan.timed.rules[value].emit(builder, boxes[k])
                    done = True
                except NeedsStorage as missing:  # the rest is written all the same, to find all that is missing
                    plan.storage.stored.add(missing.value)
        if len(plan.storage.stored) == before:
            built[step] = builder, [(boxes, int(boxes.nth[k])) for boxes, k in numbers]
            return built[step]
