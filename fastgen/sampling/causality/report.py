"""Whether a model is causal: by ready times, and where those say no, by changing its input and looking."""

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.sampling.causality.ready_times import Timed, path_to_input, ready_times
from fastgen.sampling.model_state import unchanged
from fastgen.sampling.request import checked_shape
from fastgen.sampling.trace.graph import Unsupported
from fastgen.sampling.trace.recorder import trace

TRAINING_HINT = "the model is in training mode: call model.eval() first"
NOISE_FLOOR = 1e-6  # of the largest output: what a change of input may move by rounding alone
BATCH = 64
TRIALS = 3  # images whose levels are changed one by one: a dead ReLU hides what another image shows


@dataclass(frozen=True)
class Leak:
    """An output that depends on a level that is not drawn yet when the output is needed.

    Attributes:
        output: (c, i, j), the channel (or the index of the parameter among those of a pixel, where channels are not
            ordered), row and column of the output.
        input: (c, i, j) of the level that it depends on.
        node: the first operation on the way from that level to the output that sees too much.
        module: qualified name of the module that this operation belongs to; "" for the model itself.
        hint: what to do about it, where that is known.
    """

    output: tuple[int, int, int]
    input: tuple[int, int, int]
    node: str
    module: str
    hint: str = ""

    def __str__(self) -> str:
        where = f"{self.node} in module {self.module!r}" if self.module else self.node
        hint = f" ({self.hint})" if self.hint else ""
        return f"output {self.output} depends on input {self.input}, first at {where}{hint}"


@dataclass(frozen=True)
class CausalityReport:
    """Whether the model is causal, and the leaks found (one for each output position, at most 16)."""

    ok: bool
    leaks: list[Leak] = field(default_factory=list)
    remark: str = ""

    def __str__(self) -> str:
        if self.ok:
            return "causal" + (f" ({self.remark})" if self.remark else "")
        return "not causal: " + "; ".join(map(str, self.leaks[:3]))


class NotCausalError(ValueError):
    """A parameter depends on a level that is drawn at the same time or later; `report` says where."""

    def __init__(self, report: CausalityReport) -> None:
        super().__init__(str(report))
        self.report = report


Order = list[tuple[int, int, int]]


def raster(shape: Sequence[int], channels_ordered: bool) -> Order:
    """(channel, row, column) in raster order; all channels of a pixel at once, called channel 0, where not ordered."""
    channels = range(shape[0]) if channels_ordered else (0,)
    return [(c, i, j) for i in range(shape[1]) for j in range(shape[2]) for c in channels]


def places_of(order: Order, shape: Sequence[int]) -> Tensor:
    """Place of every level in the order, (1, C, H, W) int32."""
    places = torch.full((1, *shape), -1, dtype=torch.int32)
    index = torch.tensor(order)
    numbers = torch.arange(len(order), dtype=torch.int32)
    if len(order) == shape[1] * shape[2]:
        places[0, :, index[:, 1], index[:, 2]] = numbers
    else:
        places[0, index[:, 0], index[:, 1], index[:, 2]] = numbers
    return places


def draw_places(places: Tensor, channel_of: Tensor) -> Tensor:
    """Place at which each output element is needed first, of the output's shape (1, ..., H, W).

    Args:
        places: of the levels, (1, C, H, W).
        channel_of: for each parameter of a pixel, in the output's shape without the pixels, the first channel whose
            draw reads it.
    """
    _, _, height, width = places.shape
    return places[0][channel_of.reshape(-1)].view(1, *channel_of.shape[1:], height, width)


def leaks_of(timed: Timed, places: Tensor, needed: Tensor, channel_of: Tensor, model: nn.Module) -> list[Leak]:
    """The leaks that ready times show, one for each output position, at most 16."""
    modules = dict(model.named_modules())
    ready = timed.output_ready()
    late = ready >= needed
    found: list[Leak] = []
    if not late.any():
        return found
    by_pixel = late.reshape(-1, *late.shape[-2:]).any(0)
    for i, j in torch.nonzero(by_pixel)[:16].tolist():
        here = late[..., i, j]
        first = tuple(torch.nonzero(here)[0].tolist())
        element = (*first, i, j)
        path = path_to_input(timed, timed.graph.output, element)
        node, module = _first_to_see(timed, path, places, int(needed[element]))
        value, place = path[-1]
        source = (int(place[-3]), int(place[-2]), int(place[-1])) if value.kind == "levels" else (0, i, j)
        channels = places.shape[1]
        ordered = channels > 1 and bool((places[0, 0] != places[0, -1]).any())
        output = int(channel_of[first]) if ordered else int(torch.nonzero(here.reshape(-1))[0])
        on_path = [modules[one.module] for one, _ in path if one.module in modules]
        found.append(Leak((output, i, j), source, node, module, hint_for(on_path)))
    return found


