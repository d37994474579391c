"""The protocol of a distribution, and functions that this package's distributions share."""

import math
import numbers
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

Channels = int | Tensor  # one channel, or several at once


@runtime_checkable
class Distribution(Protocol):
    """What `accelerate` requires of a distribution; see the docstring of `fastgen.distributions`."""

    def noise_shape(self, n: int, shape: tuple[int, int, int]) -> tuple[int, ...]: ...

    def draw(self, params: Tensor, noise: Tensor, channel: Any, previous: Tensor) -> Tensor: ...

    def log_prob(self, params: Tensor, levels: Tensor) -> Tensor: ...


def independent(distribution: Distribution) -> bool:
    """Whether the distribution's `draw` can take several channels at once."""
    return bool(getattr(distribution, "independent_channels", False))


def level_counts(levels: Any) -> Tensor:
    """Converts numbers of levels of channels or places to an int64 tensor of one to three dimensions.

    Raises:
        ValueError: a number is not an int >= 1, all are 1, or there are more or fewer dimensions.
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
    """params in float64, or in float32 on devices without float64 (mps). In float64 the rounding of sums in a draw is
    far below the spacing of float32 noise, so that the order of summation does not matter."""
    return params.float() if params.device.type == "mps" else params.double()


def check_options(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises ValueError if a sampling option has a wrong type or is out of its range."""
    if not (isinstance(temperature, numbers.Real) and 0 <= temperature < math.inf):
        raise ValueError(f"temperature must be a finite number >= 0, got {temperature!r}")
    if top_k is not None and (not isinstance(top_k, numbers.Integral) or isinstance(top_k, bool) or top_k < 1):
        raise ValueError(f"top_k must be an int >= 1 or None, got {top_k!r}")
    if top_p is not None and not (isinstance(top_p, numbers.Real) and 0 < top_p <= 1):
        raise ValueError(f"top_p must be in (0, 1] or None, got {top_p!r}")


def no_ranking(name: str, top_k: int | None, top_p: float | None) -> None:
    """Raises ValueError if top_k or top_p is given: the distribution `name` does not define them."""
    if top_k is not None or top_p is not None:
        raise ValueError(f"top_k and top_p are not defined for {name}: use temperature")


def softmax(logits: Tensor, temperature: float) -> Tensor:
    """Softmax of logits / temperature over dim 1. The largest logit is subtracted before the division, which cannot
    overflow then."""
    if temperature == 1:
        return logits.softmax(1)
    return ((logits - logits.amax(1, keepdim=True)) / temperature).softmax(1)


def first_exceeding(probabilities: Tensor, noise: Tensor) -> Tensor:
    """The smallest index (n, ...) whose cumulative probability exceeds the noise; never an index of probability 0.

    Args:
        probabilities: (n, K, ...), not necessarily normalized.
        noise: uniforms (n, ...) in [0, 1).
    """
    cumulative = probabilities.movedim(1, -1).cumsum(-1)
    threshold = noise.unsqueeze(-1) * cumulative[..., -1:]
    index = torch.searchsorted(cumulative.contiguous(), threshold.contiguous(), right=True).squeeze(-1)
    # float32 noise is at most 1 - 2**-24, so that the threshold stays below the last sum even after rounding. The clamp
    # is for NaN, which no sum exceeds.
    return index.clamp(max=probabilities.shape[1] - 1)


def bounds(share: Tensor, error: float) -> tuple[Tensor, Tensor]:
    """Bounds of the probability of a set of levels when every logit changes by at most `error`: the log-odds of the set
    then change by at most 2 * error. The bounds are widened a little for the rounding of sums.

    Args:
        share: probabilities of sets of levels, on dim 1.

    Returns:
        The lower and the upper bounds, of the shape of `share`.
    """
    share = share.clamp(max=1)
    shrink = math.exp(-2 * min(error, 300.0))
    slack = share.shape[1] * torch.finfo(share.dtype).eps
    low = share * shrink / (share * shrink + (1 - share))
    high = share / (share + (1 - share) * shrink)
    return low - slack, high + slack


def near_a_step(probabilities: Tensor, noise: Tensor, error: float) -> Tensor:
    """Whether `first_exceeding` could give another index if every logit changed by at most `error`, (n,) bool."""
    cumulative = probabilities.cumsum(1)
    low, high = bounds(cumulative[:, :-1] / cumulative[:, -1:], error)
    noise = noise.unsqueeze(1)
    return ((low <= noise) & (noise < high)).any(1)


def close_leaders(logits: Tensor, error: float) -> Tensor:
    """Whether the index of the largest logit could change if every logit changed by at most `error`, (n,) bool."""
    if logits.shape[1] == 1:
        return torch.zeros_like(logits[:, 0], dtype=torch.bool)
    first, second = logits.topk(2, 1).values.unbind(1)
    return first - second <= 2 * error


def sum_all_but_batch(values: Tensor) -> Tensor:
    """The sum over all dimensions except the first, (n,)."""
    return values.flatten(1).sum(1) if values.dim() > 1 else values
