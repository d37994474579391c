"""Lossless compression: images as the bits that an autoregressive model's probabilities leave to be said.

A range coder (the package `constriction`) codes each level with the model's probabilities at its place, in the drawing
order. `Sampler.decode` computes these, bit for bit alike, while images are compressed and while they are decoded. A
level is coded as its digits to the base 256, so that the coder's probabilities, multiples of 2**-24 and none of them 0,
cost next to nothing also where a channel has 65,536 levels.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fastgen.checkpoint import unwrap
from fastgen.distributions import Bernoulli, Categorical, Distribution, LogisticMixture
from fastgen.mixture import level_probabilities
from fastgen.models.autoregressive import AutoregressiveModel
from fastgen.sampling import Sampler
from fastgen.sampling.condition import rows_for_some
from fastgen.sampling.levels import checked_levels, levels_of
from fastgen.stream_header import Header, digest, how_computed, plain, weights_digest

BASE = 256  # of the digits of a level
LEAST = 1e-290  # added to probabilities, so that none is 0 and digits of levels that underflow can be told apart
MOST_IMAGES, MOST_OUTPUTS = 256, 2**26  # of a batch: images, and numbers that the model puts out for them
SHARE = 2.0**-14  # of the probability, more than what the coder gives any level beyond the model's
SLACK = 96  # bits that a coder's first and last words may hold beyond what was coded

Code = Callable[[np.ndarray, np.ndarray], np.ndarray]  # probabilities (n, K), digits (n,) to encode -> digits


@torch.inference_mode(False)  # levels are written where the sampler asks for them, outside of it
def compress(model: Any, images: Tensor, *, condition: Any = None) -> bytes:
    """Images as few bytes: about their -log p(x) under the model, and a header of about 250 bytes for all.

    Args:
        model: an autoregressive model of `fastgen.models` in evaluation mode, or a `Sampler`, which `accelerate` makes
            of any causal model; its levels are categorical, Bernoulli or of a mixture of logistics.
        images: integer levels (n, C, H, W); of a sampler (n, *shape).
        condition: as in `Sampler.sample`; for a class-conditional model the classes (n,). It is not stored:
            `decompress` needs it again.

    Returns:
        What `decompress` makes the images of, bit for bit, by the same model with the same weights, computed in the
        same way: backend, dtype, batch, threads, device, versions.

    Raises:
        ImportError: constriction is missing.
        TypeError: the model has no such likelihood; images are no integers.
        ValueError: images are none of the model's; the model is in training mode.
        FloatingPointError: the model's output was NaN.
    """
    queue, family = _constriction()
    sampler = _sampler_of(model, condition)
    if not isinstance(images, Tensor) or images.is_floating_point():
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images must be a tensor of integer levels, got {got}")
    images = checked_levels(images.cpu().long(), sampler.shape, levels_of(sampler.distribution))
    condition = _condition(sampler, condition, len(images))
    encoder = queue.RangeEncoder()

    def code(probabilities: np.ndarray, digits: np.ndarray) -> np.ndarray:
        encoder.encode(digits, family, probabilities)
        return digits

    for part in _batches(sampler, len(images)):
        _Batch(sampler, images[part].clone(), code).run(_rows(condition, part))
    words = encoder.get_compressed().astype("<u4").tobytes()
    return _header(sampler, len(images), condition, digest(plain(images)), len(words) // 4).stream(words)


@torch.inference_mode(False)
def decompress(model: Any, data: bytes, *, condition: Any = None) -> Tensor:
    """The very images that `compress` was given.

    Args:
        model, condition: those that the images were compressed with.
        data: what `compress` returned.

    Returns:
        int64 levels (n, C, H, W) on the CPU.

    Raises:
        ImportError: constriction is missing.
        TypeError: data is no bytes, or as `compress`.
        ValueError: these bytes cannot be decoded to the very images, and why: they are foreign, truncated or damaged,
            of other weights, computed in another way, or of another condition.
    """
    queue, family = _constriction()
    header, words = Header.read(data)
    sampler = _sampler_of(model, condition)
    condition = _condition(sampler, condition, header.images)
    header.check(_header(sampler, header.images, condition, header.images_digest, header.words))
    decoder = queue.RangeDecoder(words)

    def code(probabilities: np.ndarray, digits: np.ndarray) -> np.ndarray:
        try:
            return decoder.decode(family, probabilities)
        except AssertionError as error:  # how constriction says that these bits are of no symbol
            raise _other_images() from error

    decoded, bits = [torch.empty(0, *sampler.shape, dtype=torch.long)], 0.0
    for part in _batches(sampler, header.images):
        batch = _Batch(sampler, torch.zeros(part.stop - part.start, *sampler.shape, dtype=torch.long), code)
        decoded.append(batch.run(_rows(condition, part)))
        bits += batch.bits
        if bits > 32 * header.words + SLACK:  # before a header that promises too many images fills the memory
            raise _other_images()
    images = torch.cat(decoded)
    if digest(plain(images)) != header.images_digest:
        raise _other_images()
    return images


def _other_images() -> ValueError:
    return ValueError(
        "data: decodes to other images than were compressed (their checksum differs), though all agrees that the "
        "header says of the model: its output is computed otherwise on this machine"
    )


class _Batch:
    """Codes a batch: at each place the digits of its levels, by the model's probabilities.

    Args:
        levels: (n, *shape) int64, those to encode; when decoding, they are filled.
        code: encodes the digits that it is given, or decodes others.

    Attributes:
        bits: what the levels take at least. The coder gives a digit of probability 0 a little, and none much more.
    """

    def __init__(self, sampler: Sampler, levels: Tensor, code: Code) -> None:
        self.sampler = sampler
        self.levels = levels.view(len(levels), *(1,) * (4 - levels.dim()), *levels.shape[1:])
        self.code = code
        self.bits = 0.0

    def run(self, condition: Any) -> Tensor:
        return self.sampler.decode(self._draw, len(self.levels), condition=condition).cpu()

    def _draw(self, params: Tensor, place: tuple[int | None, int, int]) -> Tensor:
        channel, i, j = place
        params, channels = params.cpu(), self.levels.shape[1]
        for c in range(channels) if channel is None else (channel,):
            p = _probabilities(self.sampler.distribution, params, c, self.levels[:, :c, i, j], channels)
            if not np.isfinite(p).all():
                raise FloatingPointError(f"the model's output at row {i}, column {j} is NaN or infinite")
            level = self._coded(p + LEAST, self.levels[:, c, i, j].numpy())
            if level.max() >= p.shape[1]:  # among the last digits are some that no level has
                raise _other_images()
            self.bits -= float(np.log2((p[np.arange(len(p)), level] + SHARE).clip(max=1)).sum())
            self.levels[:, c, i, j] = torch.from_numpy(level)
        return self.levels[:, slice(None) if channel is None else channel, i, j]

    def _coded(self, p: np.ndarray, level: np.ndarray) -> np.ndarray:
        """Levels of probabilities p (n, K): the last digit by its probability given those before it."""
        n, count = p.shape
        if count <= BASE:
            return self.code(p, level.astype(np.int32)).astype(np.int64)
        p = np.pad(p, ((0, 0), (0, -count % BASE))).reshape(n, -1, BASE)
        before = self._coded(p.sum(2), level // BASE)
        return before * BASE + self._coded(p[np.arange(n), before] + LEAST, level % BASE)


def _probabilities(
    distribution: Distribution, params: Tensor, channel: int, previous: Tensor, channels: int
) -> np.ndarray:
    """p(level | levels of the channels before) of one of a pixel's channels, (n, K) float64; equal for equal arguments.

    Args:
        params: (n, ...) at one pixel, on the CPU.
        previous: (n, channel) levels.
    """
    params = params.contiguous()
    if isinstance(distribution, Categorical):
        probabilities = distribution.logits(params).select(2, channel).double().contiguous().softmax(1)
    elif isinstance(distribution, Bernoulli):
        logit = params[:, channel].double()
        probabilities = torch.stack((torch.sigmoid(-logit), torch.sigmoid(logit)), 1)
    else:
        probabilities = level_probabilities(params.double(), previous, channels, 256)
    return probabilities.numpy()


def _batches(sampler: Sampler, count: int) -> Iterator[slice]:
    size = _batch_size(sampler)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _batch_size(sampler: Sampler) -> int:
    outputs = math.prod(sampler.shape) * int(_counts(sampler).max())
    return max(1, min(MOST_IMAGES, MOST_OUTPUTS // outputs))


def _counts(sampler: Sampler) -> Tensor:
    """The number of levels at each place, broadcastable to (C, H, W)."""
    return torch.as_tensor(levels_of(sampler.distribution))


def _condition(sampler: Sampler, condition: Any, n: int) -> Any:
    """One row an image, of which equal ones take no memory: a header's number of images is not to be believed."""
    condition = sampler.condition if condition is None else condition
    return rows_for_some(torch.tensor([condition]) if isinstance(condition, int) else condition, n)


