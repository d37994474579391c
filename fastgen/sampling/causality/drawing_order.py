"""The order of the draws: the raster where the model is causal in it, else the one that its dependencies ask for."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.distributions import Bernoulli, Categorical, Distribution, LogisticMixture
from fastgen.sampling.causality.ready_times import Timed, ready_times
from fastgen.sampling.causality.report import (
    CausalityReport,
    Leak,
    NotCausalError,
    Order,
    channel_layouts,
    dependencies,
    draw_places,
    hint_for,
    leaks_of,
    places_of,
    raster,
    topological_order,
)
from fastgen.sampling.rules.base import coarser
from fastgen.sampling.trace.graph import Graph, Unsupported
from fastgen.sampling.trace.network import Network

TRIALS = 4  # images whose levels are changed one by one: a dead ReLU hides what another image shows


class NotByReadyTimes(Unsupported):
    """A model that is causal in `order`, as changing its input shows, but that the engine cannot take."""

    def __init__(self, message: str, order: Order) -> None:
        super().__init__(message)
        self.order = order


def drawing_order(
    model: nn.Module,
    shape: Sequence[int],
    distribution: Distribution,
    encode: Callable[[Tensor], Tensor],
    condition: Any,
    levels: int,
) -> Order:
    """(channel, row, column) of all draws, in an order in which the model is causal. Raises NotCausalError."""
    try:
        order = ordered(Network(model, shape, encode, condition, levels), distribution).order
    except NotByReadyTimes as found:
        order = found.order
    if len(order) == shape[0] * shape[1] * shape[2]:
        return order
    return [(c, i, j) for _, i, j in order for c in range(shape[0])]


class Ordered:
    """Ready times for an order in which the model is causal, and when each output is needed first.

    Attributes:
        graph, conditions: of the network.
        timed, order, needed: its ready times in this order; `needed` has the output's shape.
        remarks: what to tell people.
    """

    def __init__(self, graph: Graph, conditions: list[Any], timed: Timed, order: Order, needed: Tensor) -> None:
        self.graph, self.conditions, self.timed, self.order, self.needed = graph, conditions, timed, order, needed
        self.remarks = list(graph.remarks)


def ordered(network: Network, distribution: Distribution) -> Ordered:
    """Raises NotCausalError, or NotByReadyTimes where the engine cannot take the model."""
    params = (1, *network.output_shape[1:-2])
    candidates = [(raster(network.shape, False), torch.zeros(params, dtype=torch.long))]
    if network.shape[0] > 1:
        layouts = _channels_of(distribution, params, network.shape[0])
        candidates += [(raster(network.shape, True), channel_of) for channel_of in layouts]
    try:
        graph, conditions = network.graph()
    except Unsupported as reason:
        raise NotByReadyTimes(str(reason), _order_by_changes(network, candidates, None)) from reason
    finest = candidates[-1][0]
    places = places_of(finest, network.shape)
    timed = ready_times(graph, places)
    for order, channel_of in candidates:
        draws = len(finest) // len(order)  # of the finest order in one of this
        needed = draw_places(places_of(order, network.shape), channel_of)
        if bool((coarser(timed.output_ready(), draws) < needed).all()):
            timed.analysis.coarsen(draws)
            return Ordered(graph, conditions, timed, order, needed)
    report = CausalityReport(False, leaks_of(timed, places, needed, channel_of, network.model))
    order = _order_by_changes(network, candidates, report)
    for _, channel_of in candidates:
        places = places_of(order, network.shape)
        timed, needed = ready_times(graph, places), draw_places(places, channel_of)
        if bool((timed.output_ready() < needed).all()):
            found = Ordered(graph, conditions, timed, order, needed)
            found.remarks.append("pixels are drawn in another order than the raster, which the model asks for")
            return found
    what = "changing its input shows no leak"
    if all(order != other for other, _ in candidates):
        what = "changing its input shows that its draws can be put in another order than the raster"
    raise NotByReadyTimes(f"ready times, an upper bound, find the model not causal, but {what}: {report}", order)


def _order_by_changes(
    network: Network, candidates: Sequence[tuple[Order, Tensor]], report: CausalityReport | None
) -> Order:
    """An order that the changes of the output under changes of single levels allow; NotCausalError without one."""
    changed = None
    for trial in range(TRIALS):
        sample, other = network.samples[trial : trial + 1], network.samples[trial + 1 : trial + 2]
        other = torch.where(other == sample, (sample + 1) % network.levels, other)
        found = dependencies(network.run, sample, other)
        changed = found if changed is None else changed | found
    assert changed is not None
    for order, channel_of in candidates:
        possible = topological_order(_draw_dependencies(changed, order, channel_of, network.shape), order)
        if possible is not None:
            return possible
    if report is None:
        order, channel_of = candidates[-1]
        depends = _draw_dependencies(changed, order, channel_of, network.shape)
        later = torch.nonzero(depends.triu())[:16].tolist()
        hint = hint_for(network.model.modules())
        report = CausalityReport(False, [Leak(order[a], order[b], "model", "", hint) for a, b in later])
    raise NotCausalError(report)


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
