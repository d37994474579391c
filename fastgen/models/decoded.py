"""Images from the parameters of p(x | z) that a VAE's decoder gives: draws and expected images, as levels."""

import math

import torch
from torch import Tensor

from fastgen.mixture import component_mean, split_mixture
from fastgen.ops.reconstruction_nll import LOG_VARIANCE_RANGE


def planes_of(likelihood: str, channels: int, levels: int, n_mix: int) -> int:
    """The number of parameters of a pixel that `fastgen.ops.reconstruction_nll` takes."""
    if likelihood == "logistic_mixture":
        return n_mix * (10 if channels == 3 else 3)
    return channels * {"bernoulli": 1, "gaussian": 2, "categorical": levels}[likelihood]


def draw(
    params: Tensor, likelihood: str, channels: int, levels: int, generator: torch.Generator | None = None
) -> Tensor:
    """Draws int64 levels (B, C, H, W), each pixel independently. A draw of a Gaussian or a logistic is rounded to the
    nearest level.

    Args:
        params: parameters of p(x | z) as `fastgen.ops.reconstruction_nll` takes them.
    """

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
    """E[x | z] in levels, floats (B, C, H, W) within 0..levels - 1. Arguments as in `draw`.

    For a Gaussian or a logistic mixture this is the mean before rounding to levels, clamped to the range.
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
    """The level (int64) nearest to a number on the scale of -1..1; 0 for NaN."""
    return ((x.clamp(-1, 1) + 1) * ((levels - 1) / 2)).round().nan_to_num(0).long()


def gaussian_nll(params: Tensor, x: Tensor, levels: int) -> Tensor:
    """-log p of integer levels (B, C, H, W) under a Gaussian that is rounded to levels, (B,) nats.

    The probability of a level is the integral of the Gaussian over the level's bin. The bins of the first and the last
    level extend to infinity, as `draw` rounds, so that the probabilities sum to one.

    Args:
        params: (B, 2C, H, W), means, then log-variances.
        x: integer levels (B, C, H, W).
    """
    params = params if params.dtype == torch.float64 else params.float()
    mean, log_variance = params.chunk(2, 1)
    inverse = torch.exp(-log_variance.clamp(*LOG_VARIANCE_RANGE) / 2)
    bin_width = 2 / (levels - 1)
    deviation = (x.to(mean.dtype) * bin_width - 1 - mean) * inverse
    width = bin_width * inverse
    # Mirrored into the lower tail, where the logarithms of both ends of the bin are accurate.
    mirrored = -deviation.abs()
    upper, lower = torch.special.log_ndtr(mirrored + width / 2), torch.special.log_ndtr(mirrored - width / 2)
    # For a narrow bin the difference of both ends cancels. Its probability is the density times the width, with
    # second- and fourth-order terms of the curvature.
    narrow = width * (1 + deviation.abs()) < 0.2
    # Where the bin is wide, harmless numbers take the place of these: torch.where's gradient must stay finite.
    width_2, deviation_2 = torch.where(narrow, width, 0.1).square(), torch.where(narrow, deviation.square(), 1)
    curvature = width_2 * (deviation_2 - 1) / 24
    curvature = curvature + width_2.square() * (deviation_2.square() - 6 * deviation_2 + 3) / 1920
    density = torch.log(width) - 0.5 * (deviation.square() + math.log(2 * math.pi)) + torch.log1p(curvature)
    difference = torch.where(narrow, -torch.ones_like(width), lower - upper)
    inside = torch.where(narrow, density, upper + torch.log(-torch.expm1(difference)))
    first = torch.special.log_ndtr(deviation + width / 2)
    last = torch.special.log_ndtr(-deviation + width / 2)
    log_p = torch.where(x == 0, first, torch.where(x == levels - 1, last, inside))
    return -log_p.flatten(1).sum(1)
