"""Where a model is not causal, for people: `Leak`, `CausalityReport`, `NotCausalError`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.sampling.causality.draws import Draws
from fastgen.sampling.causality.ready_times import Timed, path_to_input
from fastgen.sampling.trace.element_times import compact

TRAINING_HINT = "the model is in training mode: call model.eval() first"
SHIFT_HINT = (
    "outputs that are of the next token, as those of language models are, need "
    "encode=fastgen.shift_right(start), which gives the model the tokens before each"
)
BATCH_HINT = "the module takes the mean and the variance of its batch, in eval mode, too: it keeps no statistics"
MOST_LEAKS = 16
_OF_ALL_FEATURES = ("native_layer_norm", "mean", "sum", "var", "amax", "_softmax")  # of a pixel, or of more
_OF_ONE_PIXEL = ("embedding", "mm", "addmm", "native_layer_norm")  # operators that mostly mix features alone


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
    """Whether the model is causal.

    Attributes:
        ok: no leak was found.
        leaks: one for each output position, at most 16.
        remark: how the verdict was reached, if not by ready times alone.
        proven: whether it holds for all inputs. False where ready times, an upper bound, show leaks that may cancel, or
            where the model could not be traced, and trials have shown none.
    """

    ok: bool
    leaks: list[Leak] = field(default_factory=list)
    remark: str = ""
    proven: bool = True

    def __str__(self) -> str:
        remark = f" ({self.remark})" if self.remark else ""
        if self.ok:
            return ("causal" if self.proven else "causal as far as trials show, not proven") + remark
        return "not causal: " + "; ".join(map(str, self.leaks[:3])) + remark


class NotCausalError(ValueError):
    """A parameter depends on a level that is drawn at the same time or later; `report` says where."""

    def __init__(self, report: CausalityReport) -> None:
        super().__init__(str(report))
        self.report = report


def leaks_of(timed: Timed, draws: Draws, model: nn.Module) -> list[Leak]:
    """The leaks that ready times show, one for each output position."""
    modules = dict(model.named_modules())
    draw_index, needed = draws.of_levels(), draws.of_outputs()
    late = timed.output_ready() >= needed
    found: list[Leak] = []
    if not late.any():
        return found
    by_pixel = late.reshape(-1, *late.shape[-2:]).any(0)
    for i, j in torch.nonzero(by_pixel)[:MOST_LEAKS].tolist():
        here = late[..., i, j]
        first = tuple(torch.nonzero(here)[0].tolist())
        element = (*first, i, j)
        path = path_to_input(timed, timed.graph.output, element)
        node, module = _first_to_see(timed, path, draw_index, int(needed[element]))
        value, place = path[-1]
        source = (int(place[-3]), int(place[-2]), int(place[-1])) if value.kind == "levels" else (0, i, j)
        on_path = [modules[one.module] for one, _ in path if one.module in modules]
        hint = hint_for(on_path) or _shift_hint(draws, source, i, j)
        found.append(Leak((_channel(draws, here), i, j), source, node, module, hint))
    return found


def leaks_seen(moved: Tensor, draws: Draws, model: nn.Module) -> list[Leak]:
    """The leaks among the changes of outputs with levels that were seen, (C*H*W, *output of one image)."""
    needed, draw_index = draws.of_outputs()[0], draws.of_levels()
    late = moved & (draw_index.view(-1, *[1] * needed.dim()) >= needed)
    hint = hint_for(model.modules())
    found: dict[tuple[int, int], Leak] = {}
    for place in torch.nonzero(late).tolist():
        i, j = place[-2:]
        if (i, j) not in found:
            c, row, column = (int(k) for k in torch.unravel_index(torch.tensor(place[0]), draws.shape))
            channel = _channel(draws, late[(place[0], ..., i, j)].unsqueeze(0))
            source = c, row, column
            found[i, j] = Leak((channel, i, j), source, "model", "", hint or _shift_hint(draws, source, i, j))
        if len(found) == MOST_LEAKS:
            break
    return list(found.values())


def _channel(draws: Draws, late: Tensor) -> int:
    """Of an output at which `late` (1, ...) holds: its channel, or the number of the parameter of a whole pixel."""
    by_channel = len(draws) > draws.shape[1] * draws.shape[2]
    return int(draws.channel_of[late][0]) if by_channel else int(torch.nonzero(late.reshape(-1))[0])


def hint_for(modules: Iterable[nn.Module]) -> str:
    """What to do where one of these modules takes statistics of the batch, or draws, as in training."""
    kinds = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)
    found = [one for one in modules if isinstance(one, kinds)]
    if any(one.training for one in found):
        return TRAINING_HINT
    of_batch = (one for one in found if isinstance(one, nn.modules.batchnorm._BatchNorm))
    return BATCH_HINT if any(one.running_mean is None for one in of_batch) else ""


def _shift_hint(draws: Draws, source: tuple[int, int, int], i: int, j: int) -> str:
    """For a sequence whose output at a place reads the token there, and none after it."""
    return SHIFT_HINT if draws.shape[:2] == (1, 1) and source[1:] == (i, j) else ""


def _first_to_see(timed: Timed, path: list[Any], draw_index: Tensor, needed: int) -> tuple[str, str]:
    """The operation after which all on the way to the output knows more than its own pixel may: no level of a later
    pixel, and, where the output sees its own level, not that of its own pixel.

    Where there is none (one colour sees another of its pixel), the first that belongs to no pixel or mixes all features
    and knows more than was `needed`, else the first that mixes pixels, else the first.
    """
    first = mixing = culprit = among_colours = None
    fine = False  # from here on to the input
    sees_itself = int(timed.analysis.ready_of(path[0][0])[path[0][1]]) == needed
    for value, place in path:
        if value.kind != "computed":
            continue
        times = timed.analysis.ready_of(value)
        own, ready = _draw_of_pixel(times, place, draw_index), int(times[place])
        fine = fine or (own is not None and ready <= own - sees_itself)
        if torch.Tag.pointwise in value.op.tags or value.op_name == "_to_copy":
            continue
        operation = value.name.split(" in ")[0]
        first = ("moved elements" if operation == "clone" else operation, value.module)
        pads = operation == "clone" and own is None  # what comes after it puts elements where they are too early
        if not fine and (culprit is None or not pads):
            culprit = first
        if ready > needed and (own is None or value.op_name in _OF_ALL_FEATURES):
            among_colours = first
        mixing = mixing if value.op_name in _OF_ONE_PIXEL else first
    return (culprit if fine else None) or among_colours or mixing or first or (path[0][0].name, path[0][0].module)


def _draw_of_pixel(ready: Tensor, place: Sequence[int], draw_index: Tensor) -> int | None:
    """The last draw of the pixel that an element belongs to; None where that is not known.

    Args:
        ready: ready times of the value, of a map (..., H, W) or (..., H, W, features), or with one dimension of H*W.
        place: of the element.
        draw_index: of the levels.
    """
    of_pixels, shape = draw_index[0].amax(0), compact(ready).shape  # features of a pixel are mostly ready at one time
    maps = [k for k in range(len(shape) - 1) if shape[k : k + 2] == of_pixels.shape and 1 not in of_pixels.shape]
    if maps:
        return int(of_pixels[place[maps[-1]], place[maps[-1] + 1]])
    flat = [k for k, size in enumerate(shape) if size == of_pixels.numel()]
    return int(of_pixels.flatten()[place[flat[0]]]) if len(flat) == 1 else None
