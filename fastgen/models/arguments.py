"""Checks of arguments that all models share. Values of tensors are read only where `may_read_values` allows it."""

from typing import Any

import torch
from torch import Tensor

from fastgen.ops._implementation import may_read_values


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
    found = torch.tensor(condition) if type(condition) is int else condition
    if not isinstance(found, Tensor) or found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        kind = found.dtype if isinstance(found, Tensor) else type(found).__name__
        raise TypeError(f"condition must be an integer tensor of classes 0..{n_classes - 1}, got {kind}")
    if not may_read_values(found) or torch._C._len_torch_dispatch_stack() > 0 or not found.numel():
        return
    if not 0 <= int(found.min()) <= int(found.max()) < n_classes:
        raise ValueError(f"condition must hold classes 0..{n_classes - 1}, got {int(found.min())}..{int(found.max())}")


def check_levels(x: Any, levels: int) -> None:
    """Raises TypeError where x is no tensor of integers, ValueError where they are not levels 0..levels - 1."""
    if not isinstance(x, Tensor) or x.is_floating_point() or x.is_complex():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must hold integer levels 0..{levels - 1}, got {kind}")
    if may_read_values(x) and x.numel() and not 0 <= int(x.min()) <= int(x.max()) < levels:
        raise ValueError(f"x must hold levels 0..{levels - 1}, got {int(x.min())}..{int(x.max())}")