def _rows(condition: Any, part: slice) -> Any:
    return tree_map(lambda leaf: leaf[part] if isinstance(leaf, Tensor) and leaf.dim() else leaf, condition)


def _one_row(leaf: Any) -> Any:
    """The first row of a tensor whose rows are all alike."""
    if not isinstance(leaf, Tensor) or leaf.dim() == 0:
        return leaf
    return leaf[:1] if leaf.stride(0) == 0 or bool((leaf == leaf[:1]).all()) else leaf


def _leaves(condition: Any) -> list[Any]:
    """The tensors and values of a condition; of keyword arguments their names as well, in alphabetical order."""
    if isinstance(condition, dict):
        return [leaf for name in sorted(condition) for leaf in (name, *tree_leaves(condition[name]))]
    return tree_leaves(condition)


def _header(sampler: Sampler, images: int, condition: Any, images_digest: bytes, words: int) -> Header:
    def level_0(params: Tensor, place: tuple[int | None, int, int]) -> Tensor:
        return torch.zeros(0, dtype=torch.long)

    sampler.decode(level_0, 0, condition=_rows(condition, slice(0, 1)))  # makes the backend where there is none yet
    backend = sampler._backends.made[-1].backend.name
    return Header(
        sampler.shape,
        images,
        words,
        weights_digest(
            sampler.model, f"{type(sampler.model).__name__} {sampler.distribution} {_counts(sampler).tolist()}"
        ),
        digest(*(plain(_one_row(leaf)) for leaf in _leaves(condition))),
        images_digest,
        how_computed(sampler.model, backend, _batch_size(sampler)),
    )


def _sampler_of(model: Any, condition: Any) -> Sampler:
    """The sampler of a model; raises as `compress`."""
    sampler = unwrap(model)
    if isinstance(sampler, AutoregressiveModel):
        sampler = sampler.sampler(condition)
    if not isinstance(sampler, Sampler):
        raise TypeError(
            "model must be an autoregressive model of fastgen.models, whose likelihood is exact, or a Sampler of "
            f"fastgen.accelerate, got {type(model).__name__}"
        )
    if not isinstance(sampler.distribution, (Categorical, Bernoulli, LogisticMixture)):
        raise TypeError(
            "the distribution must be Categorical, Bernoulli or LogisticMixture, which have probabilities of levels, "
            f"got {type(sampler.distribution).__name__}"
        )
    return sampler


def _constriction() -> tuple[Any, Any]:
    """The range coders, and the family of categorical distributions."""
    try:
        from constriction import stream
    except ImportError as error:
        raise ImportError("fastgen.compress needs constriction: pip install fastgen[compress]") from error
    return stream.queue, stream.model.Categorical(perfect=False)
