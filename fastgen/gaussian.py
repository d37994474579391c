"""Real-valued pixels: a Gaussian, or a mixture of them, given the model's output. Protocol as in `distributions`.

They set `dtype`: images are then of that type, and the model is given their values as they are (no levels to scale).
A uniform u in [0, 1) stands for the u-quantile; its step of 2**-24 ends the tails at about 5.4 standard deviations.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fastgen.distributions import _check_options, _first_exceeding, _precise, _softmax, _sum_all_but_batch

HALF_A_STEP = 2.0**-25  # of float32 uniforms: keeps quantiles finite


def _quantile(u: Tensor, mean: Tensor) -> Tensor:
    return torch.special.ndtri(u.to(mean.dtype) + HALF_A_STEP)


def _log_density(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    return -0.5 * (math.log(2 * math.pi) + log_variance + (x - mean).square() * (-log_variance).exp())


def _no_ranking(name: str, top_k: int | None, top_p: float | None) -> None:
    if top_k is not None or top_p is not None:
        raise ValueError(f"top_k and top_p are not defined for {name}: use temperature")


@dataclass(frozen=True)
class Gaussian:
    """Parameters a pixel (2C): C means, then C log-variances. Channels are independent given the parameters.

    `temperature` multiplies the standard deviations; 0 takes the mean.
    """

    temperature: float = 1.0
    dtype: ClassVar[torch.dtype] = torch.float32

    def __post_init__(self) -> None:
        _check_options(self.temperature, None, None)

    def noise_shape(self, n: int, shape: tuple[int, int, int]) -> tuple[int, ...]:
        return (n, *shape)

    def tempered(self, temperature: float, top_k: int | None, top_p: float | None) -> "Gaussian":
        _no_ranking("Gaussian", top_k, top_p)
        return replace(self, temperature=temperature)

    def draw(self, params: Tensor, noise: Tensor, channel: int, previous: Tensor) -> Tensor:
        mean, log_variance = _precise(params).chunk(2, 1)
        deviation = (0.5 * log_variance[:, channel]).exp() * self.temperature
        return (mean[:, channel] + deviation * _quantile(noise[:, channel], mean)).to(self.dtype)

    def check_params(self, params: Tensor, channels: int) -> None:
        if params.dim() < 2 or params.shape[1] != 2 * channels:
            raise ValueError(
                f"params has the shape {tuple(params.shape)}; expected {2 * channels} parameters on dim 1: the means "
                f"of {channels} channels, then their log-variances"
            )

    def log_prob(self, params: Tensor, levels: Tensor) -> Tensor:
        """Log-density in nats, (n,), of values (n, C, ...)."""
        mean, log_variance = _precise(params).chunk(2, 1)
        return _log_density(_precise(levels), mean, log_variance).flatten(1).sum(1)


@dataclass(frozen=True)
class GaussianMixture:
    """Of n_mix = M components with independent channels. Parameters a pixel (M + 2 * C * M): M mixture logits, then for
    each channel M means and M log-variances. Of the C + 1 uniforms at a pixel the first chooses the component.

    `temperature` divides the logits and multiplies the standard deviations; 0 takes the mean of the likeliest.
    """

    n_mix: int
    temperature: float = 1.0
    dtype: ClassVar[torch.dtype] = torch.float32

    def __post_init__(self) -> None:
        if not isinstance(self.n_mix, int) or self.n_mix < 1:
            raise ValueError(f"n_mix must be an int >= 1, got {self.n_mix!r}")
        _check_options(self.temperature, None, None)

    def noise_shape(self, n: int, shape: tuple[int, int, int]) -> tuple[int, ...]:
        return (n, shape[0] + 1, *shape[1:])

    def tempered(self, temperature: float, top_k: int | None, top_p: float | None) -> "GaussianMixture":
        _no_ranking("GaussianMixture", top_k, top_p)
        return replace(self, temperature=temperature)

    def _split(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (n, M, ...), and (n, C, 2, M, ...): means and log-variances."""
        params = _precise(params)
        return params[:, : self.n_mix], params[:, self.n_mix :].unflatten(1, (-1, 2, self.n_mix))

    def draw(self, params: Tensor, noise: Tensor, channel: int, previous: Tensor) -> Tensor:
        logits, components = self._split(params)
        if self.temperature == 0:
            chosen = logits.argmax(1)
        else:
            chosen = _first_exceeding(_softmax(logits, self.temperature), noise[:, 0])
        mean, log_variance = components[:, channel].gather(2, chosen.view(-1, 1, 1).expand(-1, 2, 1))[..., 0].unbind(1)
        deviation = (0.5 * log_variance).exp() * self.temperature
        return (mean + deviation * _quantile(noise[:, channel + 1], mean)).to(self.dtype)

    def check_params(self, params: Tensor, channels: int) -> None:
        expected = self.n_mix * (1 + 2 * channels)
        if params.dim() < 2 or params.shape[1] != expected:
            raise ValueError(
                f"params has the shape {tuple(params.shape)}; expected {expected} parameters on dim 1 for n_mix = "
                f"{self.n_mix} and {channels} channels"
            )

    def log_prob(self, params: Tensor, levels: Tensor) -> Tensor:
        """Log-density in nats, (n,), of values (n, C, ...)."""
        logits, components = self._split(params)
        of_channels = _log_density(_precise(levels).unsqueeze(2), components[:, :, 0], components[:, :, 1])
        return _sum_all_but_batch((logits.log_softmax(1) + of_channels.sum(1)).logsumexp(1))
