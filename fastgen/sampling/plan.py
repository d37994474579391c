"""From a model to the programs of all steps: trace, ready times, order, schedule, layout, programs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastgen.distributions import Bernoulli, Categorical, Distribution, LogisticMixture
from fastgen.sampling.builder import Builder, NeedsStorage, Storage
from fastgen.sampling.causality import (
    CausalityReport,
    NotCausalError,
    Order,
    channel_layouts,
    dependencies,
    draw_places,
    leaks_of,
    places_of,
    raster,
    topological_order,
    unchanged,
)
from fastgen.sampling.graph import CONSTANT, NEVER, Graph, Map, Operand, Unsupported, Value
from fastgen.sampling.layout import Box, layout
from fastgen.sampling.program import Program
from fastgen.sampling.ready import Timed, ready_times
from fastgen.sampling.schedule import Schedule, schedule
from fastgen.sampling.trace import trace

MOST_ELEMENTS = 4 * 10**8  # of one image; beyond, the analysis would not fit into memory


class NotByReadyTimes(Unsupported):
    """A model that is causal in `order`, as changing its input shows, but not by its ready times."""

    def __init__(self, message: str, order: Order) -> None:
        super().__init__(message)
        self.order = order


@dataclass
class Plan:
    """All that sampling needs besides memory: which program runs at which step, with which offsets.

    Attributes:
        order: (channel, row, column) of the draws; all channels of a pixel at once where `whole_pixels`.
        programs: the distinct ones; those of a step are in `steps`.
        steps: for steps -1, 0, ...: (number of the program, offsets).
        rows: the output's map of a pixel, see `Engine`.
    """

    timed: Timed
    schedule: Schedule
    storage: Storage
    order: Order
    whole_pixels: bool
    output: Operand
    leaves: list[Value]
    programs: list[Program] = field(default_factory=list)
    steps: list[tuple[int, list[Any]]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def levels(self) -> Value:
        return self.timed.graph.values[0]

    @property
    def work_ratio(self) -> float:
        whole = sum(rule.multiply_adds for rule in self.timed.rules.values())
        done = sum(self.programs[number].multiply_adds for number, _ in self.steps)
        return done / whole if whole else 1.0


def make_plan(
    model: nn.Module,
    shape: Sequence[int],
    distribution: Distribution,
    encode: Callable[[Tensor], Tensor],
    condition: Any,
    levels: int,
) -> Plan:
    """Raises NotCausalError, or Unsupported where the engine cannot take the model."""
    graph, leaves, run, samples = _traced(model, shape, encode, condition, levels)
    timed, order, needed, remarks = _ordered(model, graph, run, samples, shape, distribution)
    when = schedule(timed, order, [(graph.output, (needed - 1).expand(graph.output.shape))])
    plan = Plan(
        timed,
        when,
        _storage(timed, when, order, shape),
        order,
        len(order) == shape[1] * shape[2],
        graph.output,
        leaves,
        remarks=[*graph.remarks, *remarks],
    )
    while True:
        try:
            _write_programs(plan)
            return plan
        except NeedsStorage as found:
            plan.storage.stored.add(found.value.index)


def drawing_order(
    model: nn.Module,
    shape: Sequence[int],
    distribution: Distribution,
    encode: Callable[[Tensor], Tensor],
    condition: Any,
    levels: int,
) -> Order:
    """(channel, row, column) of all draws, in an order in which the model is causal. Raises as `make_plan`."""
    graph, _, run, samples = _traced(model, shape, encode, condition, levels)
    try:
        order = _ordered(model, graph, run, samples, shape, distribution)[1]
    except NotByReadyTimes as found:
        order = found.order
    if len(order) == shape[0] * shape[1] * shape[2]:
        return order
    return [(c, i, j) for _, i, j in order for c in range(shape[0])]


# --- tracing


def _traced(
    model: nn.Module, shape: Sequence[int], encode: Callable[[Tensor], Tensor], condition: Any, levels: int
) -> tuple[Graph, list[Value], Callable[[Tensor], Tensor], Tensor]:
    """The graph of one image, its condition's values, the model as a function of levels, and two images of levels."""
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    leaves, structure = tree_flatten(condition)
    rows = [k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.dim()]

    def of_images(x: Tensor, *given: Tensor) -> Tensor:
        full = list(leaves)
        for k, leaf in zip(rows, given, strict=True):
            full[k] = leaf
        built = tree_unflatten(full, structure)
        return model(encode(x)) if condition is None else model(encode(x), built)

    generator = torch.Generator().manual_seed(0)
    samples = torch.randint(levels, (2, *shape), generator=generator).to(device)
    with unchanged(model):
        with torch.no_grad():
            whole = of_images(samples, *(leaves[k] for k in rows))
        graphs = [trace(of_images, model, samples[b : b + 1], [leaves[k][b : b + 1] for k in rows]) for b in range(2)]
    _check_same(graphs, whole)
    graph = graphs[0]
    if graph.numel > MOST_ELEMENTS:
        raise Unsupported(f"the network of one image has {graph.numel:.1e} elements")
    expected = (1, *whole.shape[1:])
    found = graph.output.map
    assert found is not None
    if graph.output.shape == expected[1:]:
        found = Map(found.value, expected, found.start, ((0,) * len(found.start), *found.steps))
        graph.output = Operand(graph, expected, map=found)
    if graph.output.shape != expected:
        raise Unsupported(f"one image gives the shape {graph.output.shape}, two give {tuple(whole.shape)}")

    def run(x: Tensor) -> Tensor:
        with torch.no_grad(), unchanged(model):
            return of_images(x, *(leaves[k][:1].expand(len(x), *leaves[k].shape[1:]) for k in rows))

    return graph, [value for value in graph.values if value.kind == "condition"], run, samples


