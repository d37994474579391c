"""What `sample` asks for and what it gives: `SampleRequest`, `SampleResult`, `SampleStats`, checks, noise."""

import operator
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from fastgen.distributions import Distribution
from fastgen.ops._implementation import may_read_values
from fastgen.sampling.condition import rows_of


@dataclass(frozen=True)
class SampleRequest:
    """A batch of images to draw. All tensors are on the model's device.

    Args:
        n: number of images, at least 1.
        shape: (C, H, W).
        noise: (n, U, H, W) float32 uniforms in [0, 1).
        distribution: of a pixel, sampling options (temperature and so on) included.
        dtype: of the levels, int64, or a floating-point type where the model takes real values as they are.
        known: (n, C, H, W) of that dtype, 0 where not known, or None.
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
    dtype: torch.dtype = torch.long

    def of(self, rows: slice | Tensor) -> "SampleRequest":
        """The request for some of the images: a slice of them, or their numbers (m,)."""
        noise = self.noise[rows]
        known, mask = (None if one is None else one[rows] for one in (self.known, self.known_mask))
        condition = rows_of(self.condition, rows)
        return replace(self, n=len(noise), noise=noise, known=known, known_mask=mask, condition=condition)


@dataclass(kw_only=True)
class Tally:
    """How images were drawn.

    Attributes:
        passes: of the model over a batch, or over some of its images.
        redrawn: images that such a pass found wrong, and that were drawn on from their first wrong place.
        error: the largest difference seen between the engine's output and the model's; None where no pass was made.
        launches: of kernels on a GPU, as far as they were counted; None elsewhere.
    """

    passes: int = 0
    redrawn: int = 0
    error: float | None = None
    launches: int | None = None

    def add(self, part: "Tally") -> None:
        self.passes += part.passes
        self.redrawn += part.redrawn
        if part.error is not None:
            self.error = max(part.error, self.error or 0.0)
        if part.launches is not None:
            self.launches = part.launches + (self.launches or 0)


@dataclass
class SampleResult(Tally):
    """A batch of images.

    Args:
        levels: (n, C, H, W) int64.
        log_prob: (n,) float64, log-likelihood of the whole image in nats, known pixels included, under the model
            as it is (temperature 1), as `distribution.log_prob` of one pass over the finished image would give; None
            where not asked for.
        bad: bool scalar on the device: the parameters of some draw were NaN.
    """

    levels: Tensor
    log_prob: Tensor | None
    bad: Tensor


@dataclass
class SampleStats(Tally):
    """How the images of one `sample` were drawn, all of its batches together; see `Tally`, too.

    Attributes:
        backend: what drew them, after all fallbacks.
        seconds: from call to return, an analysis of the model included.
    """

    backend: str
    seconds: float = 0.0


Place = tuple[int | None, int, int]  # (channel, row, column); channel None: all of them at once
Draw = Callable[[Tensor, Place], Tensor]  # (params, place) -> levels, see `Sampler.decode`


class Backend(Protocol):
    """A way to draw. All give the same images for the same noise.

    Attributes:
        name: as `accelerate` takes it.
        most: images at once beyond which it gets no quicker, None where it is not known.
    """

    name: str
    most: int | None

    @property
    def work_ratio(self) -> float:
        """Multiply-adds spent on one image over those of one forward pass."""
        ...

    def run(self, request: SampleRequest) -> SampleResult: ...

    def decode(self, draw: Draw, request: SampleRequest) -> tuple[Tensor, Tensor]:
        """Levels from outside: what `Sampler.decode` and `Sampler.params` return. The request has no noise."""
        ...

    def takes_weights(self) -> bool:
        """Takes over other numbers in the model, none of which became zero or ceased to be; False: it cannot."""
        ...

    def explain(self) -> str: ...


def checked_count(name: str, count: Any, least: int) -> int:
    try:
        value = operator.index(count)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {count!r}") from None
    if isinstance(count, bool) or value < least:
        raise ValueError(f"{name} must be an int >= {least}, got {count!r}")
    return value


def checked_sizes(shape: Any) -> tuple[int, ...]:
    """(C, H, W), (H, W) or (T,)."""
    try:
        sizes = tuple(operator.index(size) for size in shape)
    except TypeError:
        sizes = ()
    if not 1 <= len(sizes) <= 3 or min(sizes) < 1:
        raise ValueError(f"shape must be positive ints (C, H, W), (H, W) or (T,), got {shape!r}")
    return sizes


def checked_shape(shape: Any) -> tuple[int, int, int]:
    sizes = checked_sizes(shape)
    if len(sizes) != 3:
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


def tell(message: str) -> None:
    """Warns the first caller outside of this package."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("fastgen."):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


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


def uniforms(shape: tuple[int, ...], seed: int | torch.Generator | None, device: torch.device) -> Tensor:
    """float32 uniforms in [0, 1) on `device`.

    An int gives the same noise on every device. A generator draws on its own device; None is torch's default
    generator of `device`.

    Raises:
        TypeError, ValueError: seed is none of these, or an int that a generator does not take.
    """
    if seed is None:
        return torch.rand(shape, dtype=torch.float32, device=device)
    if isinstance(seed, torch.Generator):
        generator = seed
    else:
        try:
            generator = torch.Generator().manual_seed(operator.index(seed))
        except TypeError:
            raise TypeError(f"seed must be an int, a torch.Generator or None, got {seed!r}") from None
        except (RuntimeError, ValueError, OverflowError) as error:
            raise ValueError(f"seed must fit into 64 bits, got {seed!r}") from error
    return torch.rand(shape, generator=generator, dtype=torch.float32, device=generator.device).to(device)


def check_noise(noise: Tensor, shape: tuple[int, ...]) -> None:
    """Raises TypeError or ValueError where `noise` is not float32 uniforms in [0, 1) of this shape."""
    if not isinstance(noise, Tensor) or noise.dtype != torch.float32:
        got = noise.dtype if isinstance(noise, Tensor) else type(noise).__name__
        raise TypeError(f"noise must be a float32 tensor, got {got}")
    if tuple(noise.shape) != tuple(shape):
        raise ValueError(f"noise must have the shape {tuple(shape)}, as noise_shape(n) says, got {tuple(noise.shape)}")
    if may_read_values(noise) and not bool(((noise >= 0) & (noise < 1)).all()):
        raise ValueError("noise must hold uniforms in [0, 1), got values outside (or NaN)")
