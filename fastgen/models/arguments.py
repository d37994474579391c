"""What all models do with their arguments: checks, and levels as floats. Values of tensors are read only where
`may_read_values` allows it."""

from typing import Any

import torch
from torch import Tensor

from fastgen.ops._implementation import may_read_values


def check_shape(shape: Any) -> None:
    """Raises ValueError where the shape of an image is not three positive ints."""
    if len(shape) != 3 or any(not isinstance(size, int) or size < 1 for size in shape):
        raise ValueError(f"shape must be three positive ints (C, H, W), got {shape!r}")


def check_counts(least: int = 1, **counts: Any) -> None:
    """Raises ValueError naming the first argument that is no int, or below `least`."""
    for name, count in counts.items():
        if not isinstance(count, int) or count < least:
            raise ValueError(f"{name} must be an int >= {least}, got {count!r}")


def as_floats(x: Tensor, shape: tuple[int, ...], levels: int, dtype: torch.dtype) -> Tensor:
    """Integer levels (B, C, H, W) as floats in [-1, 1]; a float tensor is taken as encoded already.

    Raises:
        ValueError: x is not (B, *shape).
    """
    if x.dim() != 4 or tuple(x.shape[1:]) != tuple(shape):
        raise ValueError(f"x must have the shape (B, {', '.join(map(str, shape))}), got {tuple(x.shape)}")
    return x.to(dtype) if x.is_floating_point() else x.to(dtype) / (levels - 1) * 2 - 1


def check_condition(condition: Any, n_classes: int | None) -> None:
    """Raises ValueError where classes are missing, given to an unconditional model, or none of the model's, and
    TypeError where they are no integers.

    Args:
        condition: classes (B,), or one class for all. Their values are not read while `accelerate` records a pass: a
            value that is read would become a constant of the recorded network.
    """
    if condition is None and n_classes is not None:
        raise ValueError(f"condition is missing: this model needs a class in 0..{n_classes - 1} for each image")
    if condition is not None and n_classes is None:
        raise ValueError("condition was given, but this model is unconditional (n_classes=None)")
    if condition is None:
        return
    assert n_classes is not None  # as above
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
    """Raises TypeError where x is no tensor of integers, ValueError where they are not levels 0..levels - 1."""
    if not isinstance(x, Tensor) or x.is_floating_point() or x.is_complex():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must hold integer levels 0..{levels - 1}, got {kind}")
    if may_read_values(x) and x.numel() and not 0 <= int(x.min()) <= int(x.max()) < levels:
        raise ValueError(f"x must hold levels 0..{levels - 1}, got {int(x.min())}..{int(x.max())}")
