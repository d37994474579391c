"""PixelCNN++'s distribution of a pixel, a mixture of logistics; `fastgen.mixture` computes its likelihood."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastgen.distributions.base import (
    check_options,
    close_leaders,
    first_exceeding,
    near_a_step,
    no_ranking,
    precise,
    softmax,
    sum_all_but_batch,
)
from fastgen.mixture import component_mean, mixture_log_prob, parts_of


@dataclass(frozen=True)
class LogisticMixture:
    """Discretized mixture of logistics over 256 levels (PixelCNN++, Salimans et al. 2017, equations 1-3).

    The model's output, with M = n_mix, is (B, 10*M, H, W) for RGB: M mixture logits, then for each colour M means, M
    log-scales (not below -7) and M coefficients (through tanh; r->g, r->b, g->b). For one channel it is (B, 3*M, H, W):
    M logits, M means, M log-scales. Levels 0..255 stand for -1..1. Each pixel takes C + 1 uniforms: the first chooses
    the component, then there is one for each channel.

    Raises:
        ValueError: n_mix is not an int >= 1, or temperature not a finite number >= 0. `tempered` raises it if top_k or
            top_p is given; methods with `params` if these are not 3*M or 10*M, or for another number of channels.
    """

    n_mix: int = 10
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.n_mix, int) or self.n_mix < 1:
            raise ValueError(f"n_mix must be an int >= 1, got {self.n_mix!r}")
        check_options(self.temperature, None, None)

    def noise_shape(self, n: int, shape: tuple[int, int, int]) -> tuple[int, ...]:
        channels, height, width = shape
        return (n, channels + 1, height, width)

    def tempered(self, temperature: float, top_k: int | None, top_p: float | None) -> "LogisticMixture":
        check_options(temperature, top_k, top_p)
        no_ranking("LogisticMixture", top_k, top_p)
        return replace(self, temperature=temperature)

    def _split(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (n, M, ...), and the other parameters of each colour: (n, 3, 3, M, ...) for RGB, (n, 1, 2, M, ...) for
        one channel."""
        m = self.n_mix
        if params.dim() < 2 or params.shape[1] not in (3 * m, 10 * m):
            raise ValueError(
                f"params has the shape {tuple(params.shape)}; expected {3 * m} (one channel) or {10 * m} (RGB) "
                f"parameters a pixel on dim 1 for n_mix = {m}"
            )
        n, size, *rest = params.shape
        params = precise(params)
        colours = (
            params[:, m:].reshape(n, 3, 3, m, *rest) if size == 10 * m else params[:, m:].reshape(n, 1, 2, m, *rest)
        )
        return params[:, :m], colours

    def draw(self, params: Tensor, noise: Tensor, channel: int, previous: Tensor) -> Tensor:
        mean, offset = self._chosen(params, noise, channel, previous)[:2]
        return self._level(mean + offset)

    def uncertain(self, params: Tensor, noise: Tensor, channel: int, previous: Tensor, error: float) -> Tensor:
        mean, offset, logits = self._chosen(params, noise, channel, previous)
        if self.temperature == 0:
            unsure = close_leaders(logits, error)
        else:
            unsure = near_a_step(softmax(logits, self.temperature), noise[:, 0], error / self.temperature)
        # The mean can change by its own error plus those of its coefficients (the slope of tanh is at most 1) times the
        # colours before; the scale by a factor of at most exp(error).
        x = mean + offset
        change = error * (1 + (previous.to(x.dtype) / 127.5 - 1).abs().sum(1)) + 1e-12
        change = change + offset.abs() * (math.expm1(min(error, 300.0)) + 1e-12)
        return unsure | (self._level(x - change) != self._level(x + change))

    def _chosen(self, params: Tensor, noise: Tensor, channel: int, previous: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For the component that the first uniform chooses: the channel's mean (n,), and the offset (n,) from it that
        the channel's uniform gives. Also the logits (n, M) of the mixture."""
        logits, colours = self._split(params)
        if self.temperature == 0:
            component = logits.argmax(1)
        else:
            component = first_exceeding(softmax(logits, self.temperature), noise[:, 0])
        index = component.view(-1, 1, 1, 1).expand(-1, *colours.shape[1:3], 1)
        means, log_scales, coefficients = parts_of(colours.gather(3, index))
        x = previous.to(means.dtype).unsqueeze(2) / 127.5 - 1
        mean = component_mean(channel, means, coefficients, x)[:, 0]
        if self.temperature == 0:
            return mean, torch.zeros_like(mean), logits
        u = noise[:, channel + 1].to(mean.dtype)
        scale = log_scales[:, channel, 0].exp() * self.temperature
        return mean, scale * (u.log() - (-u).log1p()), logits

    @staticmethod
    def _level(x: Tensor) -> Tensor:
        return ((x.clamp(-1, 1) + 1) * 127.5).round().nan_to_num(0).long()

    def check_params(self, params: Tensor, channels: int) -> None:
        colours = self._split(params)[1].shape[1]
        if colours != channels:
            raise ValueError(
                f"params has the shape {tuple(params.shape)}, a mixture of n_mix = {self.n_mix} for {colours} "
                f"channels; expected {channels} channels (1 or 3)"
            )

    def log_prob(self, params: Tensor, levels: Tensor) -> Tensor:
        self.check_params(params, levels.shape[1])
        return sum_all_but_batch(mixture_log_prob(precise(params), levels, 256).squeeze(1))
