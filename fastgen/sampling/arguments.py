"""The arguments of `accelerate` and `Sampler.sample`: checked, errors naming them, and brought into form."""

import operator
from typing import Any

import torch
from torch import Tensor

from fastgen.distributions import Bernoulli, Distribution, LogisticMixture
from fastgen.ops._implementation import may_read_values


def checked_count(name: str, count: Any, least: int) -> int:
    try:
        value = operator.index(count)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {count!r}") from None
    if isinstance(count, bool) or value < least:
        raise ValueError(f"{name} must be an int >= {least}, got {count!r}")
    return value


def checked_shape(shape: Any) -> tuple[int, int, int]:
    try:
        sizes = tuple(operator.index(size) for size in shape)
    except TypeError:
        sizes = ()
    if len(sizes) != 3 or min(sizes) < 1:
        raise ValueError(f"shape must be three positive ints (C, H, W), got {shape!r}")
    return sizes[0], sizes[1], sizes[2]


def checked_distribution(distribution: Any, shape: tuple[int, int, int]) -> Distribution:
    if isinstance(distribution, type) or not isinstance(distribution, Distribution):
        raise TypeError(
            "distribution must be an object with the methods noise_shape, draw and log_prob, such as "
            f"fastgen.Categorical(256), got {distribution!r}"
        )
    noise_shape = tuple(distribution.noise_shape(2, shape))
    if len(noise_shape) != 4 or noise_shape[0] != 2 or noise_shape[2:] != shape[1:]:
        raise ValueError(
            f"distribution.noise_shape(2, {shape}) must be (2, U, {shape[1]}, {shape[2]}), got {noise_shape}"
        )
    return distribution


def _broadcast(name: str, tensor: Tensor, size: tuple[int, ...]) -> Tensor:
    try:
        return tensor.expand(size)
    except RuntimeError:
        raise ValueError(f"{name} must be broadcastable to {size}, got the shape {tuple(tensor.shape)}") from None


def tempered_distribution(
    distribution: Distribution, temperature: float, top_k: int | None, top_p: float | None
) -> Distribution:
    if temperature == 1 and top_k is None and top_p is None:
        return distribution
    tempered = getattr(distribution, "tempered", None)
    if tempered is None:
        raise ValueError(
            f"temperature, top_k and top_p are not defined for {type(distribution).__name__}, which has no method "
            f"`tempered`: got temperature={temperature!r}, top_k={top_k!r}, top_p={top_p!r}"
        )
    return tempered(temperature, top_k, top_p)


def levels_of(distribution: Distribution) -> int | None:
    """How many levels a channel has, where the distribution says so."""
    if isinstance(distribution, LogisticMixture):
        return 256
    if isinstance(distribution, Bernoulli):
        return 2
    levels = getattr(distribution, "levels", None)
    return levels if isinstance(levels, int) else None


def checked_known(
    known: Tensor | None, known_mask: Tensor | None, size: tuple[int, ...], levels: int | None, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Both broadcast to (n, C, H, W), levels 0 where not known."""
    if (known is None) != (known_mask is None):
        missing = "known" if known is None else "known_mask"
        raise ValueError(f"known and known_mask go together, but {missing} is missing")
    if known is None or known_mask is None:
        return None, None
    if not isinstance(known, Tensor) or known.is_floating_point() or known.is_complex():
        got = known.dtype if isinstance(known, Tensor) else type(known).__name__
        raise TypeError(f"known must be a tensor of integer levels, got {got}")
    if not isinstance(known_mask, Tensor) or known_mask.dtype != torch.bool:
        got = known_mask.dtype if isinstance(known_mask, Tensor) else type(known_mask).__name__
        raise TypeError(f"known_mask must be a bool tensor, got {got}")
    known = _broadcast("known", known, size).to(device, torch.long)
    known_mask = _broadcast("known_mask", known_mask, size).to(device)
    known = known.masked_fill(~known_mask, 0)
    if levels is not None and may_read_values(known) and bool(((known < 0) | (known >= levels)).any()):
        raise ValueError(
            f"known must hold levels 0..{levels - 1} where known_mask is True, "
            f"got {int(known.min())}..{int(known.max())}"
        )
    return known, known_mask
