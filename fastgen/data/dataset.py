"""Data sets as tensors, and the rules by which arrays become one."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

HELD_OUT = 10  # one image in ten, for each of validation and test that a source does not have
FEW_LEVELS = 64  # images of integers that stay below are taken to have no more levels than they show
CHANNELS = (1, 3, 2, 4)  # numbers of channels, by how readily one is recognized in an array's shape


@dataclass(frozen=True)
class Split:
    """images: uint8 levels (n, C, H, W). labels: int64 classes (n,), None where there are none."""

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
        name: as given to `load`, with a path made absolute.
        levels: number of levels of a channel; images hold 0..levels - 1.
        n_classes: number of classes, None where there are no labels.
        attribution: who made the images, where their licence asks to say so.
        note: what was decided about the images that was not asked for, "" for nothing.
        loading: what else `load` was given.
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
        """The SHA-256 of images, classes, splits and the number of levels, wherever they came from."""
        parts = [
            tensor for split in (self.train, self.validation, self.test) for tensor in (split.images, split.labels)
        ]
        return sha256([tensor for tensor in parts if tensor is not None], self.levels)


def sha256(tensors: Sequence[Tensor], number: int | None) -> str:
    """The SHA-256 of tensors and a number, in hexadecimal."""
    digest = hashlib.sha256(repr(number).encode())
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hold_out(count: int, missing: Sequence[str], source: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Chooses a tenth of the images for each missing split, by a fixed permutation. Returns the indices of those that
    stay for training, and those of each split.

    Raises:
        ValueError: there are too few.
    """
    each = max(1, count // HELD_OUT)
    if count <= each * len(missing):
        raise ValueError(f"{source}: {count} images are too few to hold some out for {' and '.join(missing)}")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    parts = {name: order[number * each : (number + 1) * each].sort().values for number, name in enumerate(missing)}
    return order[len(missing) * each :].sort().values, parts


def assemble(
    splits: dict[str, tuple[np.ndarray, np.ndarray | None]],
    levels: int | None = None,
    source: str = "data",
    *,
    files: bool = False,
) -> Dataset:
    """A data set of arrays: images and labels by split.

    Args:
        splits: "train", "validation" and "test"; where one of the last two is missing, a tenth of the training images
            takes its place, chosen by a fixed permutation. Images (n, H, W), (n, C, H, W) or (n, H, W, C) with C in
            1..4, of bool or integers; labels (n,), integers from 0.
        levels: number of levels. None: 2 for bool, and for integers that are 0 and 255 alone (which become 0 and 1);
            one more than the greatest integer where that is below 64 and the arrays are no image files; otherwise 256.
        source: named in errors.
        files: the arrays are the pixels of image files of 8 bits a channel.

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
    """Integers or bool as (n, C, H, W)."""
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
    """The number of levels, and a note where it was guessed. Images of 0 and 255 alone become 0 and 1 in place."""
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
            f"{source}: labels must be integers from 0, one for each of {count} images, got {labels.dtype} "
            f"of the shape {labels.shape}"
        )
    return torch.from_numpy(labels.astype(np.int64))
