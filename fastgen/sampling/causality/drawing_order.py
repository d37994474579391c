"""Whether a model is causal, and in which order of the draws: the verdict that samplers and `check_causality` share.

1. Ready times in raster order prove most models causal.
2. Where they do not, ready times in other orders do, or name draws that depend on each other in a circle (`search`).
3. Ready times are an upper bound. A leak that no operation can hide (`doubt`) is one: NotCausalError.
4. The rest, and models that cannot be traced, are tried (`trials`). Where no leak was seen, the model is drawn by whole
   passes of its own, and the report says that it is not proven.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastgen.distributions import Distribution
from fastgen.distributions.base import independent
from fastgen.sampling.adapter import Adapter
from fastgen.sampling.causality.draws import Draws, Order, layouts_of, possible_draws, possible_layouts
from fastgen.sampling.causality.ready_times import Timed, ready_times
from fastgen.sampling.causality.report import CausalityReport, Leak, NotCausalError, leaks_of, leaks_seen
from fastgen.sampling.causality.search import search, topological_order
from fastgen.sampling.causality.trials import dependences, dependences_of_ends
from fastgen.sampling.condition import example
from fastgen.sampling.model_state import device_of
from fastgen.sampling.request import checked_count, checked_shape
from fastgen.sampling.rules.base import coarser
from fastgen.sampling.trace.graph import Graph, Unsupported, Value
from fastgen.sampling.trace.network import Network

OTHER_ORDER = "pixels are drawn in another order than the raster, which the model asks for"


class NotByReadyTimes(Unsupported):
    """A model that is causal in `order`, as far as changing its input shows, but that the engine cannot take."""

    def __init__(self, message: str, order: Order) -> None:
        super().__init__(message)
        self.order = order


class Ordered(NamedTuple):
    """Draws in an order in which the model is causal, its ready times in that order, the values of its condition."""

    draws: Draws
    timed: Timed
    conditions: list[Value]


def ordered(network: Network, distribution: Distribution) -> Ordered:
    """An order in which the model is causal, with its ready times.

    Raises:
        NotCausalError: there is none.
        NotByReadyTimes: where the engine cannot take the model.
        ValueError: the model draws random numbers.
    """
    params = (1, *network.output_shape[1:-2])
    candidates = possible_draws(network.shape, layouts_of(distribution, params, network.shape[0]), params)
    try:
        graph, conditions = network.graph()
    except Unsupported as reason:
        order = _order_by_trials(network, candidates, reason)
        raise NotByReadyTimes(f"{reason} (causal as far as trials show, not proven)", order) from reason
    in_raster = _in_raster(graph, candidates)
    if in_raster is not None:
        return Ordered(*in_raster, conditions)

    def output_ready(draw_index: Tensor) -> Tensor:
        return ready_times(graph, draw_index).output_ready()

    def certainly_ready(draw_index: Tensor) -> Tensor:
        return ready_times(graph, draw_index, ready_times(graph, draw_index)).output_ready()

    known = [_channels_in_order(one, distribution) for one in candidates]
    for one, depends in zip(candidates, known, strict=True):
        draws = search(output_ready, one, depends).draws
        if draws is not None:
            graph.remarks.append(OTHER_ORDER)
            return Ordered(draws, ready_times(graph, draws.of_levels()), conditions)
    finest = candidates[-1]
    report = CausalityReport(False, leaks_of(ready_times(graph, finest.of_levels()), finest, network.model))
    if all(search(certainly_ready, *given).circle for given in zip(candidates, known, strict=True)):
        raise NotCausalError(report)
    doubt = Unsupported(f"ready times, an upper bound, find the model {report}", graph)
    order = _order_by_trials(network, candidates, doubt, certainly_ready)
    raise NotByReadyTimes(f"{doubt}; causal as far as trials show, not proven", order)


def _in_raster(graph: Graph, candidates: Sequence[Draws]) -> tuple[Draws, Timed] | None:
    finest = candidates[-1]
    timed = ready_times(graph, finest.of_levels())
    for one in candidates:
        draws = len(finest) // len(one)  # of the finest order in one of this
        if bool((coarser(timed.output_ready(), draws) < one.of_outputs()).all()):
            timed.analysis.coarsen(draws)
            return one, timed
    return None


def _channels_in_order(draws: Draws, distribution: Distribution) -> Tensor:
    """depends[a, b] for the channels of a pixel, where the distribution reads those drawn before."""
    depends = torch.zeros((len(draws), len(draws)), dtype=torch.bool)
    if len(draws) > draws.shape[1] * draws.shape[2] and not independent(distribution):
        number = draws.of_levels()[0].long()
        depends[number[1:].reshape(-1), number[:-1].reshape(-1)] = True
    return depends


def _order_by_trials(
    network: Network,
    candidates: Sequence[Draws],
    reason: Unsupported,
    certainly_ready: Callable[[Tensor], Tensor] | None = None,
) -> Order:
    """An order that the dependences seen in trials allow, and those that are certain. Raises NotCausalError where there
    is none."""
    _check_not_random(network, reason)
    moved = dependences_of_ends(network)
    if all(topological_order(_between_draws(moved, draws)) is None for draws in candidates):
        raise NotCausalError(_seen(network, candidates[-1:], reason, moved, 1))
    moved, trials = dependences(network)
    for draws in candidates:
        depends = _between_draws(moved, draws)
        if certainly_ready is None:
            possible = topological_order(depends)
            found = None if possible is None else draws.reordered(torch.tensor(possible))
        else:
            found = search(certainly_ready, draws, depends).draws
        if found is not None:
            return found.order
    raise NotCausalError(_seen(network, candidates[-1:], reason, moved, trials))


def _seen(
    network: Network, candidates: Sequence[Draws], reason: Unsupported, moved: Tensor, trials: int
) -> CausalityReport:
    """The leaks that trials have shown, with the names that ready times know."""
    seen = [leaks_seen(moved, one, network.model) for one in candidates]
    remark = f"trials of changing its input: {trials}; {reason}"
    if not all(seen):
        return CausalityReport(True, [], remark, proven=False)
    named: list[list[Leak]] = []
    if reason.graph is not None:
        named = [leaks_of(ready_times(reason.graph, one.of_levels()), one, network.model) for one in candidates]
    if trials == 1:  # of two levels: few leaks, of what may have more
        of_output = {leak.output: leak for leaks in named for leak in leaks}
        seen = [[replace(of_output.get(leak.output, leak), input=leak.input) for leak in leaks] for leaks in seen]
        named = []
    return CausalityReport(False, min((leaks for leaks in (*named, *seen) if leaks), key=len), remark)


def _between_draws(moved: Tensor, draws: Draws) -> Tensor:
    """depends[a, b]: an output that draw a reads was seen to change with a level that draw b sets."""
    count = len(draws)
    of_levels, of_outputs = draws.of_levels().reshape(-1).long(), draws.of_outputs().reshape(-1).long()
    found = torch.zeros((count, count), dtype=torch.uint8)
    for level, row in zip(of_levels.tolist(), moved.flatten(1), strict=True):
        found[of_outputs[row], level] = 1
    return found.bool()


def _check_not_random(network: Network, reason: Unsupported) -> None:
    """Raises ValueError where the output for the same images is not the same."""
    first, second = (network.run(network.samples[:2]) for _ in range(2))
    first, second = first.nan_to_num(), second.nan_to_num()
    if torch.allclose(first, second, rtol=1e-3, atol=1e-3 * float(first.abs().max())):
        return
    training = any(module.training for module in network.model.modules())
    advice = "call model.eval()" if training else "switch it off outside of training, as F.dropout(x, p, self.training)"
    raise ValueError(
        f"the model gives another output for the same input each time ({reason}), so that there is nothing to sample "
        f"from or to check: {advice}"
    )


def check_causality(
    model: nn.Module,
    shape: Sequence[int],
    *,
    channels_ordered: bool = False,
    encode: Callable[[Tensor], Tensor] | None = None,
    condition: Any = None,
    levels: int = 2,
    output: Callable[[Any], Tensor] | None = None,
) -> CausalityReport:
    """Whether every output of a model depends only on pixels before it in raster order.

    The verdict comes from the network itself, for all inputs at once: from the zeros of its weights and from what each
    operation reads. If an operation may hide what it reads, or the model cannot be traced, levels of many images are
    changed instead, and the report says `proven=False`.

    Args:
        model: model(x (B, C, H, W)[, condition]) -> (B, ..., H, W), analysed as it is (training mode included).
        shape: (C, H, W).
        channels_ordered: whether a channel may depend on the channels before it in its own pixel; its output may then
            have the channels on an axis of their own, or in one with the levels, contiguous or interleaved.
        encode: int64 levels 0..levels-1 -> the model's input; None: the model is given random floats in [-1, 1].
        condition: as in `accelerate`.
        levels: number of levels that `encode` takes.
        output: what the model returns -> its parameters, as in `accelerate`.

    Returns:
        CausalityReport(ok, leaks, remark, proven): a leak names the output (c, i, j), the input (c, i, j), the first
        node, its module.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: the model's output has no place for each pixel, or is another one for the same input.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(channels_ordered, bool):
        raise TypeError(f"channels_ordered must be a bool, got {channels_ordered!r}")
    if encode is not None and not callable(encode):
        raise TypeError(f"encode must be callable or None, got {type(encode).__name__}")
    if output is not None and not callable(output):
        raise TypeError(f"output must be callable or None, got {type(output).__name__}")
    shape, levels = checked_shape(shape), checked_count("levels", levels, 1)
    model = Adapter(model, shape, None, output)
    condition = None if condition is None else example(condition, device_of(model))
    network = Network(model, shape, encode or torch.clone, condition, None if encode is None else levels)
    if len(network.output_shape) < 3 or network.output_shape[-2:] != shape[1:]:
        raise ValueError(f"model must return (B, ..., {shape[1]}, {shape[2]}), got the shape {network.output_shape}")
    params = (1, *network.output_shape[1:-2])
    candidates = possible_draws(shape, possible_layouts(params, shape[0]), params)
    candidates = candidates[1:] if channels_ordered and shape[0] > 1 else candidates[:1]
    try:
        graph, _ = network.graph()
    except Unsupported as reason:
        return _tried(network, candidates, reason)
    by_draws = [(ready_times(graph, one.of_levels()), one) for one in candidates]
    leaks = [leaks_of(timed, one, model) for timed, one in by_draws]
    if not all(leaks):
        return CausalityReport(True)
    certain = [leaks_of(ready_times(graph, one.of_levels(), timed), one, model) for timed, one in by_draws]
    if all(certain):

        def output_ready(draw_index: Tensor) -> Tensor:
            return ready_times(graph, draw_index).output_ready()

        unknown = torch.zeros((len(candidates[0]), len(candidates[0])), dtype=torch.bool)
        elsewhere = any(search(output_ready, one, unknown).draws is not None for one in candidates)
        remark = "it is causal in another order of its draws, in which accelerate() draws it" if elsewhere else ""
        return CausalityReport(False, min(leaks, key=len), remark)
    return _tried(network, candidates, Unsupported(f"leaks that may cancel: {min(leaks, key=len)[0]}", graph))


def _tried(network: Network, candidates: Sequence[Draws], reason: Unsupported) -> CausalityReport:
    """The verdict of trials."""
    _check_not_random(network, reason)
    moved, trials = dependences_of_ends(network), 1
    if not all(leaks_seen(moved, one, network.model) for one in candidates):
        moved, trials = dependences(network)
    return _seen(network, candidates, reason, moved, trials)
