"""`shift_right`: for models whose output at a place is of the next one, as of language models."""

import math
import numbers
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor


def shift_right(start: int | float) -> Callable[[Tensor], Tensor]:
    """An `encode` for `fastgen.accelerate`: the model is given `start`, then all levels but the last.

    Its output at a place is then of that place, given all before it: logits[:, t] of tokens[:, t].

        fastgen.accelerate(gpt, (T,), distribution=fastgen.Categorical(K, "BTK"), encode=fastgen.shift_right(0))

    Args:
        start: what comes before the first place: the token that the model was trained to begin with, or any, where
            the first tokens are given as `known`. Grids (H, W) are shifted in raster order.

    Raises:
        TypeError: start is not a number.
        ValueError: start is not finite; the returned function raises it for images with channels (B, C, H, W).
    """
    if not isinstance(start, numbers.Real) or isinstance(start, bool):
        raise TypeError(f"start must be a number, got {start!r}")
    if not math.isfinite(start):
        raise ValueError(f"start must be finite, got {start!r}")
    return partial(_shifted, start=start)


def _shifted(levels: Tensor, start: int | float) -> Tensor:
    if levels.dim() > 3:
        raise ValueError(f"shift_right is for sequences (B, T) and grids (B, H, W), got {tuple(levels.shape)}")
    if not levels.is_floating_point() and start != int(start):
        raise ValueError(f"start must be an integer, as the levels are, got {start}")
    row = levels.flatten(1)
    return torch.cat((torch.full_like(row[:, :1], start), row[:, :-1]), 1).view(levels.shape)
