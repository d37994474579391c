"""Images whose lower half is hidden, drawn to their end."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen import plots
from fastgen.data import Split

EACH = 4  # completions of an image


def complete_halves(sampler: Any, split: Split, path: Path, **options: Any) -> Tensor:
    """Draws the lower halves of images anew and writes a PNG: a row an image, then what the model sees of it, then
    its completions.

    Args:
        sampler: of `fastgen.accelerate`, for a model of `fastgen.models`.
        split: the images, and their classes where the model is conditional.
        options: of `Sampler.sample`.

    Returns:
        The completed images (n * EACH, C, H, W), those of one image one after the other.
    """
    model = sampler.model
    device = next(model.parameters()).device
    images = split.images.long().to(device)
    upper = torch.zeros(1, 1, images.shape[2], 1, dtype=torch.bool, device=device)
    upper[:, :, : images.shape[2] // 2] = True
    condition = None
    if model.n_classes is not None and split.labels is not None:
        condition = split.labels.to(device).repeat_interleave(EACH)
    known = images.repeat_interleave(EACH, 0)
    drawn = sampler.sample(len(known), known=known, known_mask=upper, condition=condition, **options)
    rows = torch.cat((images[:, None], images[:, None], drawn.unflatten(0, (-1, EACH))), 1)
    hidden = torch.zeros(*rows.shape[:2], 1, *images.shape[2:], dtype=torch.bool, device=device)
    hidden[:, 1] = ~upper
    plots.image_grid(rows.flatten(0, 1), model.levels, path, columns=rows.shape[1], hidden=hidden.flatten(0, 1))
    return drawn
