"""Checks of the models' arguments, and the conversion of levels to floats. The checks read the values of a tensor only
if `may_read_values` allows it."""

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fastgen.ops._implementation import may_read_values


def check_shape(shape: Any) -> None:
    """Raises ValueError if `shape` is not three positive ints (C, H, W)."""
    is_triple = isinstance(shape, (tuple, list)) and len(shape) == 3
    if not is_triple or any(not isinstance(size, int) or size < 1 for size in shape):
        raise ValueError(f"shape must be three positive ints (C, H, W), got {shape!r}")


def check_counts(least: int = 1, **counts: Any) -> None:
    """Raises ValueError, naming the argument, if one of `counts` is not an int or is below `least`."""
    for name, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < least:
            raise ValueError(f"{name} must be an int >= {least}, got {count!r}")


def check_dropout(dropout: Any) -> None:
    """Raises ValueError if `dropout` is not a number in [0, 1]."""
    if not isinstance(dropout, Real) or not 0 <= float(dropout) <= 1:
        raise ValueError(f"dropout must be a number in [0, 1], got {dropout!r}")


def check_latents(latent_dim: int, **latents: Any) -> None:
    """Raises ValueError, naming the argument, if one of `latents` is not a tensor (B, latent_dim)."""
    for name, z in latents.items():
        if not isinstance(z, Tensor) or z.dim() != 2 or z.shape[1] != latent_dim:
            got = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
            raise ValueError(f"{name} must be a tensor of the shape (B, {latent_dim}), got {got}")


def as_floats(x: Tensor, shape: tuple[int, ...], levels: int, dtype: torch.dtype) -> Tensor:
    """Converts integer levels (B, C, H, W) to floats in [-1, 1] of `dtype`. A float tensor counts as converted already.

    Raises:
        ValueError: x is not (B, *shape).
    """
    if x.dim() != 4 or tuple(x.shape[1:]) != tuple(shape):
        raise ValueError(f"x must have the shape (B, {', '.join(map(str, shape))}), got {tuple(x.shape)}")
    return x.to(dtype) if x.is_floating_point() else x.to(dtype) / (levels - 1) * 2 - 1


def check_condition(condition: Any, n_classes: int | None) -> None:
    """Checks the classes that a model is given. Their values are not read while `accelerate` records a pass: a value
    that is read would become a constant of the recorded network.

    Args:
        condition: classes (B,), one class for all images, or None.
        n_classes: number of classes of the model; None for an unconditional model.

    Raises:
        ValueError: classes are missing, out of range, or given to an unconditional model.
        TypeError: classes are not integers.
    """
    if condition is None and n_classes is not None:
        raise ValueError(f"condition is missing: this model needs a class in 0..{n_classes - 1} for each image")
    if condition is not None and n_classes is None:
        raise ValueError("condition was given, but this model is unconditional (n_classes=None)")
    if condition is None:
        return
    assert n_classes is not None  # otherwise it has raised above
    classes = torch.tensor(condition) if type(condition) is int else condition
    if (
        not isinstance(classes, Tensor)
        or classes.is_floating_point()
        or classes.is_complex()
        or classes.dtype == torch.bool
    ):
        kind = classes.dtype if isinstance(classes, Tensor) else type(classes).__name__
        raise TypeError(f"condition must be an integer tensor of classes 0..{n_classes - 1}, got {kind}")
    if not may_read_values(classes) or torch._C._len_torch_dispatch_stack() > 0 or not classes.numel():
        return
    if not 0 <= int(classes.min()) <= int(classes.max()) < n_classes:
        raise ValueError(
            f"condition must hold classes 0..{n_classes - 1}, got {int(classes.min())}..{int(classes.max())}"
        )


def check_levels(x: Any, levels: int) -> None:
    """Raises TypeError if x is not a tensor of integers, ValueError if a value is not in 0..levels - 1."""
    if not isinstance(x, Tensor) or x.is_floating_point() or x.is_complex():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must hold integer levels 0..{levels - 1}, got {kind}")
    if may_read_values(x) and x.numel() and not 0 <= int(x.min()) <= int(x.max()) < levels:
        raise ValueError(f"x must hold levels 0..{levels - 1}, got {int(x.min())}..{int(x.max())}")