def _check_same(graphs: Sequence[Graph], whole: Tensor) -> None:
    """The same operations for both images, each by itself as in a batch of both."""
    first, second = graphs
    same = len(first.values) == len(second.values)
    for a, b in zip(first.values, second.values, strict=False):
        same = same and a.shape == b.shape and a.op == b.op
        same = same and (a.kind != "constant" or torch.equal(a.data.nan_to_num(), b.data.nan_to_num()))
    if not same:
        raise Unsupported("the model computes in another way for other values of its input")
    for k, graph in enumerate(graphs):
        alone, together = graph.data_of(graph.output), whole[k].cpu()
        scale = together[together.isfinite()].abs().max() if together.isfinite().any() else 0
        tolerance = (
            1e-3 * float(scale) + 1e-5 if together.dtype in (torch.float32, torch.float64) else 0.1 * float(scale)
        )
        if alone.numel() != together.numel() or not torch.allclose(
            alone.reshape(together.shape), together, atol=tolerance, rtol=0, equal_nan=True
        ):
            raise Unsupported("an image's output depends on what else is in its batch")


# --- the drawing order


def _channels_of(distribution: Distribution, shape: Sequence[int], channels: int) -> list[Tensor]:
    """For each parameter of a pixel the channel that it belongs to; several ways where that is not known, since the
    model's own pass has the last word; none for a mixture, whose parameters belong to all channels."""
    numbers = torch.arange(torch.Size(shape[1:]).numel(), dtype=torch.float64).view(1, *shape[1:])
    found = torch.zeros(numbers.numel(), dtype=torch.long)
    if isinstance(distribution, Categorical):
        for channel, of_channel in enumerate(distribution.logits(numbers)[0].unbind(1)):
            found[of_channel.long().flatten()] = channel
    elif isinstance(distribution, Bernoulli):
        found = numbers[0].long().flatten() // max(1, numbers.numel() // channels)
    elif isinstance(distribution, LogisticMixture):
        return []
    else:
        return channel_layouts(shape, channels)
    return [found.view(1, *shape[1:])]


def _ordered(
    model: nn.Module,
    graph: Graph,
    run: Callable[[Tensor], Tensor],
    samples: Tensor,
    shape: Sequence[int],
    distribution: Distribution,
) -> tuple[Timed, Order, Tensor, list[str]]:
    """Ready times for an order in which the model is causal, and when each output is needed first."""
    params = graph.output.shape[:-2]
    at_once = torch.zeros(params, dtype=torch.long)
    candidates = [(raster(shape, False), at_once)]
    if shape[0] > 1:
        candidates += [(raster(shape, True), channel_of) for channel_of in _channels_of(distribution, params, shape[0])]
    report = None
    for order, channels in candidates:
        places = places_of(order, shape)
        timed, needed = ready_times(graph, places), draw_places(places, channels)
        if bool((timed.output_ready() < needed).all()):
            return timed, order, needed, []
        report = CausalityReport(False, leaks_of(timed, places, needed, channels, model.training))
    # Not in raster order, or only by an upper bound: look what really changes.
    order, channels = candidates[-1]
    sample = samples[:1]
    changed = dependencies(run, sample, samples[1:] + (samples[1:] == sample).long() * (1 - 2 * (sample > 0).long()))
    dependent = _draw_dependencies(changed, order, channels, shape)
    found = topological_order(dependent, order)
    if found is None:
        assert report is not None
        raise NotCausalError(report)
    in_raster = found == order
    places = places_of(found, shape)
    timed, needed = ready_times(graph, places), draw_places(places, channels)
    if bool((timed.output_ready() < needed).all()):
        return timed, found, needed, ["pixels are drawn in another order than the raster, which the model asks for"]
    what = "changing its input shows no leak" if in_raster else "it is causal in another order than the raster"
    raise NotByReadyTimes(f"ready times, an upper bound, find the model not causal, but {what}: {report}", found)


