"""Distributions of one pixel given the model's output there: draws by inverse CDF, and log-probabilities.

A distribution is any object with

    noise_shape(n, shape) -> the shape of the uniforms one batch of n images needs, (n, U, H, W)
    draw(params, noise, channel, previous) -> (n,) int64 levels of one channel
    log_prob(params, levels) -> (n,) nats

where, at one pixel, params (n, ...) is the model's output, noise (n, U) float32 the uniforms in [0, 1), channel
the channel to draw and previous (n, channel) the levels already drawn there. `log_prob` of the
three below accepts any further trailing dimensions (a whole image) as well, so that an image is scored in one call.

A distribution of real values (see `gaussian`) says so by `dtype`, a floating-point type, and draws values of it.
Four further methods are used where they are present:

    tempered(temperature, top_k, top_p) -> the distribution with these sampling options
    uncertain(params, noise, channel, previous, error) -> (n,) bool, True where an absolute error of at most `error`
        in every entry of params could change the level that `draw` gives for this noise; conservative
    steps(params, channel) -> (n, S) values of noise[:, channel] at which the level that `draw` gives changes, and
        nothing else in params matters; or None
    check_params(params, channels), which raises ValueError where the model's output at a pixel does not fit
"""

import math
import numbers
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

LAYOUTS = ("BKCHW", "BCKHW", "B(KC)HW", "B(CK)HW", "BTK", "BKT", "BHWK")
MIN_LOG_SCALE = -7.0  # PixelCNN++ (Salimans et al. 2017) bounds the log-scales from below here


@runtime_checkable
class Distribution(Protocol):
    """What `accelerate` asks of a distribution; see the module's docstring."""

    def noise_shape(self, n: int, shape: tuple[int, int, int]) -> tuple[int, ...]: ...

    def draw(self, params: Tensor, noise: Tensor, channel: int, previous: Tensor) -> Tensor: ...

    def log_prob(self, params: Tensor, levels: Tensor) -> Tensor: ...


def _precise(params: Tensor) -> Tensor:
    """float64 where the device has it: a draw then depends on the parameters, not on how they are summed."""
    return params.float() if params.device.type == "mps" else params.double()


