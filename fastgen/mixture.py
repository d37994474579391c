"""PixelCNN++'s discretized mixture of logistics (Salimans et al. 2017, equations 1-3), in plain PyTorch.

Parameters (B, P, ...) of any float dtype, M components: for RGB P = 10*M, in order M mixture logits, then for each
colour M means, M log-scales and M coefficients (through tanh; r->g, r->b, g->b); for one channel P = 3*M, M logits, M
means, M log-scales. Levels stand for -1..1 in equal steps.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgen.kernels.likelihood.limits import DEVIATION_LIMIT, LOGIT_LIMIT, MIN_LOG_SCALE


def split_mixture(params: Tensor, channels: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Logits (B, M, ...), means and log-scales (B, C, M, ...), coefficients (B, 3, M, ...) or None for one channel."""
    n_mix = params.shape[1] // (10 if channels == 3 else 3)
    colour_params = params[:, n_mix:].unflatten(1, (channels, -1, n_mix))
    return params[:, :n_mix].clamp(-LOGIT_LIMIT, LOGIT_LIMIT), *parts_of(colour_params)


def parts_of(colour_params: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Means, log-scales and coefficients, as `split_mixture` gives them, of (B, C, 3 or 2, M, ...)."""
    coefficients = colour_params[:, :, 2].tanh() if colour_params.shape[2] == 3 else None
    means = colour_params[:, :, 0].clamp(-DEVIATION_LIMIT, DEVIATION_LIMIT)
    return means, colour_params[:, :, 1].clamp(MIN_LOG_SCALE, LOGIT_LIMIT), coefficients


def component_mean(channel: int, means: Tensor, coefficients: Tensor | None, x: Tensor) -> Tensor:
    """Means (B, M, ...) of one colour given the colours before it in x (B, C, 1, ...), PixelCNN++ equation 3."""
    mean = means[:, channel]
    if coefficients is None or channel == 0:
        return mean
    if channel == 1:
        return mean + coefficients[:, 0] * x[:, 0]
    return mean + coefficients[:, 1] * x[:, 0] + coefficients[:, 2] * x[:, 1]


def mixture_log_prob(params: Tensor, target: Tensor, levels: int) -> Tensor:
    """log p of integer levels (B, C, ...), which a pixel's colours share: (B, 1, ...) nats."""
    logits, means, log_scales, coefficients = split_mixture(params, target.shape[1])
    level = target.to(params.dtype).unsqueeze(2)
    log_joint = logits.log_softmax(1)
    for channel in range(target.shape[1]):
        log_joint = log_joint + component_log_prob(channel, level, means, log_scales, coefficients, levels)
    return log_joint.logsumexp(1, keepdim=True)


def level_probabilities(params: Tensor, previous: Tensor, channels: int, levels: int) -> Tensor:
    """p of every level of one of `channels` colours, given those before it (B, channel) at the pixel: (B, levels).
    params: (B, P)."""
    logits, means, log_scales, coefficients = split_mixture(params, channels)
    channel, level = previous.shape[1], previous.to(params.dtype).unsqueeze(2)
    log_joint = logits.log_softmax(1)  # of a component and the levels before
    for before in range(channel):
        log_joint = log_joint + component_log_prob(before, level, means, log_scales, coefficients, levels)
    every = torch.arange(levels, dtype=params.dtype, device=params.device).expand(len(params), 1, 1, -1)
    level = torch.cat((level.unsqueeze(3).expand(-1, -1, -1, levels), every), 1)
    means, log_scales = means.unsqueeze(3), log_scales.unsqueeze(3)
    coefficients = None if coefficients is None else coefficients.unsqueeze(3)
    of_level = component_log_prob(channel, level, means, log_scales, coefficients, levels)
    log_joint = log_joint.unsqueeze(2) + of_level
    return log_joint.logsumexp(1).softmax(1)


def component_log_prob(
    channel: int, level: Tensor, means: Tensor, log_scales: Tensor, coefficients: Tensor | None, levels: int
) -> Tensor:
    """log p of a colour's level under each component, given the colours before it: (B, M, ...) nats.

    Exact: log(sigmoid(a) - sigmoid(b)) = logsigmoid(a) + logsigmoid(-b) + log(1 - exp(b - a)), with the two ends of
    a level's bin at a and b in units of the component's scale, so that no threshold is needed anywhere.

    Args:
        level: (B, at least channel + 1, 1, ...) levels as floats.
        means, log_scales, coefficients: as `split_mixture` gives them.
    """
    half = (levels - 1) / 2
    mean = component_mean(channel, means, coefficients, level / half - 1)
    log_scale = log_scales[:, channel]
    width = torch.exp(-log_scale) / half  # of a level, in scales
    # Distance from the mean in levels. Where they are close, half * mean = (levels / 2 - 1 / 2) * mean taken in
    # two steps keeps the digits that a level / half - 1 rounded to float32 has lost.
    distance = (level[:, channel] - half - (levels / 2) * mean) + 0.5 * mean
    upper = F.logsigmoid((distance + 0.5) * width)
    lower = F.logsigmoid(-(distance - 0.5) * width)
    # log(1 - exp(-width)); for wide scales as log(width) + log((1 - exp(-width)) / width), without underflow.
    small = width.clamp(1e-30, 1)
    wide = torch.log(-torch.expm1(-small) / small) - log_scale - math.log(half)
    log_width = torch.where(width > 1, torch.log1p(-torch.exp(-width.clamp(min=1))), wide)
    first, last = level[:, channel] == 0, level[:, channel] == levels - 1
    return torch.where(first, upper, torch.where(last, lower, upper + lower + log_width))
