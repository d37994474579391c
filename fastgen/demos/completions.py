"""Images of which a part is hidden, drawn to their end."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen import plots

EACH = 4  # completions of an image


def upper_half(shape: tuple[int, int, int]) -> Tensor:
    """A mask (1, 1, H, W) that keeps the upper half of an image (C, H, W)."""
    known = torch.zeros(1, 1, *shape[1:], dtype=torch.bool)
    known[:, :, : shape[1] // 2] = True
    return known


def complete(
    sampler: Any, images: Tensor, known: Tensor, path: Path, *, condition: Tensor | None = None, **options: Any
) -> Tensor:
    """Draws what is hidden of images anew and writes a PNG: a row an image, then what the model sees of it, then its
    completions.

    Args:
        sampler: of `fastgen.accelerate`, for a model of `fastgen.models`.
        images: levels (n, C, H, W).
        known: bool, broadcastable to (n, 1, H, W), True where a pixel is kept.
        condition: classes (n,) of a class-conditional model.
        options: of `Sampler.sample`.

    Returns:
        The completed images (n * EACH, C, H, W), those of one image one after the other.
    """
    model = sampler.model
    device = next(model.parameters()).device
    images = images.long().to(device)
    known = known.to(device).expand(len(images), 1, *images.shape[2:])
    classes = None if condition is None else condition.to(device).repeat_interleave(EACH)
    start, mask = images.repeat_interleave(EACH, 0), known.repeat_interleave(EACH, 0)
    drawn = sampler.sample(len(start), known=start, known_mask=mask, condition=classes, **options)
    rows = torch.cat((images[:, None], images[:, None], drawn.unflatten(0, (-1, EACH))), 1)
    hidden = torch.zeros(*rows.shape[:2], 1, *images.shape[2:], dtype=torch.bool, device=device)
    hidden[:, 1] = ~known
    plots.image_grid(rows.flatten(0, 1), model.levels, path, columns=rows.shape[1], hidden=hidden.flatten(0, 1))
    return drawn
