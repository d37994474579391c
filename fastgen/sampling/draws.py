"""Draws from the model's output, in one place, so that no two backends can draw differently."""

import torch
from torch import Tensor

from fastgen.distributions import Distribution
from fastgen.sampling.request import SampleRequest, dtype_of


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
        levels (n,) int64, or of the distribution's `dtype`, and a bool scalar: the parameters of some row that was
        drawn, not kept, hold a NaN.

    Raises:
        TypeError: the distribution draws real numbers.
    """
    params = params.contiguous()  # sums are then taken in one order, whatever the layout of the model's output
    levels = distribution.draw(params, noise, channel, previous)
    dtype = dtype_of(distribution)
    if levels.is_complex() or (levels.is_floating_point() and not dtype.is_floating_point):
        raise TypeError(
            f"distribution.draw must return integer levels, got {levels.dtype} from {type(distribution).__name__}: "
            "real values would be cut to integers. Return whole numbers as int64; real values need an attribute "
            "`dtype` of the distribution, torch.float32"
        )
    levels = levels.to(dtype)
    nan = params.isnan()
    if known is not None and known_mask is not None:
        levels = torch.where(known_mask, known, levels)
        nan = nan.flatten(1).any(1) & ~known_mask
    return levels, nan.any()


def draw_image(request: SampleRequest, params: Tensor) -> tuple[Tensor, Tensor]:
    """Every pixel of every image at once, from the model's output (n, ..., H, W): levels (n, C, H, W) and bad."""
    levels = torch.empty((request.n, *request.shape), dtype=request.dtype, device=params.device)
    bad = torch.zeros((), dtype=torch.bool, device=params.device)
    for row in range(request.shape[1]):  # a row at a time: float64 probabilities of whole images would be large
        at, noise = _pixels(params[..., row, :]), _pixels(request.noise[..., row, :])
        known = None if request.known is None else _pixels(request.known[..., row, :])
        mask = None if request.known_mask is None else _pixels(request.known_mask[..., row, :])
        drawn = torch.empty((len(noise), request.shape[0]), dtype=request.dtype, device=params.device)
        for channel in range(request.shape[0]):
            keep = (None, None) if known is None or mask is None else (known[:, channel], mask[:, channel])
            drawn[:, channel], nan = draw_channel(request.distribution, at, noise, channel, drawn[:, :channel], *keep)
            bad = bad | nan
        levels[..., row, :] = drawn.unflatten(0, (request.n, -1)).movedim(1, -1)
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


def uncertain_image(request: SampleRequest, params: Tensor, levels: Tensor, error: float, shift: float | None) -> bool:
    """Whether any draw of levels (n, C, H, W) could have come out otherwise.

    Args:
        params: (n, ..., H, W), of which the levels were drawn.
        error: the greatest of an entry of `params`.
        shift: the greatest of the distribution's `steps`, where it is known; it bounds more tightly, since errors of
            many parameters cancel.
    """
    check, steps = (getattr(request.distribution, name, None) for name in ("uncertain", "steps"))
    if check is None:
        return True
    for row in range(request.shape[1]):
        at, noise, drawn = (_pixels(one[..., row, :]) for one in (params, request.noise, levels))
        at = at.contiguous()
        for channel in range(request.shape[0]):
            if shift is None or steps is None:
                unsure = check(at, noise, channel, drawn[:, :channel], error)
            else:
                unsure = ((steps(at, channel) - noise[:, channel, None]).abs() <= shift).any(1)
            if request.known_mask is not None:
                unsure = unsure & ~_pixels(request.known_mask[..., row, :])[:, channel]
            if bool(unsure.any()):
                return True
    return False


def greatest_shift(request: SampleRequest, params: Tensor, other: Tensor) -> float | None:
    """The greatest difference between the distribution's `steps` for two outputs; None where it has none."""
    steps = getattr(request.distribution, "steps", None)
    greatest = 0.0
    for row in range(request.shape[1]):
        for channel in range(request.shape[0]):
            ours, theirs = (
                None if steps is None else steps(_pixels(one[..., row, :]).contiguous(), channel)
                for one in (params, other)
            )
            if ours is None or theirs is None:
                return None
            greatest = max(greatest, float((ours - theirs).abs().nan_to_num(0).max()))
    return greatest