def hint_for(modules: Iterable[nn.Module]) -> str:
    """What to do where one of these modules takes statistics of the batch, or draws, as in training."""
    kinds = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)
    return TRAINING_HINT if any(isinstance(one, kinds) and one.training for one in modules) else ""


def _first_to_see(timed: Timed, path: list[Any], places: Tensor, needed: int) -> tuple[str, str]:
    """The operation nearest to the input that knows more than its own position may; else the first that mixes."""
    height, width = places.shape[-2:]
    mixing = None
    for value, place in reversed(path):
        if value.kind != "computed":
            continue
        named = (value.name.split(" in ")[0], value.module)
        if mixing is None and torch.Tag.pointwise not in value.op.tags:
            mixing = named
        if len(value.shape) >= 3 and value.shape[-2:] == (height, width):
            own = int(places[0, :, place[-2], place[-1]].max())
            if int(timed.analysis.ready_of(value)[place]) > own:
                return named
        elif int(timed.analysis.ready_of(value)[place]) > needed and mixing is not None:
            return named
    return mixing or (path[0][0].name, path[0][0].module)


def dependencies(run: Callable[[Tensor], Tensor], levels: Tensor, other: Tensor) -> Tensor:
    """Which outputs change with which levels: bool (C*H*W, *output of one image). One changed level an image.

    Where an image's output depends on what else is in its batch (statistics of a batch), each changed image is run in
    a batch with itself alone.
    """
    base = run(torch.cat((levels, levels)))[:1]
    beside = run(torch.cat((levels, other)))[:1]
    alone = not torch.allclose(base, beside, rtol=1e-5, atol=1e-6, equal_nan=True)
    scale = base[base.isfinite()].abs().max().clamp(min=1e-30) if base.isfinite().any() else torch.tensor(1.0)
    count = levels.numel()
    parts = []
    size = 1 if alone else BATCH
    for first in range(0, count, size):
        numbers = torch.arange(first, min(first + size, count), device=levels.device)
        batch = levels.reshape(1, -1).repeat(len(numbers), 1)
        batch[torch.arange(len(numbers), device=levels.device), numbers] = other.reshape(-1)[numbers]
        # The unchanged image goes along, so that all are computed in the same way.
        companion = batch if alone else levels.reshape(1, -1)
        found = run(torch.cat((companion, batch)).view(-1, *levels.shape[1:]))
        before = base if alone else found[:1]
        moved = (found[1:] - before).abs() > NOISE_FLOOR * scale
        parts.append((moved | (found[1:].isnan() != before.isnan())).cpu())
    return torch.cat(parts)


def topological_order(depends: Tensor, order: Order) -> Order | None:
    """The order nearest to the given one in which every draw comes after what it depends on; None where none does.

    depends[a, b]: draw a depends on the level of draw b, both numbered as in `order`.
    """
    count = len(order)
    waiting = depends.sum(1).tolist()
    dependents = [torch.nonzero(depends[:, b]).flatten().tolist() for b in range(count)]
    heap = [a for a in range(count) if waiting[a] == 0]
    heapq.heapify(heap)
    found = []
    while heap:
        b = heapq.heappop(heap)
        found.append(order[b])
        for a in dependents[b]:
            waiting[a] -= 1
            if waiting[a] == 0:
                heapq.heappush(heap, a)
    return found if len(found) == count else None


