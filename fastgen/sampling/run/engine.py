"""Takes a plan and a request; gives images: a player draws them, whole passes of the model make sure of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from fastgen.distributions import Distribution
from fastgen.sampling.draws import draw_image, image_log_prob
from fastgen.sampling.levels import dtype_of, image_of
from fastgen.sampling.plan.plan import Plan, make_plan
from fastgen.sampling.request import Draw, SampleRequest, SampleResult, tell, uniforms
from fastgen.sampling.run.draw_loop import Player, at_places, decode_batch, draw_batch, from_places
from fastgen.sampling.run.margin import Margin
from fastgen.sampling.run.passes import Passes
from fastgen.sampling.run.players import best_backend, most_images, unfit_for_gpu_machine, way_to_play
from fastgen.sampling.trace.network import Network
from fastgen.sampling.whole_pass import FixedPoint

MOST_CORRECTIONS = 20
MOST_PLAYERS = 3  # of other numbers of images, kept for the next batch


def build_engine(network: Network, distribution: Distribution, backend: str, verify: str) -> "Engine":
    """The engine of a causal model; `backend` and `verify` are as in `accelerate`.

    Raises:
        NotCausalError: the model is not causal in any order.
        Unsupported: the engine cannot take the model; the text says why.
    """
    plan, device = make_plan(network, distribution), network.device
    best, why = best_backend(plan, device)
    unfit = unfit_for_gpu_machine(plan, device) if backend == "persistent" else ""
    chosen = backend if backend in ("eager", best) or (backend == "persistent" and not unfit) else best
    if backend == "auto":
        plan.remarks.append(f"auto: {why}")
    elif backend != chosen:
        reason = {"persistent": unfit, "compiled": why}.get(backend, f"the model is on {device.type}")
        tell(f"sampling falls back from the {backend} to the {chosen} backend: {reason}")
        plan.remarks.append(f"fallback: {chosen} instead of {backend}, because {reason}")
    return Engine(plan, distribution, chosen, verify)


class Engine:
    """Every activation is computed once an image. The images are those of the model's own passes, to the last level.

    The engine sums in another order than the model, so that its output differs by rounding. Where that could have
    changed a draw, a pass of the model over the finished images decides: its draws are those of the naive loop up to
    the first level of an image that differs. Images with such a level are drawn on from there, the others are
    finished.

    Args:
        plan: of the model.
        distribution, verify: as in `accelerate`.
        name: of the player, as `accelerate` takes it.
    """

    def __init__(self, plan: Plan, distribution: Distribution, name: str, verify: str) -> None:
        self.plan, self.network = plan, plan.network
        self.shape = plan.network.shape
        self.distribution = distribution
        self.name = name
        self.verify = verify
        self.most = most_images(name, plan, plan.network.device)
        self._way = way_to_play(name, plan, distribution, plan.network.device)
        self.margin = Margin(self._way.of_draws)
        self._passes = Passes(plan.network)
        self._launched: int | None = None  # of a kernel, for the images of `run`
        self._players: dict[int, Player] = {}  # by number of images, the latest last

    @property
    def half(self) -> bool:
        """Whether some of it is computed in half precision, where even two whole passes of the model may differ."""
        return self.plan.computes_in_half

    @property
    def real(self) -> bool:
        """Whether real values are drawn, each of which rounding changes in its last bits."""
        return dtype_of(self.distribution).is_floating_point

    @property
    def decidable(self) -> bool:
        """Whether whole passes of the model decide about single draws."""
        return not (self.half or self.real)

    @property
    def work_ratio(self) -> float:
        return self.plan.work_ratio

    def explain(self) -> str:
        plan = self.plan
        if self.verify == "always":
            sure = "after every batch whole passes of the model until no draw differs: the images of naive, guaranteed"
        elif self.verify == "never":
            sure = "no whole pass of the model: what rounding changes stays changed"
        elif not self.decidable:
            what = "half precision has no one truth" if self.half else "real values differ in their last bits"
            sure = f"{what}: images are drawn from this output, without a whole pass; by how much, the margin says"
        else:
            sure = (
                "a whole pass of the model decides about the first batch of each number of images, and where the "
                "margin, a measured one, could change a draw; later, if a trial finds the same bits, a pass over the "
                "half or the quarter of a batch with these images"
            )
        lines = [
            f"{self.name}: {len(plan.timed.computed)} operations, {len(plan.order)} draws, {len(plan.programs)} "
            f"programs for {len(plan.steps)} steps, work ratio {plan.work_ratio:.3f}",
            f"{plan.multiply_adds / 1e6:.6g} million multiply-adds an image in products",
            f"memory: {plan.bytes_of_image / 2**20:.2f} MiB an image",
            "weights that are exactly zero are taken as masked; another pattern of zeros makes another schedule",
            f"verify {self.verify}: {sure}",
            f"margin: {self.margin}",
        ]
        return "\n".join([*lines, *self._way.remarks, *plan.remarks])

    def takes_weights(self) -> bool:
        self._players.clear()
        self.margin = Margin(self._way.of_draws)
        return self.plan.renew()

    def run(self, request: SampleRequest) -> SampleResult:
        self.network.meet(request.condition)
        with self._all_or_nothing():
            self._launched = None
            levels, params, bad = self._draw(request, self._size(request.n))
            result = SampleResult(levels.clone(), None, bad)
            if self.real and self.verify == "always":
                self._settle(request, result, params)
            elif self.verify == "always" or (self.verify == "auto" and self.decidable):
                params = self._make_sure(request, result, params)
            if request.return_log_prob and result.log_prob is None:
                result.log_prob = image_log_prob(request.distribution, params, result.levels)
            result.launches = self._launched
            if bool(result.bad):
                self._players.clear()  # what is NaN stays nowhere
            return result

    def decode(self, draw: Draw, request: SampleRequest) -> tuple[Tensor, Tensor]:
        self.network.meet(request.condition)
        with self._all_or_nothing():
            player = self._player(request.n, request.noise.device)
            decode_batch(player, draw, request)
            return player.levels.clone(), player.params().to(self.plan.output_dtype, copy=True)

    def measure(self) -> None:
        """Measures the margin by a batch of two, where batches make no whole pass."""
        noise = uniforms(self.distribution.noise_shape(2, self.shape), 0, self.network.device)
        dtype = dtype_of(self.distribution)
        request = SampleRequest(2, self.shape, noise, self.distribution, condition=self.network.condition, dtype=dtype)
        with self._all_or_nothing():
            levels, params, _ = self._draw(request, 2)
            truth = self._passes.whole(request, levels)
            if self.real and not bool(truth.isfinite().all()):  # what is drawn of it, again and again, runs away
                levels = torch.special.ndtri(noise[:, -self.shape[0] :].clamp(min=2**-24)).to(dtype)
                params, truth = self.decode(image_of(levels), request)[1], self._passes.whole(request, levels)
            self.margin.measure(request, params, truth, self.half)

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._players.clear()  # a batch in the middle is of no use, and its memory may be what was missing
            raise

    def _draw(self, request: SampleRequest, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Levels, params and `bad` of a batch, the first two in the memory of a player for `size` images."""
        if size > request.n:  # the last image is drawn several times
            numbers = torch.arange(size, device=request.noise.device).clamp(max=request.n - 1)
            levels, params, bad = self._draw(request.of(numbers), size)
            return levels[: request.n], params[: request.n], bad
        player = self._player(size, request.noise.device)
        before = getattr(player, "launches", None)
        bad = draw_batch(player, request)
        if before is not None:
            self._launched = (self._launched or 0) + player.launches - before  # type: ignore[attr-defined]
        return player.levels, player.params().to(self.plan.output_dtype), bad

    def _size(self, n: int) -> int:
        """How many images to draw instead of n: where graphs were captured for a few more, they are replayed."""
        return (
            min((size for size in self._players if n <= size <= 2 * n), default=n) if self.name == "cuda_graph" else n
        )

    def _player(self, n: int, device: torch.device) -> Player:
        player = self._players.pop(n, None)
        if player is None:
            while len(self._players) >= MOST_PLAYERS:
                self._players.pop(next(iter(self._players)))
            latest = next(reversed(self._players.values()), None)
            player = latest.another(n) if latest else self._way.player(self.plan, n, device)
        self._players[n] = player
        return player

    def _make_sure(self, request: SampleRequest, result: SampleResult, params: Tensor) -> Tensor:
        """Puts the levels of a batch right, drawn of the engine's `params`; returns the params of the right levels."""
        asked = every = torch.arange(request.n, device=params.device)  # what no pass has confirmed yet
        for _ in range(MOST_CORRECTIONS):
            if self.verify == "always" or not self._passes.met(request.n):
                asked = every
            else:
                asked = asked[self.margin.unsure(request.of(asked), params[asked], result.levels[asked])]
                if len(asked) == 0:
                    return params
            seen, truth, passes = self._passes.of(request, result.levels, asked)
            some = request.of(seen)
            result.passes += passes
            result.error = max(self.margin.measure(some, params[seen], truth, self.half), result.error or 0.0)
            right = draw_image(some, truth)[0]
            wrong = at_places(self.plan, right != result.levels[seen], torch.any)
            rows = torch.nonzero(wrong.any(1)).flatten()
            if len(rows) == 0:
                return params
            result.redrawn += len(rows)
            again, asked = self._from_first_wrong(some.of(rows), right[rows], wrong[rows]), seen[rows]
            params = params.clone()  # of a player that may be the one to go on
            # Few sizes, so that few players serve all numbers of wrong images.
            size = self._size(request.n) if self.name == "cuda_graph" else 1 << (len(rows) - 1).bit_length()
            result.levels[asked], params[asked], bad = self._draw(again, min(size, max(request.n, len(rows))))
            result.bad = result.bad | bad
        self._settle(request, result, params)
        return params

    def _settle(self, request: SampleRequest, result: SampleResult, params: Tensor) -> None:
        """Whole passes of the model from the levels of a batch on, drawn of `params`, until no level changes."""
        truth = self._passes.whole(request, result.levels)
        result.error = max(self.margin.measure(request, params, truth, self.half), result.error or 0.0)
        begin = draw_image(request, truth)[0]
        if self.real:  # what a value that is not finite touches, even by a weight of zero, would never settle
            begin = begin.nan_to_num(0, 0, 0)
        with self.network.kept():
            whole = FixedPoint(self.network.model, self.shape, self.network.encode)
            settled = whole.run(replace(request, progress=None), begin)
        result.levels, result.log_prob, result.bad = settled.levels, settled.log_prob, settled.bad
        result.passes += 1 + settled.passes

    def _from_first_wrong(self, request: SampleRequest, right: Tensor, wrong: Tensor) -> SampleRequest:
        """The request with the levels up to and including the first wrong place of each image known.

        Args:
            right: (n, C, H, W), the draws of the model's own pass.
            wrong: (n, places), where they are others than the engine's.
        """
        first = wrong.int().argmax(1, keepdim=True)
        places = torch.arange(wrong.shape[1], device=wrong.device) <= first
        mask = from_places(self.plan, places, self.shape)
        if request.known_mask is not None:
            mask = mask | request.known_mask
        return replace(request, known=right.masked_fill(~mask, 0), known_mask=mask, progress=None)
