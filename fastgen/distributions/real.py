"""Distributions of real-valued pixels: Gaussian, logistic, mixture of Gaussians.

Their `dtype` is the dtype of images, whose values the model gets unscaled. A uniform u in [0, 1) becomes the quantile
of u + 2**-25, half a step of float32 uniforms above u, so that it is finite: the tails end at about 5.4 standard
deviations of a Gaussian and 17.3 scales of a logistic.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from fastgen.distributions.base import (
    Channels,
    check_options,
    first_exceeding,
    no_ranking,
    precise,
    softmax,
    sum_all_but_batch,
)

HALF_A_STEP = 2.0**-25  # half the spacing of float32 uniforms

Kind = TypeVar("Kind", bound="_LocationScale")


@dataclass(frozen=True)
class _LocationScale:
    """Base class of Gaussian and Logistic. The model's output at a pixel (n, 2C) is C means, then the logarithms of C
    spreads. Channels are independent given these."""

    temperature: float = 1.0
    dtype: ClassVar[torch.dtype] = torch.float32
    independent_channels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_options(self.temperature, None, None)

    def noise_shape(self, n: int, shape: tuple[int, int, int]) -> tuple[int, ...]:
        return (n, *shape)

    def tempered(self: Kind, temperature: float, top_k: int | None, top_p: float | None) -> Kind:
        no_ranking(type(self).__name__, top_k, top_p)
        return replace(self, temperature=temperature)

    def draw(self, params: Tensor, noise: Tensor, channel: Channels, previous: Tensor) -> Tensor:
        mean, spread = (part[:, channel] for part in precise(params).chunk(2, 1))
        quantile = self._quantile(noise[:, channel].to(mean.dtype) + HALF_A_STEP)
        return (mean + self._scale(spread) * self.temperature * quantile).to(self.dtype)

    def check_params(self, params: Tensor, channels: int) -> None:
        if params.shape[1:] != (2 * channels,):
            raise ValueError(
                f"params has the shape {tuple(params.shape)}; expected {2 * channels} parameters on dim 1: the means "
                f"of {channels} channels, then their {self._spread}"
            )

    def log_prob(self, params: Tensor, levels: Tensor) -> Tensor:
        """Log-density in nats, (n,), of values (n, C, ...)."""
        mean, spread = precise(params).chunk(2, 1)
        return self._log_density(precise(levels), mean, spread).flatten(1).sum(1)

    _spread: ClassVar[str]

    def _scale(self, spread: Tensor) -> Tensor:
        raise NotImplementedError

    def _quantile(self, u: Tensor) -> Tensor:
        """The quantile of u for mean 0 and scale 1."""
        raise NotImplementedError

    def _log_density(self, x: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Gaussian(_LocationScale):
    """A Gaussian for every channel. The model's output is (B, 2C, H, W): C means, then C log-variances. Channels are
    independent given these.

    `temperature` multiplies the standard deviations; with 0 a draw is the mean.

    Raises:
        ValueError: temperature is not a finite number >= 0. `tempered` raises it if top_k or top_p is given,
            `check_params` if params are not 2C.
    """

    _spread = "log-variances"

    def _scale(self, spread: Tensor) -> Tensor:
        return (0.5 * spread).exp()

    def _quantile(self, u: Tensor) -> Tensor:
        return torch.special.ndtri(u)

    def _log_density(self, x: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
        return _normal_log_density(x, mean, spread)


@dataclass(frozen=True)
class Logistic(_LocationScale):
    """A logistic distribution for every channel. The model's output is (B, 2C, H, W): C means, then C log-scales.
    Channels are independent given these.

    A draw is mean + scale * (log u - log(1 - u)); its standard deviation is scale * pi / sqrt(3). `temperature`
    multiplies the scales; with 0 a draw is the mean.

    Raises:
        ValueError: temperature is not a finite number >= 0. `tempered` raises it if top_k or top_p is given,
            `check_params` if params are not 2C.
    """

    _spread = "log-scales"

    def _scale(self, spread: Tensor) -> Tensor:
        return spread.exp()

    def _quantile(self, u: Tensor) -> Tensor:
        return u.log() - (-u).log1p()

    def _log_density(self, x: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
        z = ((x - mean) * (-spread).exp()).abs()  # the density is symmetric about the mean
        return -z - spread - 2 * (-z).exp().log1p()


def _normal_log_density(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    return -0.5 * (math.log(2 * math.pi) + log_variance + (x - mean).square() * (-log_variance).exp())


@dataclass(frozen=True)
class GaussianMixture:
    """A mixture of n_mix = M Gaussian components; within a component the channels are independent. The model's output
    is (B, M + 2*C*M, H, W): M mixture logits, then for each channel M means and M log-variances. Each pixel takes C + 1
    uniforms: the first chooses the component, then there is one for each channel.

    `temperature` divides the logits and multiplies the standard deviations; with 0 a draw is the mean of the most
    probable component.

    Raises:
        ValueError: n_mix is not an int >= 1, or temperature not a finite number >= 0. `tempered` raises it if top_k or
            top_p is given, `check_params` if params are not M + 2*C*M.
    """

    n_mix: int
    temperature: float = 1.0
    dtype: ClassVar[torch.dtype] = torch.float32
    independent_channels: ClassVar[bool] = True  # given the component, which the first uniform chooses for all channels

    def __post_init__(self) -> None:
        if not isinstance(self.n_mix, int) or self.n_mix < 1:
            raise ValueError(f"n_mix must be an int >= 1, got {self.n_mix!r}")
        check_options(self.temperature, None, None)

    def noise_shape(self, n: int, shape: tuple[int, int, int]) -> tuple[int, ...]:
        return (n, shape[0] + 1, *shape[1:])

    def tempered(self, temperature: float, top_k: int | None, top_p: float | None) -> "GaussianMixture":
        no_ranking("GaussianMixture", top_k, top_p)
        return replace(self, temperature=temperature)

    def _split(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (n, M, ...), and means and log-variances (n, C, 2, M, ...)."""
        params = precise(params)
        return params[:, : self.n_mix], params[:, self.n_mix :].unflatten(1, (-1, 2, self.n_mix))

    def draw(self, params: Tensor, noise: Tensor, channel: Channels, previous: Tensor) -> Tensor:
        logits, components = self._split(params)
        if self.temperature == 0:
            chosen = logits.argmax(1)
        else:
            chosen = first_exceeding(softmax(logits, self.temperature), noise[:, 0])
        chosen = chosen.view(-1, 1, 1, 1).expand(-1, *components.shape[1:3], 1)
        mean, log_variance = (part[:, channel] for part in components.gather(3, chosen)[..., 0].unbind(2))
        quantile = torch.special.ndtri(noise[:, 1:][:, channel].to(mean.dtype) + HALF_A_STEP)
        return (mean + (0.5 * log_variance).exp() * self.temperature * quantile).to(self.dtype)

    def check_params(self, params: Tensor, channels: int) -> None:
        expected = self.n_mix * (1 + 2 * channels)
        if params.shape[1:] != (expected,):
            raise ValueError(
                f"params has the shape {tuple(params.shape)}; expected {expected} parameters on dim 1 for n_mix = "
                f"{self.n_mix} and {channels} channels"
            )

    def log_prob(self, params: Tensor, levels: Tensor) -> Tensor:
        """Log-density in nats, (n,), of values (n, C, ...)."""
        logits, components = self._split(params)
        channel_log_density = _normal_log_density(
            precise(levels).unsqueeze(2), components[:, :, 0], components[:, :, 1]
        )
        return sum_all_but_batch((logits.log_softmax(1) + channel_log_density.sum(1)).logsumexp(1))