def _draw_dependencies(changed: Tensor, order: Order, channel_of: Tensor, shape: Sequence[int]) -> Tensor:
    """depends[a, b]: draw a depends on the level of draw b."""
    channels, height, width = shape
    by_input = changed.view(channels, height, width, *changed.shape[1:])
    ordered = len(order) > height * width
    index = torch.tensor(order)
    if not ordered:
        any_output = by_input.flatten(3, -3).any(3) if by_input.dim() > 5 else by_input
        found = any_output.any(0)[index[:, 1], index[:, 2]]
        return found[:, index[:, 1], index[:, 2]].T.contiguous()
    flat = by_input.flatten(3, -3)
    owners = channel_of.reshape(-1)
    of_channels = torch.stack([flat[:, :, :, owners == c].any(3) for c in range(channels)], 3)
    found = of_channels[index[:, 0], index[:, 1], index[:, 2]]
    return found[:, index[:, 0], index[:, 1], index[:, 2]].T.contiguous()


# --- memory and programs


def _storage(timed: Timed, when: Schedule, order: Order, shape: Sequence[int]) -> Storage:
    graph = timed.graph
    maps: dict[int, list[Map]] = {}
    stored = set(when.stored)
    reads = [timed.graph.output]
    for value in timed.computed:
        reads += timed.rules[value.index].reads()
    for operand in reads:
        if operand.map is not None:
            maps.setdefault(operand.map.value.index, []).append(operand.map)
            if operand.map.padded:
                stored.add(operand.map.value.index)
        else:
            stored |= {value.index for value in operand.values}
    layouts = {}
    for value in graph.values:
        if value.kind != "constant":
            times = places_of(order, shape) if value.kind == "levels" else graph.of(when.times, value)
            layouts[value.index] = layout(value, times, maps.get(value.index, []))
    return Storage(layouts, stored)


def _write_programs(plan: Plan) -> None:
    plan.programs, plan.steps = [], []
    groups: dict[Any, list[int]] = {}
    tasks_of = plan.schedule.steps
    by_number: dict[Any, int] = {}
    steps: dict[int, tuple[int, list[Any]]] = {}
    for step, tasks in enumerate(tasks_of):
        if any(one.map is None for value, _ in tasks for one in value.operands):
            program, payload = _build(plan, tasks)
            number = by_number.setdefault(_signature(program), len(plan.programs))
            if number == len(plan.programs):
                plan.programs.append(program)
            starts = [np.array([box.start], dtype=np.int64) for _, box in tasks]
            steps[step] = number, program.offsets(starts, [payload])[0]
        else:
            key = tuple(
                (value.index, box.sizes, box.steps, plan.timed.rules[value.index].fixed(box)) for value, box in tasks
            )
            groups.setdefault(key, []).append(step)
    pending = list(groups.values())
    while pending:
        group = pending.pop(0)
        program, payload = _build(plan, tasks_of[group[0]])
        starts = [
            np.array([tasks_of[step][k][1].start for step in group], dtype=np.int64).reshape(len(group), -1)
            for k in range(len(tasks_of[group[0]]))
        ]
        fits = np.ones(len(group), dtype=bool)
        for check in program.checks:
            fits &= check.linear.over(starts[check.task]) == starts[check.other][:, check.dim] + check.distance
        if not fits.all():
            pending.append([step for step, fit in zip(group, fits, strict=True) if not fit])
        starts = [one[fits] for one in starts]
        group = [step for step, fit in zip(group, fits, strict=True) if fit]
        for step, offsets in zip(group, program.offsets(starts, [payload] * len(group)), strict=True):
            steps[step] = len(plan.programs), offsets
        plan.programs.append(program)
    plan.steps = [steps[step] for step in range(len(tasks_of))]


def _build(plan: Plan, tasks: Sequence[tuple[Value, Box]]) -> tuple[Program, list[Any]]:
    builder = Builder(plan.storage, tasks)
    for number, (value, box) in enumerate(tasks):
        builder.task = number
        plan.timed.rules[value.index].emit(builder, box)
    return builder.program, builder.payload


def _signature(program: Program) -> Any:
    """Equal for programs that differ in nothing but the offsets of a step."""
    source, names = program.source()
    blocks: dict[int, int] = {}
    found: list[Any] = []
    for name, what in names.items():
        if hasattr(what, "memory"):
            memory = what.memory
            kept = id(memory) if memory.kind != "scratch" else blocks.setdefault(id(memory), len(blocks))
            offset = 0 if what.listed is not None else what.offset
            found.append((name, memory.kind, kept, what.sizes, what.strides, offset, what.listed))
        else:
            found.append((name, id(what)))
    return source, tuple(found)


__all__ = ["CONSTANT", "NEVER", "Plan", "drawing_order", "make_plan"]