def _check_options(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not (isinstance(temperature, numbers.Real) and 0 <= temperature < math.inf):
        raise ValueError(f"temperature must be a finite number >= 0, got {temperature!r}")
    if top_k is not None and (not isinstance(top_k, numbers.Integral) or isinstance(top_k, bool) or top_k < 1):
        raise ValueError(f"top_k must be an int >= 1 or None, got {top_k!r}")
    if top_p is not None and not (isinstance(top_p, numbers.Real) and 0 < top_p <= 1):
        raise ValueError(f"top_p must be in (0, 1] or None, got {top_p!r}")


def _softmax(logits: Tensor, temperature: float) -> Tensor:
    """Over dim 1. The greatest logit is taken off first, so that a small temperature does not overflow."""
    if temperature == 1:
        return logits.softmax(1)
    return ((logits - logits.amax(1, keepdim=True)) / temperature).softmax(1)


def _first_exceeding(probabilities: Tensor, noise: Tensor) -> Tensor:
    """The smallest index on dim 1 whose cumulative probability exceeds the noise; never one of probability 0."""
    cumulative = probabilities.movedim(1, -1).cumsum(-1)
    threshold = noise.unsqueeze(-1) * cumulative[..., -1:]
    index = torch.searchsorted(cumulative.contiguous(), threshold.contiguous(), right=True).squeeze(-1)
    # float32 noise is at most 1 - 2**-24: rounded in float32 or float64, the threshold stays below the last sum, and
    # only NaN exceeds nothing.
    return index.clamp(max=probabilities.shape[1] - 1)


def _bounds(share: Tensor, error: float) -> tuple[Tensor, Tensor]:
    """The least and the greatest probability (dim 1) that a set of levels can have instead of `share`, when every
    logit moves by at most `error`: the log-odds of the set then move by at most 2 * error. A little wider, for the
    rounding of sums."""
    share = share.clamp(max=1)
    shrink = math.exp(-2 * min(error, 300.0))
    slack = share.shape[1] * torch.finfo(share.dtype).eps
    low = share * shrink / (share * shrink + (1 - share))
    high = share / (share + (1 - share) * shrink)
    return low - slack, high + slack


def _near_a_step(probabilities: Tensor, noise: Tensor, error: float) -> Tensor:
    """Whether `_first_exceeding` could give another index when every logit moves by at most `error`."""
    cumulative = probabilities.cumsum(1)
    low, high = _bounds(cumulative[:, :-1] / cumulative[:, -1:], error)
    noise = noise.unsqueeze(1)
    return ((low <= noise) & (noise < high)).any(1)


def _close_leaders(logits: Tensor, error: float) -> Tensor:
    """Whether the index of the greatest logit could change when every logit moves by at most `error`."""
    if logits.shape[1] == 1:
        return torch.zeros_like(logits[:, 0], dtype=torch.bool)
    first, second = logits.topk(2, 1).values.unbind(1)
    return first - second <= 2 * error


def _sum_all_but_batch(values: Tensor) -> Tensor:
    return values.flatten(1).sum(1) if values.dim() > 1 else values


@dataclass(frozen=True)
class Categorical:
    """A softmax over `levels` for every channel of a pixel (van den Oord et al. 2016, section 3.4).

    Args:
        levels: number of levels K, at least 2.
        layout: where the model puts the K logits of the C channels: "BKCHW", "BCKHW", or one axis that
            holds both, "B(KC)HW" (channel fastest) or "B(CK)HW" (level fastest). With C = 1, a model that
            gives (B, K, H, W) fits either of the last two. Of sequences (B, T) "BTK" or "BKT", of grids (B, H, W)
            "BHWK"; at one place all three are (B, K).
    """

    levels: int
    layout: str = "BKCHW"
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.levels, int) or self.levels < 2:
            raise ValueError(f"levels must be an int >= 2, got {self.levels!r}")
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {LAYOUTS}, got {self.layout!r}")
        _check_options(self.temperature, self.top_k, self.top_p)

    def noise_shape(self, n: int, shape: tuple[int, int, int]) -> tuple[int, ...]:
        return (n, *shape)

    def tempered(self, temperature: float, top_k: int | None, top_p: float | None) -> "Categorical":
        return replace(self, temperature=temperature, top_k=top_k, top_p=top_p)

    def logits(self, params: Tensor) -> Tensor:
        """The model's output (n, ...) as (n, K, C, ...), a view.

        Raises:
            ValueError: the output has no axes of this layout.
        """
        expected = f"expected K = {self.levels} logits in the layout {self.layout}"
        if self.layout in ("BTK", "BKT", "BHWK"):
            axis = -1 if self.layout != "BKT" else 1
            if params.dim() not in (2, len(self.layout)) or params.shape[axis] != self.levels:
                raise ValueError(f"params has the shape {tuple(params.shape)}; {expected}")
            return params.movedim(axis, 1).unsqueeze(2)
        if self.layout in ("BKCHW", "BCKHW"):
            axis = 1 if self.layout == "BKCHW" else 2
            if params.dim() < 3 or params.shape[axis] != self.levels:
                raise ValueError(f"params has the shape {tuple(params.shape)}; {expected}")
            return params if axis == 1 else params.transpose(1, 2)
        if params.dim() < 2 or params.shape[1] % self.levels:
            raise ValueError(f"params has the shape {tuple(params.shape)}; {expected}")
        n, size, *rest = params.shape
        if self.layout == "B(KC)HW":
            return params.view(n, self.levels, size // self.levels, *rest)
        return params.view(n, size // self.levels, self.levels, *rest).transpose(1, 2)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Softmax over dim 1 in float64, after temperature, top-k and top-p."""
        logits = _precise(logits)
        if self.temperature == 0:
            return F.one_hot(logits.argmax(1), self.levels).movedim(-1, 1).to(logits.dtype)
        if self.top_k is None and self.top_p is None:
            return _softmax(logits, self.temperature)
        ranked, order = _softmax(logits, self.temperature).sort(dim=1, descending=True, stable=True)
        kept = torch.ones_like(ranked, dtype=torch.bool)
        if self.top_k is not None:
            kept[:, self.top_k :] = False
        if self.top_p is not None:
            ranked = ranked * kept
            sums = ranked.cumsum(1)  # the last is the sum of all, in one order everywhere
            kept &= sums - ranked < self.top_p * sums[:, -1:]
        return torch.zeros_like(ranked).scatter(1, order, ranked * kept)

    def draw(self, params: Tensor, noise: Tensor, channel: int, previous: Tensor) -> Tensor:
        logits = self.logits(params).select(2, channel)
        return _first_exceeding(self.probabilities(logits), noise[:, channel])

    def steps(self, params: Tensor, channel: int) -> Tensor | None:
        if self.temperature == 0 or self.top_k is not None or self.top_p is not None:
            return None  # the set of levels may change
        cumulative = self.probabilities(self.logits(params).select(2, channel)).cumsum(1)
        return cumulative[:, :-1] / cumulative[:, -1:]

    def uncertain(self, params: Tensor, noise: Tensor, channel: int, previous: Tensor, error: float) -> Tensor:
        logits = _precise(self.logits(params).select(2, channel))
        if self.temperature == 0:
            return _close_leaders(logits, error)
        error = error / self.temperature
        unsure = _near_a_step(self.probabilities(logits), noise[:, channel], error)
        if self.top_k is None and self.top_p is None:
            return unsure
        # The set of kept levels changes where two in the ranking about its end could swap, or where the number kept
        # by top_p could change.
        ranked = logits.sort(dim=1, descending=True).values / self.temperature
        swaps = ranked[:, :-1] - ranked[:, 1:] <= 2 * error + 1e-12
        count = self.levels if self.top_k is None else min(self.top_k, self.levels)
        if count < self.levels:
            unsure = unsure | swaps[:, count - 1]
        if self.top_p is not None and self.top_p < 1 and count > 1:
            share = ranked[:, :count].softmax(1).cumsum(1)[:, :-1]
            low, high = _bounds(share, error)
            last = (share < self.top_p).sum(1, keepdim=True)  # rank of the last level kept
            swaps = F.pad(swaps, (0, 1)).gather(1, last).squeeze(1)
            unsure = unsure | swaps | ((low < self.top_p) & (self.top_p <= high)).any(1)
        return unsure

    def check_params(self, params: Tensor, channels: int) -> None:
        found = self.logits(params).shape[2]
        if found != channels:
            raise ValueError(
                f"params has the shape {tuple(params.shape)}, logits of {found} channels in the layout {self.layout} "
                f"with {self.levels} levels; expected {channels} channels"
            )

    def log_prob(self, params: Tensor, levels: Tensor) -> Tensor:
        log_probabilities = _precise(self.logits(params)).log_softmax(1)
        if levels.dim() == log_probabilities.dim() - 2:
            levels = levels.unsqueeze(1)  # a sequence or a grid has no axis of channels
        return _sum_all_but_batch(log_probabilities.gather(1, levels.unsqueeze(1)).squeeze(1))


@dataclass(frozen=True)
class Bernoulli:
    """One logit for every channel of a pixel; levels 0 and 1, 1 where noise >= 1 - sigmoid(logit)."""

    temperature: float = 1.0

    def __post_init__(self) -> None:
        _check_options(self.temperature, None, None)

    def noise_shape(self, n: int, shape: tuple[int, int, int]) -> tuple[int, ...]:
        return (n, *shape)

    def tempered(self, temperature: float, top_k: int | None, top_p: float | None) -> "Bernoulli":
        _check_options(temperature, top_k, top_p)
        if top_k is not None or top_p is not None:
            raise ValueError("top_k and top_p are not defined for Bernoulli: use temperature")
        return replace(self, temperature=temperature)

    def draw(self, params: Tensor, noise: Tensor, channel: int, previous: Tensor) -> Tensor:
        logit = _precise(params[:, channel])
        if self.temperature == 0:
            return (logit > 0).long()
        return (noise[:, channel] >= torch.sigmoid(-logit / self.temperature)).long()

    def uncertain(self, params: Tensor, noise: Tensor, channel: int, previous: Tensor, error: float) -> Tensor:
        logit = _precise(params[:, channel])
        if self.temperature == 0:
            return logit.abs() <= error
        u = noise[:, channel]
        slack = 4 * torch.finfo(logit.dtype).eps
        low = torch.sigmoid(-(logit + error) / self.temperature) - slack
        return (low <= u) & (u < torch.sigmoid(-(logit - error) / self.temperature) + slack)

    def check_params(self, params: Tensor, channels: int) -> None:
        if params.dim() < 2 or params.shape[1] != channels:
            raise ValueError(
                f"params has the shape {tuple(params.shape)}; expected a logit for each of {channels} channels on dim 1"
            )

    def log_prob(self, params: Tensor, levels: Tensor) -> Tensor:
        return _sum_all_but_batch(-F.softplus(_precise(params) * (1 - 2 * levels)))


@dataclass(frozen=True)
class LogisticMixture:
    """Discretized mixture of logistics over 256 levels (PixelCNN++, Salimans et al. 2017, equations 1-3).

    Parameters a pixel, M = n_mix: for RGB 10*M, in order M mixture logits, then for each colour M means,
    M log-scales (not below -7) and M coefficients (tanh; r->g, r->b, g->b); for one channel 3*M: M logits,
    M means, M log-scales. Levels 0..255 stand for -1..1. Of the C + 1 uniforms at a pixel the first chooses the
    component, the others are the channels' own.
    """

    n_mix: int = 10
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.n_mix, int) or self.n_mix < 1:
            raise ValueError(f"n_mix must be an int >= 1, got {self.n_mix!r}")
        _check_options(self.temperature, None, None)

    def noise_shape(self, n: int, shape: tuple[int, int, int]) -> tuple[int, ...]:
        channels, height, width = shape
        return (n, channels + 1, height, width)

    def tempered(self, temperature: float, top_k: int | None, top_p: float | None) -> "LogisticMixture":
        _check_options(temperature, top_k, top_p)
        if top_k is not None or top_p is not None:
            raise ValueError("top_k and top_p are not defined for LogisticMixture: use temperature")
        return replace(self, temperature=temperature)

    def _split(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (n, M, ...), and what each colour has, (n, C, 3, M, ...) for RGB and (n, 1, 2, M, ...) for one."""
        m = self.n_mix
        if params.dim() < 2 or params.shape[1] not in (3 * m, 10 * m):
            raise ValueError(
                f"params has the shape {tuple(params.shape)}; expected {3 * m} (one channel) or {10 * m} (RGB) "
                f"parameters a pixel on dim 1 for n_mix = {m}"
            )
        n, size, *rest = params.shape
        params = _precise(params)
        colours = (
            params[:, m:].reshape(n, 3, 3, m, *rest) if size == 10 * m else params[:, m:].reshape(n, 1, 2, m, *rest)
        )
        return params[:, :m], colours

    @staticmethod
    def _parts(colours: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Means and log-scales (n, C, M, ...), coefficients (n, 3, M, ...) or None."""
        coefficients = colours[:, :, 2].tanh() if colours.shape[2] == 3 else None
        return colours[:, :, 0], colours[:, :, 1].clamp(min=MIN_LOG_SCALE), coefficients

    @staticmethod
    def _mean(channel: int, means: Tensor, coefficients: Tensor | None, previous: Tensor) -> Tensor:
        """Component means (n, M, ...) of one channel given the levels of the channels before it."""
        mean = means[:, channel]
        if coefficients is None or channel == 0:
            return mean
        x = previous.to(mean.dtype).unsqueeze(2) / 127.5 - 1
        if channel == 1:
            return mean + coefficients[:, 0] * x[:, 0]
        return mean + coefficients[:, 1] * x[:, 0] + coefficients[:, 2] * x[:, 1]

    def draw(self, params: Tensor, noise: Tensor, channel: int, previous: Tensor) -> Tensor:
        mean, offset = self._chosen(params, noise, channel, previous)[:2]
        return self._level(mean + offset)

    def uncertain(self, params: Tensor, noise: Tensor, channel: int, previous: Tensor, error: float) -> Tensor:
        mean, offset, logits = self._chosen(params, noise, channel, previous)
        if self.temperature == 0:
            unsure = _close_leaders(logits, error)
        else:
            unsure = _near_a_step(_softmax(logits, self.temperature), noise[:, 0], error / self.temperature)
        # The mean moves by its own error and by those of its coefficients (the slope of tanh is at most 1) times the
        # colours before, a scale by a factor of at most exp(error).
        x = mean + offset
        moved = error * (1 + (previous.to(x.dtype) / 127.5 - 1).abs().sum(1)) + 1e-12
        moved = moved + offset.abs() * (math.expm1(min(error, 300.0)) + 1e-12)
        return unsure | (self._level(x - moved) != self._level(x + moved))

    def _chosen(self, params: Tensor, noise: Tensor, channel: int, previous: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the component that the first uniform chooses: its mean for the channel, (n,), and how far from it the
        channel's own uniform falls, (n,). Also the mixture's logits (n, M)."""
        logits, colours = self._split(params)
        if self.temperature == 0:
            component = logits.argmax(1)
        else:
            component = _first_exceeding(_softmax(logits, self.temperature), noise[:, 0])
        index = component.view(-1, 1, 1, 1).expand(-1, *colours.shape[1:3], 1)
        means, log_scales, coefficients = self._parts(colours.gather(3, index))
        mean = self._mean(channel, means, coefficients, previous)[:, 0]
        if self.temperature == 0:
            return mean, torch.zeros_like(mean), logits
        u = noise[:, channel + 1].to(mean.dtype)
        scale = log_scales[:, channel, 0].exp() * self.temperature
        return mean, scale * (u.log() - (-u).log1p()), logits

    @staticmethod
    def _level(x: Tensor) -> Tensor:
        return ((x.clamp(-1, 1) + 1) * 127.5).round().nan_to_num(0).long()

    def check_params(self, params: Tensor, channels: int) -> None:
        found = self._split(params)[1].shape[1]
        if found != channels:
            raise ValueError(
                f"params has the shape {tuple(params.shape)}, a mixture of n_mix = {self.n_mix} for {found} channels; "
                f"expected {channels} channels (1 or 3)"
            )

    def log_prob(self, params: Tensor, levels: Tensor) -> Tensor:
        """Exact: log(sigmoid(a) - sigmoid(b)) = logsigmoid(a) + logsigmoid(-b) + log(1 - exp(b - a))."""
        logits, colours = self._split(params)
        means, log_scales, coefficients = self._parts(colours)
        total: Any = logits.log_softmax(1)
        for channel in range(means.shape[1]):
            level = levels[:, channel].unsqueeze(1)
            centred = level / 127.5 - 1 - self._mean(channel, means, coefficients, levels[:, :channel])
            inverse_scale = (-log_scales[:, channel]).exp()
            upper = F.logsigmoid((centred + 1 / 255) * inverse_scale)
            lower = F.logsigmoid(-(centred - 1 / 255) * inverse_scale)
            inside = upper + lower + (-torch.expm1(-inverse_scale * 2 / 255)).log()
            total = total + torch.where(level == 0, upper, torch.where(level == 255, lower, inside))
        return _sum_all_but_batch(total.logsumexp(1))
