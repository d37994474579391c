"""Lossless compression by the probabilities of an autoregressive model.

A range coder (the package `constriction`) codes each level with the model's probabilities at its place, in the drawing
order. `Sampler.decode` computes the probabilities, bit for bit the same while compressing and while decompressing. The
coder's own probabilities are positive multiples of 2**-24, which would be coarse for 65,536 levels: a level is
therefore coded as its digits in base 256, one after the other.
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
LEAST = 1e-290  # added to each probability, so that none is 0, and digits can be coded whose levels underflow
MOST_IMAGES, MOST_OUTPUTS = 256, 2**26  # images of a batch; numbers that the model computes for a batch
SHARE = 2.0**-14  # the coder raises the probability of a level by less than this
SLACK = 96  # bits of a stream's first and last words that code nothing

Code = Callable[[np.ndarray, np.ndarray], np.ndarray]  # probabilities (n, K), digits (n,) to encode -> digits


@torch.inference_mode(False)  # _Batch writes levels in place, outside the sampler's inference mode
def compress(model: Any, images: Tensor, *, condition: Any = None) -> bytes:
    """Compresses images losslessly to about -log2 p(x) bits under the model, after one header of about 250 bytes.

    Args:
        model: an autoregressive model of `fastgen.models` in evaluation mode, or a `Sampler` that `accelerate` made of
            any causal model. Its distribution is Categorical, Bernoulli or LogisticMixture.
        images: integer levels (n, C, H, W); for a sampler (n, *sampler.shape).
        condition: as in `Sampler.sample`; for a class-conditional model the classes (n,). The bytes do not contain it:
            give it to `decompress` again.

    Returns:
        Bytes that `decompress` turns back into the images. That takes the same model with the same weights, computed
        with the same backend, dtype, batch size, number of threads, device and versions.

    Raises:
        ImportError: constriction is not installed.
        TypeError: the model has no probabilities of levels, or images are not integers.
        ValueError: images have another shape than the model's or levels out of its range; the model is in training
            mode.
        FloatingPointError: the model's output is NaN or infinite.
    """
    queue, family = _constriction()
    sampler = _sampler_of(model, condition)
    if not isinstance(images, Tensor) or images.is_floating_point() or images.is_complex():
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images must be a tensor of integer levels, got {got}")
    images = checked_levels("images", images.cpu().long(), sampler.shape, levels_of(sampler.distribution))
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
    """Returns exactly the images that `compress` was given, or raises.

    Args:
        model: the model that compressed the images.
        data: what `compress` returned.
        condition: the condition that `compress` was given.

    Returns:
        int64 levels (n, C, H, W) on the CPU.

    Raises:
        ImportError: constriction is not installed.
        TypeError: data is not bytes, or the model has no probabilities of levels.
        ValueError: the bytes cannot be decoded to these images. The message says why: `compress` did not write them,
            they are truncated or damaged, or were compressed with other weights, other arithmetic or another condition.
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
        except AssertionError as error:  # constriction's error for bits that encode no symbol
            raise _other_images() from error

    decoded, bits = [torch.empty(0, *sampler.shape, dtype=torch.long)], 0.0
    for part in _batches(sampler, header.images):
        batch = _Batch(sampler, torch.zeros(part.stop - part.start, *sampler.shape, dtype=torch.long), code)
        decoded.append(batch.run(_rows(condition, part)))
        bits += batch.bits
        if bits > 32 * header.words + SLACK:  # more images than these words can hold: stop before memory runs out
            raise _other_images()
    images = torch.cat(decoded)
    if digest(plain(images)) != header.images_digest:
        raise _other_images()
    return images


def _other_images() -> ValueError:
    return ValueError(
        "data: decodes to other images than were compressed (their checksum differs), although weights, arithmetic and "
        "condition agree with the header: the model's output is computed otherwise on this machine"
    )


class _Batch:
    """Encodes or decodes a batch of images.

    Args:
        levels: (n, *shape) int64. The levels to encode; when decoding, zeros that are overwritten by decoded levels.
        code: takes probabilities (n, K) and digits (n,). An encoder encodes these digits and returns them; a decoder
            ignores them and returns the next decoded digits.

    Attributes:
        bits: lower bound of the size of the levels coded so far, -log2(p + SHARE) summed.
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
            if level.max() >= p.shape[1]:  # _coded pads the last digit: these bits encode a level that does not exist
                raise _other_images()
            self.bits -= float(np.log2((p[np.arange(len(p)), level] + SHARE).clip(max=1)).sum())
            self.levels[:, c, i, j] = torch.from_numpy(level)
        return self.levels[:, slice(None) if channel is None else channel, i, j]

    def _coded(self, p: np.ndarray, level: np.ndarray) -> np.ndarray:
        """Codes levels (n,) with probabilities p (n, K): first all digits but the last, then the last given those."""
        n, count = p.shape
        if count <= BASE:
            return self.code(p, level.astype(np.int32)).astype(np.int64)
        p = np.pad(p, ((0, 0), (0, -count % BASE))).reshape(n, -1, BASE)
        leading = self._coded(p.sum(2), level // BASE)
        return leading * BASE + self._coded(p[np.arange(n), leading] + LEAST, level % BASE)


def _probabilities(
    distribution: Distribution, params: Tensor, channel: int, previous: Tensor, channels: int
) -> np.ndarray:
    """p(level | levels of the channels before) for one channel of one pixel, (n, K) float64.

    Args:
        params: the model's output at the pixel, (n, ...), on the CPU.
        previous: (n, channel) levels of the channels before.
    """
    params = params.contiguous()  # sums in one order, whatever the strides: encoder and decoder get the same bits
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
    """The condition with one row for each image. A single row is expanded without a copy: n may come from a forged
    header."""
    condition = sampler.condition if condition is None else condition
    return rows_for_some(torch.tensor([condition]) if isinstance(condition, int) else condition, n)


def _rows(condition: Any, part: slice) -> Any:
    return tree_map(lambda leaf: leaf[part] if isinstance(leaf, Tensor) and leaf.dim() else leaf, condition)


def _one_row(leaf: Any) -> Any:
    """A tensor whose rows are all equal, as its first row; anything else unchanged."""
    if not isinstance(leaf, Tensor) or leaf.dim() == 0:
        return leaf
    return leaf[:1] if leaf.stride(0) == 0 or bool((leaf == leaf[:1]).all()) else leaf


def _leaves(condition: Any) -> list[Any]:
    """The tensors and values of a condition; for keyword arguments also their names, in alphabetical order."""
    if isinstance(condition, dict):
        return [leaf for name in sorted(condition) for leaf in (name, *tree_leaves(condition[name]))]
    return tree_leaves(condition)


def _header(sampler: Sampler, images: int, condition: Any, images_digest: bytes, words: int) -> Header:
    def draw_nothing(params: Tensor, place: tuple[int | None, int, int]) -> Tensor:
        return torch.zeros(0, dtype=torch.long)

    sampler.decode(draw_nothing, 0, condition=_rows(condition, slice(0, 1)))  # chooses the backend if none is yet
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
    """The sampler of a model, or the sampler itself. Raises TypeError and ValueError as `compress`."""
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
