"""What `sample` asks for and what it gives: `SampleRequest`, `SampleResult`, checks, noise, conditions."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from fastgen.distributions import Bernoulli, Distribution, LogisticMixture
from fastgen.ops._implementation import may_read_values


@dataclass(frozen=True)
class SampleRequest:
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
class SampleResult:
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

    def run(self, job: SampleRequest) -> SampleResult: ...

    def explain(self) -> str: ...


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


def uniforms(shape: tuple[int, ...], seed: int | torch.Generator | None, device: torch.device) -> Tensor:
    """float32 uniforms in [0, 1) on `device`.

    An int gives the same noise on every device. A generator draws on its own device; None is torch's default
    generator of `device`.

    Raises:
        TypeError, ValueError: seed is none of these, or an int that a generator does not take.
    """
    if seed is None:
        return torch.rand(shape, device=device)
    if isinstance(seed, torch.Generator):
        generator = seed
    else:
        try:
            generator = torch.Generator().manual_seed(operator.index(seed))
        except TypeError:
            raise TypeError(f"seed must be an int, a torch.Generator or None, got {seed!r}") from None
        except (RuntimeError, ValueError, OverflowError) as error:
            raise ValueError(f"seed must fit into 64 bits, got {seed!r}") from error
    return torch.rand(shape, generator=generator, device=generator.device).to(device)


def check_noise(noise: Tensor, shape: tuple[int, ...]) -> None:
    """Raises TypeError or ValueError where `noise` is not float32 uniforms in [0, 1) of this shape."""
    if not isinstance(noise, Tensor) or noise.dtype != torch.float32:
        got = noise.dtype if isinstance(noise, Tensor) else type(noise).__name__
        raise TypeError(f"noise must be a float32 tensor, got {got}")
    if tuple(noise.shape) != tuple(shape):
        raise ValueError(f"noise must have the shape {tuple(shape)}, as noise_shape(n) says, got {tuple(noise.shape)}")
    if may_read_values(noise) and not bool(((noise >= 0) & (noise < 1)).all()):
        raise ValueError("noise must hold uniforms in [0, 1), got values outside (or NaN)")


def rows_for(condition: Any, n: int, device: torch.device | None = None) -> Any:
    """The condition of n images, on `device`.

    A tensor has one row an image, or a single row for all; an int is the class of all images. Whatever else the
    pytree holds (and a tensor without dimensions) goes to the model unchanged.

    Raises:
        ValueError: a tensor has neither 1 nor n rows.
    """
    if isinstance(condition, int) and not isinstance(condition, bool):
        return torch.full((n,), condition, dtype=torch.long, device=device)

    def rows(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.dim() and leaf.shape[0] not in (1, n):
            raise ValueError(
                f"condition has a tensor of shape {tuple(leaf.shape)}; expected {n} rows, one an image, or 1 for all"
            )
        leaf = leaf.to(device)
        return leaf.expand(n, *leaf.shape[1:]) if leaf.dim() else leaf

    return tree_map(rows, condition)


def rows_between(condition: Any, start: int, stop: int) -> Any:
    """The condition of images start..stop-1, from `rows_for` all images."""
    return tree_map(lambda leaf: leaf[start:stop] if isinstance(leaf, Tensor) and leaf.dim() else leaf, condition)


def kind(condition: Any) -> Any:
    """What two conditions have in common that differ in nothing but the rows' values."""
    leaves, structure = tree_flatten(condition)

    def of(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.dtype, leaf.shape[1:] if leaf.dim() else leaf.item()

    return structure, [of(leaf) for leaf in leaves]


def example(condition: Any, device: torch.device) -> Any:
    """The condition of two images, from that of any number."""
    counts = {leaf.shape[0] for leaf in tree_leaves(condition) if isinstance(leaf, Tensor) and leaf.dim()}
    if counts - {1} and min(counts - {1}) >= 2:
        condition = tree_map(lambda leaf: leaf[:2] if isinstance(leaf, Tensor) and leaf.dim() else leaf, condition)
    return rows_for(condition, 2, device)
