"""What a model is trained on, and how it is measured on a split."""

import math
from typing import Any

import torch
from torch import Tensor

from fastgen.data import Dataset, Split
from fastgen.models import Autoencoder

LOGITS_AT_ONCE = 2**25  # 256 MiB in float64, of which scoring takes a few


def unit(model: Any) -> tuple[str, float]:
    """What `model.loss` is shown as, and the factor to it: bits/dim, or the squared error a dimension."""
    dims = math.prod(model.shape)
    if isinstance(model, Autoencoder):
        return "squared_error", 1 / dims
    return "bits_per_dim", 1 / (dims * math.log(2))


def check_fit(model: Any, dataset: Dataset) -> None:
    """Raises ValueError where the images are not what the model is for."""
    if model.shape != dataset.shape:
        raise ValueError(f"the images of {dataset.name} have the shape {dataset.shape}, the model's are {model.shape}")
    if model.levels != dataset.levels:
        raise ValueError(f"the images of {dataset.name} have {dataset.levels} levels, the model has {model.levels}")
    if model.n_classes is not None and (dataset.n_classes is None or dataset.n_classes > model.n_classes):
        raise ValueError(
            f"the model is conditional on {model.n_classes} classes, {dataset.name} has {dataset.n_classes or 'none'}"
        )


def batch_of(model: Any, split: Split, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Levels (n, C, H, W) int64 and the classes that the model asks for, on the device."""
    labels = None if model.n_classes is None or split.labels is None else split.labels.to(device)
    return split.images.to(device).long(), labels


def images_at_once(model: Any) -> int:
    """Images that a model scores in one pass by default: 256, or fewer where the parameters of their distributions
    would take too much memory."""
    return max(1, min(256, LOGITS_AT_ONCE // (math.prod(model.shape) * model.levels)))


@torch.no_grad()
def mean_loss(model: Any, split: Split, device: torch.device, *, batch_size: int | None = None, seed: int = 0) -> float:
    """The mean of `model.loss` over all images, with the noise of a seed; the random state stays as it is."""
    total = 0.0
    batch_size = batch_size or images_at_once(model)
    with fork_rng(device):
        torch.manual_seed(seed)
        for start in range(0, len(split), batch_size):
            part = split[start : start + batch_size]
            total += float(model.loss(*batch_of(model, part, device))) * len(part)
    return total / len(split)


def fork_rng(device: torch.device):
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