def check_causality(
    model: nn.Module,
    shape: Sequence[int],
    *,
    channels_ordered: bool = False,
    encode: Callable[[Tensor], Tensor] | None = None,
    condition: Any = None,
    levels: int = 2,
) -> CausalityReport:
    """Whether every output of a model depends only on pixels before it in raster order.

    Found from the network itself, for all inputs at once: which weights are exactly zero, and what each operation
    reads. That is an upper bound; where it finds a leak, the levels of a random image are changed one by one, and the
    leak counts if an output moves.

    Args:
        model: model(x (B, C, H, W)[, condition]) -> (B, ..., H, W), analysed as it is (training mode included).
        shape: (C, H, W).
        channels_ordered: whether a channel may depend on the channels before it in its own pixel; its output may then
            have the channels on an axis of their own, or in one with the levels, contiguous or interleaved.
        encode: int64 levels 0..levels-1 -> the model's input; None: the model is given random floats in [-1, 1].
        condition: the model's second argument, None for none.
        levels: number of levels that `encode` takes.

    Returns:
        CausalityReport(ok, leaks): a leak names the output (c, i, j), the input (c, i, j), the first node, its module.

    Raises:
        ValueError: the model's output has no place for each pixel.
    """
    channels, height, width = checked_shape(shape)
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())

    def example() -> Tensor:
        if encode is not None:
            return torch.randint(levels, (1, channels, height, width), generator=generator).to(device)
        return (torch.rand((1, channels, height, width), generator=generator) * 2 - 1).to(dtype).to(device)

    def run(x: Tensor) -> Tensor:
        given = x if encode is None else encode(x)
        with torch.no_grad(), unchanged(model):
            return model(given) if condition is None else model(given, condition)

    x = example()
    try:
        run(torch.cat((x, x)))  # an error of the model itself stays what it is
        try:
            graph = trace(run, model, x)
        except Unsupported:
            raise
        except Exception:  # a batch of one is too small for some: its second image is a constant
            graph = trace(lambda levels: run(torch.cat((levels, x)))[:1], model, x)
        output = graph.output
    except Unsupported as reason:
        samples = [x, *(example() for _ in range(TRIALS))]
        return _by_changes(run, samples, channels_ordered, str(reason), hint_for(model.modules()))
    if len(output.shape) < 3 or output.shape[-2:] != (height, width):
        raise ValueError(f"model must return (B, ..., {height}, {width}), got the shape {output.shape}")
    order = raster(shape, channels_ordered)
    places = places_of(order, shape)
    timed = ready_times(graph, places)
    best: list[Leak] | None = None
    for channel_of in channel_layouts(output.shape[:-2], channels if channels_ordered else 1):
        needed = draw_places(places, channel_of)
        leaks = leaks_of(timed, places, needed, channel_of, model)
        if not leaks:
            return CausalityReport(True)
        if best is None or len(leaks) < len(best):
            best = leaks
    remark = "ready times are an upper bound"
    samples = [x, *(example() for _ in range(TRIALS))]
    checked = _by_changes(run, samples, channels_ordered, remark, hint_for(model.modules()))
    return checked if checked.ok else CausalityReport(False, best or checked.leaks)


def _by_changes(
    run: Callable[[Tensor], Tensor], samples: Sequence[Tensor], channels_ordered: bool, remark: str, hint: str
) -> CausalityReport:
    """By changing each level of each sample but the last, one by one, to that of the next sample."""
    x = samples[0]
    channels, height, width = x.shape[1:]
    changed: Tensor | None = None  # (inputs, ..., H, W)
    for sample, other in pairwise(samples):
        if sample.is_floating_point():
            other = torch.where((other - sample).abs() < 0.1, sample + 0.5, other)
        else:
            other = torch.where(other == sample, 1 - sample.clamp(max=1), other)
        found = dependencies(run, sample, other)
        changed = found if changed is None else changed | found
    assert changed is not None
    places = places_of(raster(x.shape[1:], channels_ordered), x.shape[1:]).cpu()
    sources = places.reshape(-1)
    best: list[Leak] | None = None
    for channel_of in channel_layouts((1, *changed.shape[1:-2]), channels if channels_ordered else 1):
        needed = draw_places(places, channel_of)
        late = changed & (sources.view(-1, *[1] * (changed.dim() - 1)) >= needed)
        if not late.any():
            return CausalityReport(True, [], f"by changing the input; {remark}")
        leaks = []
        for place in torch.nonzero(late)[:16].tolist():
            c, rest = divmod(place[0], height * width)
            channel = int(channel_of[(0, *place[1:-2])]) if channels_ordered else place[1]
            leaks.append(Leak((channel, *place[-2:]), (c, *divmod(rest, width)), "model", "", hint))
        if best is None or len(leaks) < len(best):
            best = leaks
    return CausalityReport(False, best or [])


def channel_layouts(shape: Sequence[int], channels: int) -> list[Tensor]:
    """Ways in which the parameters of a pixel, of this shape, may belong to channels: of its shape, int64."""
    if channels == 1:
        return [torch.zeros(tuple(shape), dtype=torch.long)]
    found = []
    numbers = torch.arange(channels)
    for d, size in enumerate(shape):
        if size == channels and d > 0:
            found.append(numbers.view([-1 if k == d else 1 for k in range(len(shape))]).expand(tuple(shape)))
    if not found and len(shape) > 1 and shape[1] % channels == 0:
        tail = [1] * (len(shape) - 2)
        for axis in (numbers.repeat_interleave(shape[1] // channels), numbers.repeat(shape[1] // channels)):
            found.append(axis.view(1, -1, *tail).expand(tuple(shape)))
    return found or [torch.zeros(tuple(shape), dtype=torch.long)]
