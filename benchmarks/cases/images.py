"""The images that whole models are measured on: digits, patches of photographs, random ones of CIFAR-10's shape."""

import importlib.util

import torch
from torch import Tensor

Shape = tuple[int, int, int]
SHAPES: dict[str, Shape] = {"digits": (1, 8, 8), "patches": (3, 32, 32), "random": (3, 32, 32)}
LEVELS = {"digits": 17, "patches": 256, "random": 256}
# The first two are scikit-learn's. Without it there are only random images.
AVAILABLE = [name for name in SHAPES if name == "random" or importlib.util.find_spec("sklearn")]


def images(data: str, shape: Shape, levels: int, batch: int, device: torch.device) -> Tensor:
    """The first images to train on, or random levels: uint8 (batch, C, H, W).

    Raises:
        ValueError: the data set has fewer images, or others.
    """
    if data == "random":
        return torch.randint(levels, (batch, *shape), dtype=torch.uint8, device=device)
    from fastgen.data import load

    found = load(data).train.images[:batch]
    if tuple(found.shape) != (batch, *shape):
        raise ValueError(f"{data} has no {batch} images {shape}, found {tuple(found.shape)}")
    return found.to(device)
