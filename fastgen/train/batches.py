"""Batches for training and validation, from a `fastgen.data.Dataset`, a torch Dataset or a DataLoader.

The images of a step depend only on the seed and on the number of the step. A run can therefore be resumed at any step,
and divided among processes.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, default_collate

from fastgen import data
from fastgen.data import Dataset, Split
from fastgen.distributed import mix

Batch = tuple[Tensor, Tensor | None]  # images, and their classes or None


def as_batch(item: Any) -> Batch:
    """Converts an item of a torch Dataset or DataLoader to a Batch.

    Args:
        item: images, or a sequence that starts with images and classes; the rest of a sequence is ignored.

    Raises:
        TypeError: item is something else.
    """
    parts = list(item) if isinstance(item, (list, tuple)) else [item]
    if not parts or not isinstance(parts[0], Tensor) or (len(parts) > 1 and not isinstance(parts[1], Tensor)):
        raise TypeError(f"data must give tensors of images, or of images and classes, got {type(item).__name__}")
    return parts[0], parts[1] if len(parts) > 1 else None


class Indexed:
    """Images of a `Split` or a torch Dataset, in an order that is drawn for each epoch.

    Args:
        source: the data set.
        numbers: indexes of the images to use; None uses all.
    """

    def __init__(self, source: Any, numbers: Tensor | None = None) -> None:
        self.source = source
        self.numbers = torch.arange(len(source)) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def get(self, places: Tensor) -> Batch:
        """The images at these places of `numbers`."""
        numbers = self.numbers[places]
        if isinstance(self.source, Split):
            part = self.source[numbers]
            return part.images, part.labels
        return as_batch(default_collate([self.source[number] for number in numbers.tolist()]))

    def places(self, step: int, batch_size: int, seed: int) -> Tensor:
        """The places in `numbers` of a step's images. Each epoch has its own permutation, and drops its last images if
        they do not fill a batch."""
        size = min(batch_size, len(self))
        epoch, position = divmod(step, len(self) // size)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        return torch.randperm(len(self), generator=generator)[position * size : (position + 1) * size]

    def batch(self, step: int, batch_size: int, seed: int) -> Batch:
        return self.get(self.places(step, batch_size, seed))

    def chunks(self, size: int) -> Iterator[Batch]:
        for places in torch.arange(len(self)).split(size):
            yield self.get(places)


class Loaded:
    """Batches of a DataLoader. Its random order in each epoch depends on the seed of the run and the epoch."""

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader
        if not isinstance(loader.dataset, IterableDataset) and len(loader) == 0:
            raise ValueError("data must have batches, this DataLoader has none")
        self._batches: Iterator[Any] = iter(())
        self._next_step = -1  # the step whose batch comes next out of _batches

    def batch(self, step: int, batch_size: int, seed: int) -> Batch:
        """The batch of a step. Consecutive steps are fast; for any other step the epoch is read from its start."""
        epoch, position = divmod(step, self._length())
        if position == 0 or step != self._next_step:
            torch.manual_seed(mix(seed, epoch))  # the loader's sampler and workers take their seeds from this generator
            self._batches = iter(self.loader)
            for _ in range(position):
                next(self._batches)
        self._next_step = step + 1
        return as_batch(next(self._batches))

    def chunks(self, size: int) -> Iterator[Batch]:
        return map(as_batch, self.loader)

    def _length(self) -> int:
        try:
            return len(self.loader)
        except TypeError as error:
            raise TypeError("data must be a DataLoader with a length, which a run needs to find its epoch") from error


class Data:
    """The training and validation images of a run.

    Args:
        source: `data` as in `train`.

    Attributes:
        name, loading: the arguments of `fastgen.data.load`; for torch's data the name of the class, and {}.
        sha256: hash of the images and classes; for torch data other than a TensorDataset, whose items may be random,
            only of the number of images.
        train: the training images.
        validation: the validation images, or None.
    """

    def __init__(self, source: Any) -> None:
        if isinstance(source, Dataset):
            self.name, self.loading, self.sha256 = source.name, dict(source.loading), source.sha256
            self.train: Indexed | Loaded = Indexed(source.train)
            self.validation: Indexed | Loaded | None = Indexed(source.validation)
            return
        train, validation = source if isinstance(source, (tuple, list)) and len(source) == 2 else (source, None)
        self.name, self.loading, self.sha256 = type(train).__name__, {}, _sha256(train)
        if validation is None and not isinstance(train, DataLoader):
            _check_indexed(train)
            places, held_out = data.hold_out(len(train), ("validation",), self.name)
            self.train, self.validation = Indexed(train, places), Indexed(train, held_out["validation"])
        else:
            self.train = _source(train)
            self.validation = None if validation is None else _source(validation)

    def first(self) -> Batch:
        """An example batch. It comes from the validation images if there are any, which draws no random numbers."""
        return next(iter((self.validation or self.train).chunks(1)))


def _source(source: Any) -> Indexed | Loaded:
    if isinstance(source, DataLoader):
        return Loaded(source)
    _check_indexed(source)
    return Indexed(source)


def _check_indexed(source: Any) -> None:
    if not (hasattr(source, "__len__") and hasattr(source, "__getitem__")) or isinstance(source, (str, Tensor)):
        raise TypeError(
            "data must be a fastgen.data.Dataset, a torch Dataset with a length, a DataLoader, or a pair of those for "
            f"training and validation, got {type(source).__name__}"
        )
    if len(source) == 0:
        raise ValueError(f"data must have images, this {type(source).__name__} has none")


def _sha256(source: Any) -> str:
    inner = source.dataset if isinstance(source, DataLoader) else source
    tensors: Sequence[Tensor] = inner.tensors if isinstance(inner, TensorDataset) else ()
    count = len(inner) if hasattr(inner, "__len__") else None
    return data.sha256(tensors, count)
