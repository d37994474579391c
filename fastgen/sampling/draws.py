"""Draws from the model's output, in one place, so that no two backends can draw differently."""

import torch
from torch import Tensor

from fastgen.distributions import Distribution
from fastgen.sampling.request import SampleRequest


def draw_channel(
    distribution: Distribution,
    params: Tensor,
    noise: Tensor,
    channel: int,
    previous: Tensor,
    known: Tensor | None = None,
    known_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One channel at one pixel a row; rows are independent, and may be images or pixels.

    Args:
        distribution: of a pixel.
        params: (n, ...) the model's output at the pixel.
        noise: (n, U) the pixel's uniforms.
        channel: which channel to draw.
        previous: (n, channel) int64, the levels of the channels before it.
        known: (n,) int64, the levels to keep.
        known_mask: (n,) bool, where to keep them; None: nowhere.

    Returns:
        levels (n,) int64, and a bool scalar: the parameters of some row that was drawn, not kept, hold a NaN.
    """
    params = params.contiguous()  # sums are then taken in one order, whatever the layout of the model's output
    levels = distribution.draw(params, noise, channel, previous).long()
    nan = params.isnan()
    if known is not None and known_mask is not None:
        levels = torch.where(known_mask, known, levels)
        nan = nan.flatten(1).any(1) & ~known_mask
    return levels, nan.any()


def draw_image(job: SampleRequest, params: Tensor) -> tuple[Tensor, Tensor]:
    """Every pixel of every image at once, from the model's output (n, ..., H, W): levels (n, C, H, W) and bad."""
    levels = torch.empty((job.n, *job.shape), dtype=torch.long, device=params.device)
    bad = torch.zeros((), dtype=torch.bool, device=params.device)
    for row in range(job.shape[1]):  # a row at a time: float64 probabilities of whole images would be large
        at, noise = _pixels(params[..., row, :]), _pixels(job.noise[..., row, :])
        known = None if job.known is None else _pixels(job.known[..., row, :])
        mask = None if job.known_mask is None else _pixels(job.known_mask[..., row, :])
        drawn = torch.empty((len(noise), job.shape[0]), dtype=torch.long, device=params.device)
        for channel in range(job.shape[0]):
            keep = (None, None) if known is None or mask is None else (known[:, channel], mask[:, channel])
            drawn[:, channel], nan = draw_channel(job.distribution, at, noise, channel, drawn[:, :channel], *keep)
            bad = bad | nan
        levels[..., row, :] = drawn.unflatten(0, (job.n, -1)).movedim(1, -1)
    return levels, bad


def image_log_prob(distribution: Distribution, params: Tensor, levels: Tensor) -> Tensor:
    """Log-likelihood in nats, (n,) float64, of levels (n, C, H, W) under the model's output (n, ..., H, W)."""
    total = torch.zeros(len(levels), dtype=torch.float64, device=levels.device)
    for row in range(levels.shape[2]):
        of_pixels = distribution.log_prob(_pixels(params[..., row, :]), _pixels(levels[..., row, :]))
        total += of_pixels.double().unflatten(0, (len(levels), -1)).sum(1)
    return total


def _pixels(row: Tensor) -> Tensor:
    """One row of a batch of images, (n, ..., W), with a row a pixel: (n * W, ...)."""
    return row.movedim(-1, 1).flatten(0, 1)


def uncertain_image(job: SampleRequest, params: Tensor, levels: Tensor, error: float, shift: float | None) -> bool:
    """Whether any draw of levels (n, C, H, W) could have come out otherwise.

    Args:
        params: (n, ..., H, W), of which the levels were drawn.
        error: the greatest of an entry of `params`.
        shift: the greatest of the distribution's `steps`, where it is known; it bounds more tightly, since errors of
            many parameters cancel.
    """
    check, steps = (getattr(job.distribution, name, None) for name in ("uncertain", "steps"))
    if check is None:
        return True
    for row in range(job.shape[1]):
        at, noise, drawn = (_pixels(one[..., row, :]) for one in (params, job.noise, levels))
        at = at.contiguous()
        for channel in range(job.shape[0]):
            if shift is None or steps is None:
                unsure = check(at, noise, channel, drawn[:, :channel], error)
            else:
                unsure = ((steps(at, channel) - noise[:, channel, None]).abs() <= shift).any(1)
            if job.known_mask is not None:
                unsure = unsure & ~_pixels(job.known_mask[..., row, :])[:, channel]
            if bool(unsure.any()):
                return True
    return False


def greatest_shift(job: SampleRequest, params: Tensor, other: Tensor) -> float | None:
    """The greatest difference between the distribution's `steps` for two outputs; None where it has none."""
    steps = getattr(job.distribution, "steps", None)
    greatest = 0.0
    for row in range(job.shape[1]):
        for channel in range(job.shape[0]):
            ours, theirs = (
                None if steps is None else steps(_pixels(one[..., row, :]).contiguous(), channel)
                for one in (params, other)
            )
            if ours is None or theirs is None:
                return None
            greatest = max(greatest, float((ours - theirs).abs().nan_to_num(0).max()))
    return greatest
