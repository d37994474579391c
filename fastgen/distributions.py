"""Distributions of one pixel given the model's output there: draws by inverse CDF, and log-probabilities.

A distribution is any object with

    noise_shape(n, shape) -> the shape of the uniforms one batch of n images needs, (n, U, H, W)
    draw(params, noise, channel, previous) -> (n,) int64 levels of one channel
    log_prob(params, levels) -> (n,) nats

where, at one pixel, params (n, ...) is the model's output, noise (n, U) float32 the uniforms in [0, 1), channel
the channel to draw and previous (n, channel) the levels already drawn there. The three below accept any further
trailing dimensions (a whole image) as well, which is how an image is scored or checked in one call.
`tempered(temperature, top_k, top_p)`, where present, returns the distribution with these sampling options.
"""

from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

LAYOUTS = ("BKCHW", "BCKHW", "B(KC)HW", "B(CK)HW")
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
    if not (isinstance(temperature, (int, float)) and 0 <= temperature < float("inf")):
        raise ValueError(f"temperature must be a finite number >= 0, got {temperature!r}")
    if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"top_k must be an int >= 1 or None, got {top_k!r}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1] or None, got {top_p!r}")


def _first_exceeding(probabilities: Tensor, noise: Tensor) -> Tensor:
    """The smallest index on dim 1 whose cumulative probability exceeds the noise; never one of probability 0."""
    cumulative = probabilities.cumsum(1)
    index = (cumulative <= noise.unsqueeze(1) * cumulative[:, -1:]).sum(1)
    # Rounding may leave the noise at or above the last cumulative value: take the last possible level then.
    count = probabilities.shape[1]
    last_possible = count - 1 - (probabilities.flip(1) > 0).to(torch.uint8).argmax(1)
    return torch.minimum(index, last_possible)


def _sum_all_but_batch(values: Tensor) -> Tensor:
    return values.flatten(1).sum(1) if values.dim() > 1 else values


@dataclass(frozen=True)
class Categorical:
    """A softmax over `levels` for every channel of a pixel (van den Oord et al. 2016, section 3.4).

    Args:
        levels: number of levels K, at least 2.
        layout: where the model puts the K logits of the C channels: "BKCHW", "BCKHW", or one axis that
            holds both, "B(KC)HW" (channel fastest) or "B(CK)HW" (level fastest). With C = 1, a model that
            gives (B, K, H, W) fits either of the last two.
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
        if self.layout in ("BKCHW", "BCKHW"):
            axis = 1 if self.layout == "BKCHW" else 2
            if params.dim() < 3 or params.shape[axis] != self.levels:
                raise ValueError(f"params has the shape {tuple(params.shape)}; {expected}")
            return params if axis == 1 else params.transpose(1, 2)
        if params.dim() < 2 or params.shape[1] % self.levels:
            raise ValueError(f"params has the shape {tuple(params.shape)}; {expected}")
        if self.layout == "B(KC)HW":
            return params.unflatten(1, (self.levels, -1))
        return params.unflatten(1, (-1, self.levels)).transpose(1, 2)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Softmax over dim 1 in float64, after temperature, top-k and top-p."""
        logits = _precise(logits)
        if self.temperature == 0:
            return F.one_hot(logits.argmax(1), self.levels).movedim(-1, 1).to(logits.dtype)
        if self.temperature != 1:
            logits = logits / self.temperature
        if self.top_k is None and self.top_p is None:
            return logits.softmax(1)
        ranked, order = logits.softmax(1).sort(dim=1, descending=True, stable=True)
        kept = torch.ones_like(ranked, dtype=torch.bool)
        if self.top_k is not None:
            kept[:, self.top_k :] = False
        if self.top_p is not None:
            ranked = ranked * kept
            before = ranked.cumsum(1) - ranked
            kept &= before < self.top_p * ranked.sum(1, keepdim=True)
        return torch.zeros_like(ranked).scatter(1, order, ranked * kept)

    def draw(self, params: Tensor, noise: Tensor, channel: int, previous: Tensor) -> Tensor:
        logits = self.logits(params).select(2, channel)
        return _first_exceeding(self.probabilities(logits), noise[:, channel])

    def log_prob(self, params: Tensor, levels: Tensor) -> Tensor:
        log_probabilities = _precise(self.logits(params)).log_softmax(1)
        return _sum_all_but_batch(log_probabilities.gather(1, levels.unsqueeze(1)).squeeze(1))


@dataclass(frozen=True)
class Bernoulli:
    """One logit for every channel of a pixel; levels 0 and 1, 1 where noise >= 1 - sigmoid(logit)."""

    temperature: float = 1.0

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

    def noise_shape(self, n: int, shape: tuple[int, int, int]) -> tuple[int, ...]:
        channels, height, width = shape
        return (n, channels + 1, height, width)

    def tempered(self, temperature: float, top_k: int | None, top_p: float | None) -> "LogisticMixture":
        _check_options(temperature, top_k, top_p)
        if top_k is not None or top_p is not None:
            raise ValueError("top_k and top_p are not defined for LogisticMixture: use temperature")
        return replace(self, temperature=temperature)

    def _split(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Logits (n, M, ...), means and log-scales (n, C, M, ...), coefficients (n, 3, M, ...) or None."""
        m = self.n_mix
        if params.shape[1] not in (3 * m, 10 * m):
            raise ValueError(
                f"params has the shape {tuple(params.shape)}; expected {3 * m} (one channel) or {10 * m} (RGB) "
                f"parameters a pixel on dim 1 for n_mix = {m}"
            )
        channels = 1 if params.shape[1] == 3 * m else 3
        params = _precise(params)
        of_colour = params[:, m:].unflatten(1, (channels, -1, m))
        coefficients = of_colour[:, :, 2].tanh() if channels == 3 else None
        return params[:, :m], of_colour[:, :, 0], of_colour[:, :, 1].clamp(min=MIN_LOG_SCALE), coefficients

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
        logits, means, log_scales, coefficients = self._split(params)
        mean = self._mean(channel, means, coefficients, previous)
        if self.temperature == 0:
            component = logits.argmax(1, keepdim=True)
            x = mean.gather(1, component).squeeze(1)
        else:
            weights = (logits / self.temperature).softmax(1)
            component = _first_exceeding(weights, noise[:, 0]).unsqueeze(1)
            u = noise[:, channel + 1].to(mean.dtype)
            scale = log_scales[:, channel].gather(1, component).squeeze(1).exp() * self.temperature
            x = mean.gather(1, component).squeeze(1) + scale * (u.log() - (-u).log1p())
        return ((x.clamp(-1, 1) + 1) * 127.5).round().nan_to_num(0).long()

    def log_prob(self, params: Tensor, levels: Tensor) -> Tensor:
        """Exact: log(sigmoid(a) - sigmoid(b)) = logsigmoid(a) + logsigmoid(-b) + log(1 - exp(b - a))."""
        logits, means, log_scales, coefficients = self._split(params)
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
