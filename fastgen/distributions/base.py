"""The protocol of a distribution, and what those of this package share."""

import math
import numbers
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

Channels = int | Tensor  # one channel, or several at once


@runtime_checkable
class Distribution(Protocol):
    """What `accelerate` asks of a distribution; see the package's docstring."""

    def noise_shape(self, n: int, shape: tuple[int, int, int]) -> tuple[int, ...]: ...

    def draw(self, params: Tensor, noise: Tensor, channel: Any, previous: Tensor) -> Tensor: ...

    def log_prob(self, params: Tensor, levels: Tensor) -> Tensor: ...


def independent(distribution: Distribution) -> bool:
    """Whether its draw takes several channels at once."""
    return bool(getattr(distribution, "independent_channels", False))


def level_counts(levels: Any) -> Tensor:
    """Numbers of levels of channels or places, as a tensor of one to three dimensions.

    Raises:
        ValueError: they are no ints >= 1, none is 2 or more, or they have another number of dimensions.
    """
    expected = "levels must be an int >= 2, or ints >= 1 that are broadcastable to the shape, one of them >= 2"
    try:
        counts = torch.as_tensor(levels)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{expected}, got {levels!r}") from None
    integer = not (counts.is_floating_point() or counts.is_complex() or counts.dtype == torch.bool)
    if not integer or not 1 <= counts.dim() <= 3 or counts.numel() == 0 or counts.min() < 1 or counts.max() < 2:
        raise ValueError(f"{expected}, got {levels!r}")
    return counts.long()


def precise(params: Tensor) -> Tensor:
    """float64 where the device has it: a draw then depends on the parameters, not on how they are summed."""
    return params.float() if params.device.type == "mps" else params.double()


def check_options(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises ValueError where an option of sampling has a wrong type or lies out of its range."""
    if not (isinstance(temperature, numbers.Real) and 0 <= temperature < math.inf):
        raise ValueError(f"temperature must be a finite number >= 0, got {temperature!r}")
    if top_k is not None and (not isinstance(top_k, numbers.Integral) or isinstance(top_k, bool) or top_k < 1):
        raise ValueError(f"top_k must be an int >= 1 or None, got {top_k!r}")
    if top_p is not None and not (isinstance(top_p, numbers.Real) and 0 < top_p <= 1):
        raise ValueError(f"top_p must be in (0, 1] or None, got {top_p!r}")


def no_ranking(name: str, top_k: int | None, top_p: float | None) -> None:
    """Raises ValueError where top_k or top_p is given to a distribution whose levels are not ranked."""
    if top_k is not None or top_p is not None:
        raise ValueError(f"top_k and top_p are not defined for {name}: use temperature")


def softmax(logits: Tensor, temperature: float) -> Tensor:
    """Over dim 1. The greatest logit is taken off first, so that a small temperature does not overflow."""
    if temperature == 1:
        return logits.softmax(1)
    return ((logits - logits.amax(1, keepdim=True)) / temperature).softmax(1)


def first_exceeding(probabilities: Tensor, noise: Tensor) -> Tensor:
    """The smallest index on dim 1 whose cumulative probability exceeds the noise; never one of probability 0."""
    cumulative = probabilities.movedim(1, -1).cumsum(-1)
    threshold = noise.unsqueeze(-1) * cumulative[..., -1:]
    index = torch.searchsorted(cumulative.contiguous(), threshold.contiguous(), right=True).squeeze(-1)
    # float32 noise is at most 1 - 2**-24: rounded in float32 or float64, the threshold stays below the last sum, and
    # only NaN exceeds nothing.
    return index.clamp(max=probabilities.shape[1] - 1)


def bounds(share: Tensor, error: float) -> tuple[Tensor, Tensor]:
    """The least and the greatest probability (dim 1) that a set of levels can have instead of `share`, when every
    logit moves by at most `error`: the log-odds of the set then move by at most 2 * error. A little wider, for the
    rounding of sums."""
    share = share.clamp(max=1)
    shrink = math.exp(-2 * min(error, 300.0))
    slack = share.shape[1] * torch.finfo(share.dtype).eps
    low = share * shrink / (share * shrink + (1 - share))
    high = share / (share + (1 - share) * shrink)
    return low - slack, high + slack


def near_a_step(probabilities: Tensor, noise: Tensor, error: float) -> Tensor:
    """Whether `first_exceeding` could give another index when every logit moves by at most `error`."""
    cumulative = probabilities.cumsum(1)
    low, high = bounds(cumulative[:, :-1] / cumulative[:, -1:], error)
    noise = noise.unsqueeze(1)
    return ((low <= noise) & (noise < high)).any(1)


def close_leaders(logits: Tensor, error: float) -> Tensor:
    """Whether the index of the greatest logit could change when every logit moves by at most `error`."""
    if logits.shape[1] == 1:
        return torch.zeros_like(logits[:, 0], dtype=torch.bool)
    first, second = logits.topk(2, 1).values.unbind(1)
    return first - second <= 2 * error


def sum_all_but_batch(values: Tensor) -> Tensor:
    return values.flatten(1).sum(1) if values.dim() > 1 else values
