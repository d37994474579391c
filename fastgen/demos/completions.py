"""Completing images: the hidden part of an image is drawn given the part that is known."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen import plots

EACH = 4  # completions of an image


def upper_half(shape: tuple[int, int, int]) -> Tensor:
    """A bool mask (1, 1, H, W), True in the upper half of images of `shape` (C, H, W)."""
    known = torch.zeros(1, 1, *shape[1:], dtype=torch.bool)
    known[:, :, : shape[1] // 2] = True
    return known


def complete(
    sampler: Any, images: Tensor, known: Tensor, path: Path, *, condition: Tensor | None = None, **options: Any
) -> Tensor:
    """Draws EACH completions of every image and writes a PNG. Each row of it shows an image, what the model sees of it,
    and its completions.

    Args:
        sampler: a `Sampler` of a model of `fastgen.models`.
        images: levels (n, C, H, W).
        known: bool, broadcastable to (n, 1, H, W), True where a pixel is kept.
        path: the PNG to write.
        condition: classes (n,) of a class-conditional model.
        options: further arguments of `Sampler.sample`.

    Returns:
        The completed images (n * EACH, C, H, W); completions of the same image follow each other.
    """
    model = sampler.model
    device = next(model.parameters()).device
    images = images.long().to(device)
    known = known.to(device).expand(len(images), 1, *images.shape[2:])
    classes = None if condition is None else condition.to(device).repeat_interleave(EACH)
    repeated, mask = images.repeat_interleave(EACH, 0), known.repeat_interleave(EACH, 0)
    completed = sampler.sample(len(repeated), known=repeated, known_mask=mask, condition=classes, **options)
    rows = torch.cat((images[:, None], images[:, None], completed.unflatten(0, (-1, EACH))), 1)
    hidden = torch.zeros(*rows.shape[:2], 1, *images.shape[2:], dtype=torch.bool, device=device)
    hidden[:, 1] = ~known
    plots.image_grid(rows.flatten(0, 1), model.levels, path, columns=rows.shape[1], hidden=hidden.flatten(0, 1))
    return completed
