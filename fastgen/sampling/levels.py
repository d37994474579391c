"""The levels of images: how many there are, of which dtype, and checks of those that come from outside."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgen.distributions import Bernoulli, Categorical, Distribution, LogisticMixture
from fastgen.distributions.base import level_counts
from fastgen.ops._implementation import may_read_values
from fastgen.sampling.request import Draw, Place, SampleRequest


def levels_of(distribution: Distribution) -> int | Tensor | None:
    """How many levels a channel has, where the distribution says so: ints that are broadcastable to (C, H, W), where
    that depends on the place."""
    if isinstance(distribution, LogisticMixture):
        return 256
    if isinstance(distribution, Bernoulli):
        return 2
    levels = getattr(distribution, "levels", None)
    if isinstance(distribution, Categorical) and distribution.counts is not None:
        return distribution.counts
    return levels if levels is None or isinstance(levels, int) else level_counts(levels)


def known_levels(distribution: Distribution) -> int | Tensor:
    """`levels_of`, and two of each channel where the distribution does not say."""
    levels = levels_of(distribution)
    return 2 if levels is None else levels


def dtype_of(distribution: Distribution) -> torch.dtype:
    """Of what it draws: int64 levels, or real values of its floating-point `dtype`."""
    found = getattr(distribution, "dtype", None)
    return found if isinstance(found, torch.dtype) and found.is_floating_point else torch.long


def check_levels(levels: int | Tensor | None, shape: tuple[int, ...]) -> None:
    """Raises ValueError where the numbers of levels are not one for each place."""
    if isinstance(levels, Tensor) and not _fits(levels.shape, shape):
        raise ValueError(f"distribution.levels must be broadcastable to {shape}, got the shape {tuple(levels.shape)}")


def _fits(size: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether a tensor of this size can be expanded to a shape."""
    ends = zip(reversed(size), reversed(shape), strict=False)
    return len(size) <= len(shape) and all(a in (1, b) for a, b in ends)


def check_range(name: str, levels: Tensor, count: int | Tensor | None) -> None:
    """Raises ValueError where an integer level is not in 0..count-1; None: any may be."""
    if count is None or not may_read_values(levels):
        return
    levels = levels.long()  # 256 is 0 for uint8
    if isinstance(count, Tensor):
        count = count.to(levels.device)
        wrong = (levels < 0) | (levels >= count)
        if bool(wrong.any()):
            level, most = levels[wrong][0], count.expand_as(levels)[wrong][0] - 1
            raise ValueError(f"{name} must be levels in 0..{int(most)} at a place that has so many, got {int(level)}")
    elif bool(((levels < 0) | (levels >= count)).any()):
        raise ValueError(f"{name} must be levels in 0..{count - 1}, got {int(levels.min())}..{int(levels.max())}")


def _broadcast(name: str, tensor: Tensor, size: tuple[int, ...]) -> Tensor:
    try:
        return tensor.expand(size)
    except RuntimeError:
        raise ValueError(f"{name} must be broadcastable to {size}, got the shape {tuple(tensor.shape)}") from None


def checked_known(
    known: Tensor | None,
    known_mask: Tensor | None,
    size: tuple[int, ...],
    levels: int | Tensor | None,
    device: torch.device,
    dtype: torch.dtype = torch.long,
) -> tuple[Tensor | None, Tensor | None]:
    """Both broadcast to (n, C, H, W), levels 0 where not known."""
    if (known is None) != (known_mask is None):
        missing = "known" if known is None else "known_mask"
        raise ValueError(f"known and known_mask go together, but {missing} is missing")
    if known is None or known_mask is None:
        return None, None
    real = dtype.is_floating_point
    if not isinstance(known, Tensor) or known.is_complex() or (known.is_floating_point() and not real):
        got = known.dtype if isinstance(known, Tensor) else type(known).__name__
        raise TypeError(f"known must be a tensor of integer levels, got {got}")
    if not isinstance(known_mask, Tensor) or known_mask.dtype != torch.bool:
        got = known_mask.dtype if isinstance(known_mask, Tensor) else type(known_mask).__name__
        raise TypeError(f"known_mask must be a bool tensor, got {got}")
    known = _broadcast("known", known, size).to(device, dtype)
    known_mask = _broadcast("known_mask", known_mask, size).to(device)
    known = known.masked_fill(~known_mask, 0)
    check_range("known, where known_mask is True,", known, levels)
    return known, known_mask


def checked_levels(name: str, levels: Any, shape: tuple[int, ...], count: int | Tensor | None) -> Tensor:
    """Images (n, *shape): integer levels 0..count-1, or real values."""
    if not isinstance(levels, Tensor) or levels.is_complex() or levels.dtype == torch.bool:
        got = levels.dtype if isinstance(levels, Tensor) else type(levels).__name__
        raise TypeError(f"{name} must be a tensor of integers or real numbers, got {got}")
    if tuple(levels.shape[1:]) != shape:
        raise ValueError(f"{name} must have the shape (n, {', '.join(map(str, shape))}), got {tuple(levels.shape)}")
    if not levels.is_floating_point():
        check_range(name, levels, count)
    return levels


def image_of(levels: Tensor) -> Draw:
    """The draw of `Sampler.decode` that gives these levels (n, C, H, W)."""

    def draw(params: Tensor, place: Place) -> Tensor:
        channel, i, j = place
        return levels[:, slice(None) if channel is None else channel, i, j]

    return draw


def decoded_levels(drawn: Any, params: Tensor, place: Place, request: SampleRequest) -> Tensor:
    """What the draw of `Sampler.decode` returned for a place, as (n,), or (n, C) where that has no channel.

    Raises:
        TypeError: real numbers where integer levels are drawn.
        ValueError: another shape, or no level of the distribution.
    """
    levels = torch.as_tensor(drawn, device=params.device)
    n, channels = len(params), request.shape[0]
    expected: list[tuple[int, ...]] = [(n, channels) if place[0] is None else (n,)]
    if channels == 1:
        expected += [(n,), (n, 1)]
    if tuple(levels.shape) not in expected:
        raise ValueError(f"draw must return levels of shape {expected[0]}, got {tuple(levels.shape)}")
    if not request.dtype.is_floating_point:
        if levels.is_floating_point():
            raise TypeError(f"draw must return integers, got {levels.dtype}: real values need dtype=torch.float32")
        count = levels_of(request.distribution)
        if isinstance(count, Tensor):
            channel, i, j = place
            count = count.expand(request.shape)[slice(None) if channel is None else channel, i, j]
        check_range("what draw returns", levels, count)
    return levels.to(request.dtype).view(expected[0])
