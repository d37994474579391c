"""Splits of images as tensors, and the rules by which arrays from anywhere become one."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

HELD_OUT = 10  # one image in ten, for each of validation and test that a source does not have


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
        name: as given to `load`.
        levels: number of levels of a channel; images hold 0..levels - 1.
        n_classes: number of classes, None where there are no labels.
        attribution: who made the images, where their licence asks to say so.
    """

    name: str
    levels: int
    n_classes: int | None
    train: Split
    validation: Split
    test: Split
    attribution: str = ""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width


def assemble(
    splits: dict[str, tuple[np.ndarray, np.ndarray | None]], levels: int | None = None, source: str = "data"
) -> Dataset:
    """A data set of arrays: images and labels by split.

    Args:
        splits: "train", "validation" and "test"; where one of the last two is missing, a tenth of the training images
            takes its place, chosen by a fixed permutation. Images (n, H, W), (n, C, H, W) or (n, H, W, C) with
            C = 1 or 3, of bool or integers; labels (n,), integers from 0.
        levels: number of levels; default 2 for bool, otherwise 256.
        source: named in errors.

    Raises:
        ValueError: arrays are not as above, or splits differ in shape.
    """
    if "train" not in splits:
        raise ValueError(f"{source}: has no training images")
    if levels is None:
        levels = 2 if all(images.dtype == np.bool_ for images, _ in splits.values()) else 256
    found = {name: _split(*arrays, levels, f"{source}: {name}") for name, arrays in splits.items()}
    missing = [name for name in ("test", "validation") if name not in found]
    if missing:
        train = found["train"]
        count = max(1, len(train) // HELD_OUT)
        if len(train) <= count * len(missing):
            raise ValueError(f"{source}: {len(train)} images are too few to hold some out for {' and '.join(missing)}")
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
        for number, name in enumerate(missing):
            found[name] = train[order[number * count : (number + 1) * count].sort().values]
        found["train"] = train[order[len(missing) * count :].sort().values]
    shapes = {name: tuple(split.images.shape[1:]) for name, split in found.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"{source}: the images of its splits differ in shape: {shapes}")
    labels = [split.labels for split in found.values()]
    n_classes = None
    if all(part is not None for part in labels):
        n_classes = int(torch.cat([part for part in labels if part is not None]).max()) + 1
    return Dataset(source, levels, n_classes, found["train"], found["validation"], found["test"])


def _split(images: np.ndarray, labels: np.ndarray | None, levels: int, source: str) -> Split:
    if images.dtype != np.bool_ and not np.issubdtype(images.dtype, np.integer):
        raise ValueError(f"{source}: images must be bool or integers, got {images.dtype}")
    given = images.shape
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise ValueError(
            f"{source}: images must have the shape (n, H, W), (n, C, H, W) or (n, H, W, C) with C = 1 or 3 and "
            f"nothing empty, got {given}"
        )
    if images.min() < 0 or images.max() >= levels:
        raise ValueError(f"{source}: levels must be 0..{levels - 1}, got {images.min()}..{images.max()}")
    classes = None
    if labels is not None:
        if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
            raise ValueError(
                f"{source}: labels must be integers from 0, one for each of {len(images)} images, got {labels.dtype} "
                f"of the shape {labels.shape}"
            )
        classes = torch.from_numpy(labels.astype(np.int64))
    return Split(torch.from_numpy(np.ascontiguousarray(images.astype(np.uint8))), classes)
