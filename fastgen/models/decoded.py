"""Images from a decoder's parameters: draws of p(x | z), and its expected image. Integer levels in and out."""

import math

import torch
from torch import Tensor

from fastgen.mixture import component_mean, split_mixture
from fastgen.ops.reconstruction_nll import LOG_VARIANCE_RANGE


def planes_of(likelihood: str, channels: int, levels: int, n_mix: int) -> int:
    """Parameters a pixel that `reconstruction_nll` takes."""
    if likelihood == "logistic_mixture":
        return n_mix * (10 if channels == 3 else 3)
    return channels * {"bernoulli": 1, "gaussian": 2, "categorical": levels}[likelihood]


def draw(
    params: Tensor, likelihood: str, channels: int, levels: int, generator: torch.Generator | None = None
) -> Tensor:
    """Levels (B, C, H, W) int64 drawn independently in every pixel; of a Gaussian, the nearest level to the draw."""

    def uniforms(shape: torch.Size) -> Tensor:
        smallest = torch.finfo(torch.float32).tiny
        return torch.rand(shape, generator=generator, device=params.device).clamp(min=smallest)

    params = params.float()
    if likelihood == "bernoulli":
        return (uniforms(params.shape) < params.sigmoid()).long()
    if likelihood == "categorical":
        return (params - torch.log(-torch.log(uniforms(params.shape)))).argmax(1)
    if likelihood == "gaussian":
        mean, log_variance = params.chunk(2, 1)
        noise = torch.randn(mean.shape, generator=generator, device=params.device)
        return nearest_level(mean + noise * torch.exp(log_variance.clamp(*LOG_VARIANCE_RANGE) / 2), levels)
    logits, means, log_scales, coefficients = split_mixture(params, channels)
    component = (logits - torch.log(-torch.log(uniforms(logits.shape)))).argmax(1, keepdim=True)
    drawn: list[Tensor] = []
    for channel in range(channels):
        x = torch.stack(drawn, 1).unsqueeze(2) / ((levels - 1) / 2) - 1 if drawn else params
        mean = component_mean(channel, means, coefficients, x).gather(1, component).squeeze(1)
        scale = log_scales[:, channel].gather(1, component).squeeze(1).exp()
        u = uniforms(mean.shape)
        drawn.append(nearest_level(mean + scale * (u.log() - (-u).log1p()), levels))
    return torch.stack(drawn, 1)


def expected(params: Tensor, likelihood: str, channels: int, levels: int) -> Tensor:
    """E[x | z] in levels, float (B, C, H, W) within 0..levels - 1.

    Of a Gaussian or a logistic mixture: the mean before it is clipped and rounded to levels, limited to the range.
    """
    params = params.float()
    if likelihood == "bernoulli":
        return params.sigmoid()
    if likelihood == "categorical":
        level = torch.arange(levels, device=params.device, dtype=params.dtype)
        return torch.einsum("bk...,k->b...", params.softmax(1), level)
    if likelihood == "gaussian":
        mean = params.chunk(2, 1)[0]
    else:
        logits, means, _, coefficients = split_mixture(params, channels)
        x = means[:, :1]
        for channel in range(1, channels):
            x = torch.cat((x, component_mean(channel, means, coefficients, x).unsqueeze(1)), 1)
        mean = (logits.softmax(1).unsqueeze(1) * x).sum(2)
    return (mean.clamp(-1, 1) + 1) * ((levels - 1) / 2)


def nearest_level(x: Tensor, levels: int) -> Tensor:
    """The level of a number in -1..1, int64; 0 for NaN."""
    return ((x.clamp(-1, 1) + 1) * ((levels - 1) / 2)).round().nan_to_num(0).long()


def gaussian_nll(params: Tensor, x: Tensor, levels: int) -> Tensor:
    """-log p of integer levels (B, C, H, W) that a Gaussian is rounded to, (B,) nats.

    The probability of a level is the Gaussian's integral over the level's bin; the first and the last have all beyond
    them, as `draw` gives it, so that all of them add up to one. params: means and log-variances, as `draw` takes them.
    """
    params = params if params.dtype == torch.float64 else params.float()
    mean, log_variance = params.chunk(2, 1)
    inverse = torch.exp(-log_variance.clamp(*LOG_VARIANCE_RANGE) / 2)
    bin_width = 2 / (levels - 1)
    deviation = (x.to(mean.dtype) * bin_width - 1 - mean) * inverse
    width = bin_width * inverse
    # By symmetry both ends of the bin lie in the lower tail, or on both sides of the mean.
    size = -deviation.abs()
    upper, lower = torch.special.log_ndtr(size + width / 2), torch.special.log_ndtr(size - width / 2)
    # A narrow bin has the density times its width, with terms for its curvature: there the difference cancels.
    narrow = width * (1 + deviation.abs()) < 0.2
    m, w = deviation.square(), torch.where(narrow, width, 0.1).square()
    m = torch.where(narrow, m, 1)
    curved = w * (m - 1) / 24 + w.square() * (m.square() - 6 * m + 3) / 1920
    density = torch.log(width) - 0.5 * (deviation.square() + math.log(2 * math.pi)) + torch.log1p(curved)
    difference = torch.where(narrow, -torch.ones_like(width), lower - upper)
    inside = torch.where(narrow, density, upper + torch.log(-torch.expm1(difference)))
    first = torch.special.log_ndtr(deviation + width / 2)
    last = torch.special.log_ndtr(-deviation + width / 2)
    log_p = torch.where(x == 0, first, torch.where(x == levels - 1, last, inside))
    return -log_p.flatten(1).sum(1)
