"""Data sets as tensors, and the conversion of arrays to a data set."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

HELD_OUT = 10  # one image in ten becomes a validation image (and one in ten a test image) if a source has none
FEW_LEVELS = 64  # integers that are all smaller than this have only as many levels as occur
CHANNELS = (1, 3, 2, 4)  # possible numbers of channels; the first two are more likely the axis of channels in a shape


@dataclass(frozen=True)
class Split:
    """Images and classes. Slices and indexes give a `Split`.

    Attributes:
        images: uint8 levels (n, C, H, W).
        labels: int64 classes (n,), or None.
    """

    images: Tensor
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: slice | Tensor) -> "Split":
        return Split(self.images[index], None if self.labels is None else self.labels[index])


@dataclass(frozen=True)
class Dataset:
    """Three splits of images of one shape.

    Attributes:
        name: the name given to `load`; a path in it is absolute.
        levels: number of levels of a channel; images hold 0..levels - 1.
        n_classes: number of classes, None if there are no labels.
        train, validation, test: the splits.
        attribution: the makers of the images, if the licence requires it to be shown.
        note: what was inferred about the images, such as the number of levels; "" if nothing was.
        loading: the keyword arguments given to `load`.
    """

    name: str
    levels: int
    n_classes: int | None
    train: Split
    validation: Split
    test: Split
    attribution: str = ""
    note: str = ""
    loading: Mapping[str, int] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the images and classes of all splits and of the number of levels, in hexadecimal."""
        parts = [
            tensor for split in (self.train, self.validation, self.test) for tensor in (split.images, split.labels)
        ]
        return sha256([tensor for tensor in parts if tensor is not None], self.levels)


def sha256(tensors: Sequence[Tensor], number: int | None) -> str:
    """SHA-256 of the dtypes, shapes and contents of tensors and of a number, in hexadecimal."""
    digest = hashlib.sha256(repr(number).encode())
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hold_out(count: int, missing: Sequence[str], source: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Chooses a tenth of the images for each missing split, by a fixed permutation.

    Args:
        count: number of images.
        missing: names of the splits.
        source: name of the data set, for the error message.

    Returns:
        The indexes of the images that stay for training, and the indexes for each missing split, by name.

    Raises:
        ValueError: there are too few images.
    """
    size = max(1, count // HELD_OUT)
    if count <= size * len(missing):
        raise ValueError(f"{source}: {count} images are too few to hold some out for {' and '.join(missing)}")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    parts = {name: order[number * size : (number + 1) * size].sort().values for number, name in enumerate(missing)}
    return order[len(missing) * size :].sort().values, parts


def assemble(
    splits: dict[str, tuple[np.ndarray, np.ndarray | None]],
    levels: int | None = None,
    source: str = "data",
    *,
    files: bool = False,
) -> Dataset:
    """Makes a data set of arrays.

    Args:
        splits: (images, labels or None) of "train", "validation" and "test". For "validation" and "test" a tenth of the
            training images is held out if they are missing, by a fixed permutation. Images are bool or integers
            (n, H, W), (n, C, H, W) or (n, H, W, C) with C in 1..4; labels are integers (n,) from 0.
        levels: number of levels of a channel. None infers it: 2 for bool, and for images that hold only 0 and 255,
            which become 0 and 1; the largest integer plus one if that integer is below 64 and `files` is False;
            otherwise 256.
        source: name of the data set, for error messages.
        files: True if the arrays are pixels of image files with 8 bits per channel.

    Raises:
        ValueError: arrays are not as above, or splits differ in shape.
    """
    if "train" not in splits:
        raise ValueError(f"{source}: has no training images")
    images = {name: _channels_first(array, f"{source}: {name}") for name, (array, _) in splits.items()}
    levels, note = _levels(images, levels, source, files)
    assembled = {
        name: Split(
            _tensor(array, levels, f"{source}: {name}"), _classes(splits[name][1], len(array), f"{source}: {name}")
        )
        for name, array in images.items()
    }
    missing = [name for name in ("test", "validation") if name not in assembled]
    if missing:
        train = assembled["train"]
        kept, parts = hold_out(len(train), missing, source)
        assembled |= {name: train[places] for name, places in parts.items()}
        assembled["train"] = train[kept]
    shapes = {name: tuple(split.images.shape[1:]) for name, split in assembled.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"{source}: the images of its splits differ in shape: {shapes}")
    labels = [split.labels for split in assembled.values()]
    n_classes = None
    if all(part is not None for part in labels):
        n_classes = int(torch.cat([part for part in labels if part is not None]).max()) + 1
    return Dataset(source, levels, n_classes, assembled["train"], assembled["validation"], assembled["test"], note=note)


def _channels_first(images: np.ndarray, source: str) -> np.ndarray:
    """Converts images of bool or integers to (n, C, H, W). Raises ValueError for other dtypes and shapes."""
    if np.issubdtype(images.dtype, np.floating):
        advice = "turn them into levels first"
        if images.size and images.min() >= 0 and images.max() <= 1:
            advice = "they are in 0..1: save (images * 255).round().astype('uint8'), or images > 0.5 for two levels"
        raise ValueError(f"{source}: images must be bool or integers, got {images.dtype}; {advice}")
    if images.dtype != np.bool_ and not np.issubdtype(images.dtype, np.integer):
        raise ValueError(f"{source}: images must be bool or integers, got {images.dtype}")
    given = images.shape
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4:
        for count in (CHANNELS[:2], CHANNELS[2:]):
            if images.shape[1] in count:
                break
            if images.shape[3] in count:
                images = images.transpose(0, 3, 1, 2)
                break
    if images.ndim != 4 or images.shape[1] not in CHANNELS or 0 in images.shape:
        raise ValueError(
            f"{source}: images must have the shape (n, H, W), (n, C, H, W) or (n, H, W, C) with C in 1..4 and "
            f"nothing empty, got {given}"
        )
    return images


def _levels(images: dict[str, np.ndarray], levels: int | None, source: str, files: bool) -> tuple[int, str]:
    """The number of levels, and a note if it was inferred. Replaces images that hold only 0 and 255 by 0 and 1."""
    if levels not in (None, 2):
        return levels, ""  # type: ignore[return-value]
    if all(array.dtype == np.bool_ for array in images.values()):
        return 2, ""
    least, most = (min(int(a.min()) for a in images.values()), max(int(a.max()) for a in images.values()))
    if (least, most) == (0, 255) and all(((array == 0) | (array == 255)).all() for array in images.values()):
        images.update({name: array > 0 for name, array in images.items()})
        return 2, "" if levels else f"{source}: images hold 0 and 255 only, taken as 2 levels (256 can be asked for)"
    if levels or files or not 0 <= most < FEW_LEVELS:
        return levels or 256, ""
    count = max(2, most + 1)
    return count, f"{source}: images hold {least}..{most} only, taken as {count} levels (256 can be asked for)"


def _tensor(images: np.ndarray, levels: int, source: str) -> Tensor:
    if images.min() < 0 or images.max() >= levels:
        raise ValueError(f"{source}: levels must be 0..{levels - 1}, got {images.min()}..{images.max()}")
    return torch.from_numpy(np.ascontiguousarray(images.astype(np.uint8)))


def _classes(labels: np.ndarray | None, count: int, source: str) -> Tensor | None:
    if labels is None:
        return None
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise ValueError(
            f"{source}: labels must be integers from 0, one for each of {count} images, got {labels.dtype} of the "
            f"shape {labels.shape}"
        )
    return torch.from_numpy(labels.astype(np.int64))
