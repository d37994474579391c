"""Takes the model's output and noise; gives levels: in one place, so that no two backends can draw differently."""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgen.distributions import Distribution
from fastgen.distributions.base import independent
from fastgen.sampling.levels import dtype_of
from fastgen.sampling.request import SampleRequest

MOST_PARAMETERS = 2**22  # in a call of `draw`, which may take them as float64
TINY = 1e-6  # of `spread_of_steps`
WIDEST = 8**-0.5 + TINY  # more than which it cannot be


def channels_at_once(distribution: Distribution, params: Tensor, channels: int) -> list[int] | list[Tensor]:
    """What to give `draw` as its channel, one call after the other, for all channels of some pixels.

    Args:
        params: (pixels, ...) of as many pixels as are drawn in a call.
    """
    if channels == 1 or not independent(distribution):
        return list(range(channels))
    numbers = torch.arange(channels, device=params.device)
    if params.numel() <= MOST_PARAMETERS:
        return [numbers]
    return list(numbers.split(max(1, channels * MOST_PARAMETERS // params.numel())))


def draw_pixel(
    distribution: Distribution,
    params: Tensor,
    noise: Tensor,
    channel: int | None,
    levels: Tensor,
    known: Tensor | None = None,
    known_mask: Tensor | None = None,
) -> Tensor:
    """Draws one channel, or all of them where that is None, of one pixel a row; rows may be images or pixels.

    Args:
        distribution: of a pixel.
        params: (n, ...) the model's output at the pixel.
        noise: (n, U) the pixel's uniforms.
        channel: which to draw.
        levels: (n, C) int64, or of the distribution's `dtype`; those drawn before are read, those drawn now written.
        known: (n, C), the levels to keep.
        known_mask: (n, C) bool, where to keep them; None: nowhere.

    Returns:
        A bool scalar: the parameters of some row that was drawn, not kept, hold a NaN, or a real value is not finite.

    Raises:
        TypeError: the distribution draws real numbers.
        ValueError: it does not draw a level for each row (and channel).
    """
    params = params.contiguous()  # sums are then taken in one order, whatever the layout of the model's output
    nan = params.isnan()
    real = dtype_of(distribution).is_floating_point
    bad = torch.zeros((), dtype=torch.bool, device=params.device)
    for one in channels_at_once(distribution, params, levels.shape[1]) if channel is None else [channel]:
        drawn = distribution.draw(params, noise, one, levels[:, : one if isinstance(one, int) else 0])
        _check_drawn(distribution, drawn, levels[:, one].shape)
        drawn = drawn.to(dtype_of(distribution))
        if known is not None and known_mask is not None:
            mask = known_mask[:, one]
            drawn = torch.where(mask, known[:, one], drawn)
            bad = bad | (nan.flatten(1).any(1) & ~mask.view(len(mask), -1).all(1)).any()
        else:
            bad = bad | nan.any()
        if real:
            bad = bad | ~drawn.isfinite().all()
        levels[:, one] = drawn
    return bad


def _check_drawn(distribution: Distribution, drawn: Tensor, shape: torch.Size) -> None:
    if drawn.shape != shape:
        raise ValueError(
            f"distribution.draw must return levels of shape {tuple(shape)}, got {tuple(drawn.shape)} from "
            f"{type(distribution).__name__}"
        )
    if drawn.is_complex() or (drawn.is_floating_point() and not dtype_of(distribution).is_floating_point):
        raise TypeError(
            f"distribution.draw must return integer levels, got {drawn.dtype} from {type(distribution).__name__}: "
            "real values would be cut to integers. Return whole numbers as int64; real values need an attribute "
            "`dtype` of the distribution, torch.float32"
        )


def draw_image(request: SampleRequest, params: Tensor) -> tuple[Tensor, Tensor]:
    """Every pixel of every image at once, from the model's output (n, ..., H, W): levels (n, C, H, W) and bad."""
    levels = torch.empty((request.n, *request.shape), dtype=request.dtype, device=params.device)
    bad = torch.zeros((), dtype=torch.bool, device=params.device)
    for row in range(request.shape[1]):  # a row at a time: float64 probabilities of whole images would be large
        at, noise = _pixels(params[..., row, :]), _pixels(request.noise[..., row, :])
        known = None if request.known is None else _pixels(request.known[..., row, :])
        mask = None if request.known_mask is None else _pixels(request.known_mask[..., row, :])
        drawn = torch.empty((len(noise), request.shape[0]), dtype=request.dtype, device=params.device)
        bad = bad | draw_pixel(request.distribution, at, noise, None, drawn, known, mask)
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


def unsure_images(
    request: SampleRequest, params: Tensor, levels: Tensor, error: float, shift: float | None, of_draws: float = 0.0
) -> Tensor:
    """Which images have a draw that could have come out otherwise, (n,) bool.

    Args:
        params: (n, ..., H, W), of which the levels (n, C, H, W) were drawn.
        error: the greatest of an entry of `params`.
        shift: of `greatest_shift`, where it is known; it bounds more tightly, since errors of many parameters cancel.
        of_draws: the greatest error of a cumulative probability besides.
    """
    found = torch.zeros(request.n, dtype=torch.bool, device=params.device)
    check, steps = (getattr(request.distribution, name, None) for name in ("uncertain", "steps"))
    if check is None:
        return ~found
    for row in range(request.shape[1]):
        at, noise, drawn = (_pixels(one[..., row, :]) for one in (params, request.noise, levels))
        at = at.contiguous()
        for channel in channels_at_once(request.distribution, at, request.shape[0]):
            if shift is None or steps is None:
                unsure = check(at, noise, channel, drawn[:, : channel if isinstance(channel, int) else 0], error)
            else:
                unsure = _near_a_step(steps(at, channel), noise[:, channel], shift, of_draws)
            if request.known_mask is not None:
                unsure = unsure & ~_pixels(request.known_mask[..., row, :])[:, channel]
            found |= unsure.reshape(request.n, -1).any(1)
    return found


def _near_a_step(steps: Tensor, noise: Tensor, shift: float, of_draws: float) -> Tensor:
    distance = (steps - noise.unsqueeze(-1)).abs()
    near = (distance <= shift * WIDEST + of_draws).any(-1)
    near[near.clone()] = (distance[near] <= shift * spread_of_steps(steps[near]) + of_draws).any(-1)
    return near


def greatest_shift(request: SampleRequest, params: Tensor, other: Tensor) -> float | None:
    """The greatest difference between the distribution's `steps` for two outputs, in units of `spread_of_steps`; None
    where it has none."""
    steps = getattr(request.distribution, "steps", None)
    greatest = 0.0
    for row in range(request.shape[1]):
        at = [_pixels(one[..., row, :]).contiguous() for one in (params, other)]
        for channel in channels_at_once(request.distribution, at[0], request.shape[0]):
            ours, theirs = (None if steps is None else steps(one, channel) for one in at)
            if ours is None or theirs is None:
                return None
            greatest = max(greatest, float(((ours - theirs).abs() / spread_of_steps(ours)).nan_to_num(0).max()))
    return greatest


def spread_of_steps(steps: Tensor) -> Tensor:
    """How far independent errors of the logits, of standard deviation 1, move cumulative probabilities.

    An error e of the logits moves F(k), the sum of the first probabilities p, by (1 - F) times the sum of p e over
    these and -F times that over the others. TINY is added, so that nothing is divided by 0.

    Args:
        steps: F (..., K - 1).
    """
    squares = F.pad(F.pad(steps, (1, 0)), (0, 1), value=1.0).diff().square()
    below = squares.cumsum(-1)
    above = (below[..., -1:] - below).clamp(min=0)
    return ((1 - steps).square() * below[..., :-1] + steps.square() * above[..., :-1]).sqrt() + TINY
