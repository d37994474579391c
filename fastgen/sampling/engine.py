"""Plays a plan: draws a place, runs the step that follows, and so on; then makes sure of the images."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastgen.distributions import Distribution
from fastgen.sampling.arguments import levels_of
from fastgen.sampling.draw import draw_channel, draw_image, image_log_prob, uncertain_image
from fastgen.sampling.fixed_point import FixedPoint
from fastgen.sampling.graph import CONSTANT, Unsupported
from fastgen.sampling.job import Drawn, Job
from fastgen.sampling.naive import whole_pass
from fastgen.sampling.plan import Plan, make_plan
from fastgen.sampling.program import Memory

__all__ = ["Engine", "Unsupported", "build_engine"]

MARGIN = 4.0  # times the largest difference between the engine's output and the model's own that was seen
MOST_CORRECTIONS = 20


def build_engine(
    model: nn.Module,
    shape: tuple[int, int, int],
    distribution: Distribution,
    encode: Callable[[Tensor], Tensor],
    condition: Any,
    backend: str,
) -> "Engine":
    """The engine of a causal model.

    Raises:
        NotCausalError: the model is not causal in any order.
        Unsupported: the engine cannot take the model; the text says why.
    """
    plan = make_plan(model, shape, distribution, encode, condition, levels_of(distribution) or 2)
    return Engine(model, shape, encode, plan)


class Engine:
    """Every activation is computed once an image. The images are those of the model's own passes, to the last level.

    The engine sums in another order than the model, so that its output differs by rounding. Where that could have
    changed a draw, one whole pass of the model over the finished batch decides: its draws are those of the naive
    loop up to the first level that differs, which is put right, and the steps after it run again.
    """

    def __init__(
        self, model: nn.Module, shape: tuple[int, int, int], encode: Callable[[Tensor], Tensor], plan: Plan
    ) -> None:
        self.model = model
        self.shape = shape
        self.encode = encode
        self.plan = plan
        self.error: float | None = None
        self._runs: dict[int, _Run] = {}

    @property
    def work_ratio(self) -> float:
        return self.plan.work_ratio

    def explain(self) -> str:
        plan = self.plan
        margin = "not measured yet" if self.error is None else f"{MARGIN * self.error:.1e}"
        lines = [
            f"eager: {len(plan.timed.computed)} operations, {len(plan.order)} draws, {len(plan.programs)} programs for "
            f"{len(plan.steps)} steps, work ratio {plan.work_ratio:.3f}",
            "weights that are exactly zero are taken as masked; another pattern of zeros makes another schedule",
            f"draws that an error of {margin} in a parameter could change are decided by a whole pass of the model",
        ]
        return "\n".join([*lines, *plan.remarks])

    @torch.no_grad()
    def run(self, job: Job) -> Drawn:
        run = self._runs.get(job.n)
        if run is None:
            self._runs.clear()  # memory of another batch size
            run = self._runs[job.n] = _Run(self.plan, job.n, job.noise.device)
        run.begin(job)
        bad = run.draw_from(job, 0)
        passes = 0
        for correction in range(MOST_CORRECTIONS + 1):
            params = run.params()
            if self.error is not None and not self._unsure(job, params, run.levels):
                break
            truth = whole_pass(self.model, self.encode, run.levels, job.condition)
            passes += 1
            difference = (truth.double() - params.double()).abs()
            error = float(difference[difference.isfinite()].max()) if difference.isfinite().any() else 0.0
            if self.error is None or error > self.error:
                self.error = max(error, 1e-12)
            first = run.correct(job, draw_image(job, truth)[0])
            if first is None:
                break
            if correction == MOST_CORRECTIONS:
                found = FixedPoint(self.model, self.shape, self.encode).run(job)
                found.passes += passes
                return found
            bad = bad | run.draw_from(job, first)
        levels = run.levels.clone()
        log_prob = image_log_prob(job.distribution, run.params(), levels) if job.return_log_prob else None
        if bool(bad):
            self._runs.clear()  # what is NaN stays nowhere
        return Drawn(levels, log_prob, bad, passes)

    def _unsure(self, job: Job, params: Tensor, levels: Tensor) -> bool:
        assert self.error is not None
        return uncertain_image(job, params, levels, MARGIN * self.error)


class _Run:
    """The memory of a batch of n images, and the programs bound to it."""

    def __init__(self, plan: Plan, n: int, device: torch.device) -> None:
        self.plan = plan
        self.n = n
        self.device = device
        self.blocks: dict[int, Tensor] = {}
        self._keep: list[Memory] = []
        self.programs = [program.bind(n, self.block, self.on_device) for program in plan.programs]
        self.steps = [
            (self.programs[number], [self.on_device(one) for one in offsets]) for number, offsets in plan.steps
        ]
        for value in plan.timed.graph.values:
            if value.kind == "computed" and value.index in plan.storage.stored:
                times = plan.timed.graph.of(plan.schedule.times, value)
                if (times == CONSTANT).any():
                    inner = plan.storage.layouts[value.index].inner(self.block(plan.storage.memory(value)))
                    inner.copy_(torch.where(times == CONSTANT, value.data, 0).to(device))
        self._levels = plan.storage.layouts[plan.levels.index].inner(self.block(plan.storage.memory(plan.levels)))
        self.levels = self._levels[:, 0]
        view = plan.output.map
        assert view is not None
        strides, origin = plan.storage.strides(view.value)
        memory = self.block(plan.storage.memory(view.value))
        if view.value.kind == "constant":
            memory = memory.expand(n, -1)
        along = [sum(s * t for s, t in zip(step, strides, strict=True)) for step in view.steps]
        offset = origin + sum(s * t for s, t in zip(view.start, strides, strict=True))
        self._params = memory.as_strided((n, *view.shape), (memory.stride(0), *along), offset)[:, 0]

    def block(self, memory: Memory) -> Tensor:
        if id(memory) not in self.blocks:
            self._keep.append(memory)
            if memory.data is not None:
                self.blocks[id(memory)] = memory.data.to(self.device).view(1, -1)
            else:
                self.blocks[id(memory)] = torch.zeros((self.n, memory.numel), dtype=memory.dtype, device=self.device)
        return self.blocks[id(memory)]

    def on_device(self, one: Any) -> Any:
        return one.to(self.device) if isinstance(one, Tensor) and one.device != self.device else one

    def params(self) -> Tensor:
        """The model's output for what has been drawn, (n, ..., H, W), a view."""
        return self._params

    def begin(self, job: Job) -> None:
        """Takes the condition, forgets the levels, computes what depends on no pixel."""
        self.forced = job.known_mask.clone() if job.known_mask is not None else None
        self.given = job.known.clone() if job.known is not None else None
        self._levels.zero_()
        leaves = [leaf for leaf in tree_leaves(job.condition) if isinstance(leaf, Tensor) and leaf.dim()]
        for value, leaf in zip(self.plan.leaves, leaves, strict=True):
            memory = self.block(self.plan.storage.memory(value))
            self.plan.storage.layouts[value.index].inner(memory).copy_(leaf.view(self.n, *value.shape))
        program, offsets = self.steps[0]
        program(offsets)

    def draw_from(self, job: Job, first: int) -> Tensor:
        """Draws from one place on; returns whether parameters were NaN."""
        bad = torch.zeros((), dtype=torch.bool, device=self.device)
        to_draw = None if self.forced is None else (~self.forced).any(0).tolist()
        levels, channels = self.levels, self.shape_channels
        for place in range(first, len(self.plan.order)):
            c, i, j = self.plan.order[place]
            for channel in channels if self.plan.whole_pixels else (c,):
                given = None if self.given is None else self.given[:, channel, i, j]
                forced = None if self.forced is None else self.forced[:, channel, i, j]
                if to_draw is not None and given is not None and not to_draw[channel][i][j]:
                    levels[:, channel, i, j] = given
                    continue
                drawn, nan = draw_channel(
                    job.distribution,
                    self._params[..., i, j],
                    job.noise[..., i, j],
                    channel,
                    levels[:, :channel, i, j],
                    given,
                    forced,
                )
                levels[:, channel, i, j] = drawn
                bad |= nan
            program, offsets = self.steps[place + 1]
            program(offsets)
            if job.progress is not None and first == 0:
                job.progress(len(channels) if self.plan.whole_pixels else 1)
        return bad

    @property
    def shape_channels(self) -> range:
        return range(self.plan.levels.shape[1])

    def correct(self, job: Job, truth: Tensor) -> int | None:
        """Puts the first wrong level of each image right; the place to go on from, None where all are right."""
        index = torch.tensor(self.plan.order, device=self.device)
        wrong = self.levels != truth
        if not bool(wrong.any()):
            return None
        if self.plan.whole_pixels:
            by_place = wrong.any(1)[:, index[:, 1], index[:, 2]]
        else:
            by_place = wrong[:, index[:, 0], index[:, 1], index[:, 2]]
        if self.forced is None or self.given is None:
            self.forced, self.given = torch.zeros_like(wrong), torch.zeros_like(self.levels)
        firsts = []
        for b in torch.nonzero(by_place.any(1)).flatten().tolist():
            place = int(torch.nonzero(by_place[b])[0])
            c, i, j = self.plan.order[place]
            at = slice(None) if self.plan.whole_pixels else slice(c, c + 1)
            self.given[b, at, i, j] = truth[b, at, i, j]
            self.forced[b, at, i, j] = True
            firsts.append(place)
        return min(firsts)
