"""Plays a plan: draws a place, runs the step that follows, and so on; then makes sure of the images."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.distributions import Distribution
from fastgen.sampling.draws import draw_image, greatest_shift, image_log_prob, uncertain_image
from fastgen.sampling.machine.cpu.build import NoMachine, machine
from fastgen.sampling.plan.plan import Plan, make_plan
from fastgen.sampling.request import SampleRequest, SampleResult, levels_of
from fastgen.sampling.run.cpu_player import CompiledRun, images_at_once
from fastgen.sampling.run.cuda_graph_player import GraphRun
from fastgen.sampling.run.torch_player import Run
from fastgen.sampling.trace.graph import Unsupported
from fastgen.sampling.whole_pass import FixedPoint, whole_pass

__all__ = ["Engine", "Unsupported", "build_engine"]

RUNS = {"eager": Run, "compiled": CompiledRun, "cuda_graph": GraphRun}
# Times the largest difference between the engine's output and the model's own that was seen. `uncertain` takes that
# difference for every parameter at once, with the worst signs, so that little more is needed.
MARGIN = 1.5
SHIFT_MARGIN = 3.0  # times the greatest shift of a step between levels that was seen: these have both signs
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
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    best, why = _best(plan, device)
    possible = {"eager", "cuda_graph"} if device.type == "cuda" else {"eager", best}
    chosen = backend if backend in possible else best
    if backend == "auto":
        plan.remarks.append(f"auto: {why}")
    elif backend != chosen:
        reason = {"persistent": "there is no persistent kernel yet", "compiled": why}.get(
            backend, f"the model is on {device.type}"
        )
        warnings.warn(f"sampling falls back from the {backend} to the {chosen} backend: {reason}", stacklevel=6)
        plan.remarks.append(f"fallback: {chosen} instead of {backend}, because {reason}")
    return Engine(model, shape, encode, plan, chosen)


def _best(plan: Plan, device: torch.device) -> tuple[str, str]:
    """The quickest backend for a model, and why."""
    if device.type == "cuda":
        return "cuda_graph", "on a GPU cuda_graph, which spares the host a launch an operation"
    if plan.output_dtype != torch.float32:
        return "eager", f"eager, since the step machine computes in float32 and the model in {plan.output_dtype}"
    try:
        found = machine()
    except NoMachine as error:
        return "eager", f"eager, since {error}"
    return "compiled", f"on a CPU compiled: a step in machine code, {found.built}"


class Engine:
    """Every activation is computed once an image. The images are those of the model's own passes, to the last level.

    The engine sums in another order than the model, so that its output differs by rounding. Where that could have
    changed a draw, one whole pass of the model over the finished batch decides: its draws are those of the naive
    loop up to the first level that differs, which is put right, and the steps after it run again.
    """

    def __init__(
        self,
        model: nn.Module,
        shape: tuple[int, int, int],
        encode: Callable[[Tensor], Tensor],
        plan: Plan,
        backend: str,
    ) -> None:
        self.model = model
        self.shape = shape
        self.encode = encode
        self.plan = plan
        self.backend = backend
        self.error: float | None = None
        self._shifts: dict[str, float] = {}  # by distribution, options included
        self.most = images_at_once(plan) if backend == "compiled" else None
        self._runs: dict[int, Run] = {}

    @property
    def work_ratio(self) -> float:
        return self.plan.work_ratio

    def explain(self) -> str:
        plan = self.plan
        margin = "not measured yet" if self.error is None else f"{MARGIN * self.error:.1e}"
        shift = max(self._shifts.values(), default=None)
        steps = "" if shift is None else f", or of {SHIFT_MARGIN * shift:.1e} in a cumulative probability,"
        lines = [
            f"{self.backend}: {len(plan.timed.computed)} operations, {len(plan.order)} draws, {len(plan.programs)} "
            f"programs for {len(plan.steps)} steps, work ratio {plan.work_ratio:.3f}",
            f"memory: {plan.bytes_of_image / 2**20:.2f} MiB an image",
            "weights that are exactly zero are taken as masked; another pattern of zeros makes another schedule",
            f"draws that an error of {margin} in a parameter{steps} could change are decided by a whole pass of the "
            "model",
        ]
        return "\n".join([*lines, *plan.remarks])

    @torch.no_grad()
    def run(self, job: SampleRequest) -> SampleResult:
        run = self._runs.get(job.n)
        if run is None:
            # Where large batches run in parts, the last of them is smaller.
            while len(self._runs) > (0 if self.most is None else 1):
                self._runs.pop(next(iter(self._runs)))
            run = self._runs[job.n] = RUNS[self.backend](self.plan, job.n, job.noise.device)
        run.begin(job)
        filled = run.fill_known()
        if filled and job.progress is not None:
            job.progress(filled * (self.shape[0] if self.plan.whole_pixels else 1))
        bad = run.draw_from(job, filled)
        passes = 0
        for correction in range(MOST_CORRECTIONS + 1):
            params = run.params()
            if self.error is not None and not self._unsure(job, params, run.levels):
                break
            truth = whole_pass(self.model, self.encode, run.levels, job.condition)
            passes += 1
            error = float((truth.double() - params.double()).abs().nan_to_num(0, posinf=0).max())
            if self.error is None or error > self.error:
                self.error = max(error, 1e-12)
                scale = float(truth.double().abs().nan_to_num(0, posinf=0).max())
                if self.error > 1e-3 * scale + 1e-9 and not self.plan.computes_in_half:
                    warnings.warn(
                        f"the engine's output differs from the model's by {self.error:.1e}, more than rounding: please "
                        "report this model; the images are right, but took more passes than they should",
                        stacklevel=2,
                    )
            shift = greatest_shift(job, params, truth)
            if shift is not None:
                key = repr(job.distribution)
                self._shifts[key] = max(self._shifts.get(key, 1e-12), shift)
            first = run.correct(job, draw_image(job, truth)[0])
            if first is None:
                break
            if correction == MOST_CORRECTIONS:
                found = FixedPoint(self.model, self.shape, self.encode).run(job)
                found.passes += passes
                return found
            bad = bad | run.draw_from(replace(job, progress=None), first)
        levels = run.levels.clone()
        log_prob = image_log_prob(job.distribution, run.params(), levels) if job.return_log_prob else None
        if bool(bad):
            self._runs.clear()  # what is NaN stays nowhere
        return SampleResult(levels, log_prob, bad, passes)

    def _unsure(self, job: SampleRequest, params: Tensor, levels: Tensor) -> bool:
        assert self.error is not None
        shift = self._shifts.get(repr(job.distribution))
        return uncertain_image(job, params, levels, MARGIN * self.error, shift and SHIFT_MARGIN * shift)
