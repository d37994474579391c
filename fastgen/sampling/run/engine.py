"""The engine: draws a batch with a player, then makes sure that its images are those of the model's own passes."""

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
from fastgen.sampling.run.cpu_player import CPUPlayer, images_at_once
from fastgen.sampling.run.cuda_graph_player import CudaGraphPlayer
from fastgen.sampling.run.draw_loop import Player, at_places, draw_batch, from_places
from fastgen.sampling.run.torch_player import TorchPlayer
from fastgen.sampling.trace.graph import Unsupported
from fastgen.sampling.whole_pass import FixedPoint, whole_pass

__all__ = ["Engine", "Unsupported", "build_engine"]

PLAYERS: dict[str, Callable[..., Player]] = {"eager": TorchPlayer, "compiled": CPUPlayer, "cuda_graph": CudaGraphPlayer}
# Times the largest difference between the engine's output and the model's own that was seen. `uncertain` takes that
# difference for every parameter at once, with the worst signs, so that little more is needed.
MARGIN = 1.5
SHIFT_MARGIN = 3.0  # times the greatest shift of a step between levels that was seen: these have both signs
MOST_CORRECTIONS = 20
MOST_PLAYERS = 3  # of other numbers of images, kept for the next batch


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
    loop up to the first level of an image that differs. Images with such a level are drawn on from there, the others
    are finished.
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
        self._players: dict[int, Player] = {}  # by number of images, the latest last

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
    def run(self, request: SampleRequest) -> SampleResult:
        try:
            return self._run(request)
        except BaseException:
            self._players.clear()  # a batch in the middle is of no use, and its memory may be what was missing
            raise

    def _run(self, request: SampleRequest) -> SampleResult:
        player = self._player(request.n, request.noise.device)
        bad = draw_batch(player, request)
        result = SampleResult(player.levels.clone(), None, bad)
        params = self._make_sure(request, result, player.params())
        if request.return_log_prob and result.log_prob is None:
            result.log_prob = image_log_prob(request.distribution, params, result.levels)
        if bool(result.bad):
            self._players.clear()  # what is NaN stays nowhere
        return result

    def _player(self, n: int, device: torch.device) -> Player:
        player = self._players.pop(n, None)
        if player is None:
            while len(self._players) >= MOST_PLAYERS:
                self._players.pop(next(iter(self._players)))
            player = PLAYERS[self.backend](self.plan, n, device)
        self._players[n] = player
        return player

    def _make_sure(self, request: SampleRequest, result: SampleResult, params: Tensor) -> Tensor:
        """Puts the levels of a batch right, drawn of the engine's `params`; returns the params of the right levels."""
        asked, asked_params, asked_levels = request, params, result.levels  # what no pass has confirmed yet
        for _ in range(MOST_CORRECTIONS):
            if self.error is not None and not self._unsure(asked, asked_params, asked_levels):
                return params
            truth = whole_pass(self.model, self.encode, result.levels, request.condition)
            result.passes += 1
            self._measure(request, params, truth, result)
            right = draw_image(request, truth)[0]
            wrong = at_places(self.plan, right != result.levels, torch.any)
            rows = torch.nonzero(wrong.any(1)).flatten()
            if len(rows) == 0:
                return params
            result.redrawn += len(rows)
            asked = self._from_first_wrong(request, right, wrong, rows)
            params = params.clone()  # from a player that may be the one to go on
            player = self._player(asked.n, params.device)
            result.bad = result.bad | draw_batch(player, asked)
            asked_params, asked_levels = player.params(), player.levels
            params[rows], result.levels[rows] = asked_params[: len(rows)], asked_levels[: len(rows)]
        settled = FixedPoint(self.model, self.shape, self.encode).run(replace(request, progress=None))
        result.levels, result.log_prob, result.bad = settled.levels, settled.log_prob, settled.bad
        result.passes += settled.passes
        return params

    def _from_first_wrong(self, request: SampleRequest, right: Tensor, wrong: Tensor, rows: Tensor) -> SampleRequest:
        """The request for some images with the levels up to and including the first wrong place known.

        The last image is repeated up to a power of two of them, so that few players serve all numbers of images.

        Args:
            right: (n, C, H, W), the draws of the model's own pass.
            wrong: (n, places), where they are others than the engine's.
            rows: numbers of the images.
        """
        size = min(request.n, 1 << (len(rows) - 1).bit_length())
        rows = torch.cat((rows, rows[-1:].expand(size - len(rows))))
        first = wrong[rows].int().argmax(1, keepdim=True)
        places = torch.arange(wrong.shape[1], device=wrong.device) <= first
        mask = from_places(self.plan, places, self.shape)
        part = request.of(rows)
        if part.known_mask is not None:
            mask = mask | part.known_mask
        known = right[rows].masked_fill(~mask, 0)
        return replace(part, known=known, known_mask=mask, progress=None)

    def _measure(self, request: SampleRequest, params: Tensor, truth: Tensor, result: SampleResult) -> None:
        """Notes how far the engine's output is from the model's, over all batches and in `result`."""
        error = float((truth.double() - params.double()).abs().nan_to_num(0, posinf=0).max())
        result.error = max(error, result.error or 0.0)
        if self.error is None or error > self.error:
            self.error = max(error, 1e-12)
            scale = float(truth.double().abs().nan_to_num(0, posinf=0).max())
            if self.error > 1e-3 * scale + 1e-9 and not self.plan.computes_in_half:
                warnings.warn(
                    f"the engine's output differs from the model's by {self.error:.1e}, more than rounding: please "
                    "report this model; the images are right, but took more passes than they should",
                    stacklevel=2,
                )
        shift = greatest_shift(request, params, truth)
        if shift is not None:
            key = repr(request.distribution)
            self._shifts[key] = max(self._shifts.get(key, 1e-12), shift)

    def _unsure(self, request: SampleRequest, params: Tensor, levels: Tensor) -> bool:
        assert self.error is not None
        shift = self._shifts.get(repr(request.distribution))
        return uncertain_image(request, params, levels, MARGIN * self.error, shift and SHIFT_MARGIN * shift)
