"""What a sampling backend is given, and what it gives back."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from fastgen.distributions import Distribution


@dataclass(frozen=True)
class Job:
    """A batch of images to draw. All tensors are on the model's device.

    Args:
        n: number of images, at least 1.
        shape: (C, H, W).
        noise: (n, U, H, W) float32 uniforms in [0, 1).
        distribution: of a pixel, sampling options (temperature and so on) included.
        known: (n, C, H, W) int64, 0 where not known, or None.
        known_mask: (n, C, H, W) bool, True where the level is `known`; None with `known`.
        condition: the model's second argument, one row an image, or None.
        return_log_prob: whether the log-likelihoods are wanted.
        progress: called with numbers of draws that have become final, C * H * W in total.
    """

    n: int
    shape: tuple[int, int, int]
    noise: Tensor
    distribution: Distribution
    known: Tensor | None = None
    known_mask: Tensor | None = None
    condition: Any = None
    return_log_prob: bool = False
    progress: Callable[[int], Any] | None = None


@dataclass
class Drawn:
    """A batch of images.

    Args:
        levels: (n, C, H, W) int64.
        log_prob: (n,) float64, log-likelihood of the whole image in nats, known pixels included, under the model
            as it is (temperature 1), as `distribution.log_prob` of one pass over the finished image would give; None
            where not asked for.
        bad: bool scalar on the device: the parameters of some draw were NaN.
        passes: whole forward passes of the model.
    """

    levels: Tensor
    log_prob: Tensor | None
    bad: Tensor
    passes: int


class Backend(Protocol):
    """A way to run jobs. All give the same images for the same noise.

    Attributes:
        most: images at once beyond which it gets no quicker, None where it is not known.
    """

    most: int | None

    @property
    def work_ratio(self) -> float:
        """Multiply-adds spent on one image over those of one forward pass."""
        ...

    def run(self, job: Job) -> Drawn: ...

    def explain(self) -> str: ...
