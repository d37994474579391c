"""The checks of a masked convolution's arguments: each error names the argument, its value and what was expected."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgen.kernels.maps import result_size

Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]  # stride, padding, dilation
ACTIVATIONS = ("none", "relu", "gated")


def as_pairs(stride: Any, padding: Any, dilation: Any) -> Geometry:
    """Each as a pair; ValueError where one is out of range."""
    return as_pair("stride", stride, 1), as_pair("padding", padding, 0), as_pair("dilation", dilation, 1)


_as_pairs = functools.lru_cache(4096, typed=True)(as_pairs)


def known_pairs(stride: Any, padding: Any, dilation: Any) -> Geometry:
    """`as_pairs`, once for all calls with the same."""
    try:
        return _as_pairs(stride, padding, dilation)
    except TypeError:  # a list
        return as_pairs(stride, padding, dilation)


def as_pair(name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    """(along the height, along the width); ValueError where it is no int >= least, nor a pair of them."""
    pair = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(pair) != 2 or any(not isinstance(side, int) or side < least for side in pair):
        raise ValueError(f"{name} must be an int >= {least} or a pair of them, got {value!r}")
    return pair


def check_float(name: str, tensor: Any, device: torch.device | None = None) -> None:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a float tensor, got {kind}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, x on {device}; expected the same device")


def check(x, weight, mask, bias, condition, residual, geometry: Geometry, activation) -> None:
    """Raises TypeError or ValueError where the arguments of `masked_conv2d` do not fit."""
    check_float("x", x)
    check_float("weight", weight, x.device)
    if weight.dim() != 4:
        raise ValueError(f"weight must have the shape (O, I, kh, kw), got {tuple(weight.shape)}")
    if x.dim() not in (3, 4) or x.shape[-3] != weight.shape[1]:
        raise ValueError(
            f"x must have the shape (B, {weight.shape[1]}, H, W) or ({weight.shape[1]}, H, W) for a weight of the "
            f"shape {tuple(weight.shape)}, got {tuple(x.shape)}"
        )
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask must be a bool tensor, True where the weight is used, got {kind}")
        if mask.shape != weight.shape:
            raise ValueError(f"mask must have the shape of weight, {tuple(weight.shape)}, got {tuple(mask.shape)}")
        if mask.device != x.device:
            raise ValueError(f"mask is on {mask.device}, x on {x.device}; expected the same device")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    if activation == "gated" and weight.shape[0] % 2:
        raise ValueError(
            f"activation='gated' halves the channels: weight needs an even number, got {tuple(weight.shape)}"
        )
    for axis, side in ((-2, "height"), (-1, "width")):
        reach = geometry[2][axis] * (weight.shape[axis] - 1) + 1
        if x.shape[axis] + 2 * geometry[1][axis] < reach:
            raise ValueError(
                f"x has the {side} {x.shape[axis]}, with padding {x.shape[axis] + 2 * geometry[1][axis]}, which is "
                f"less than the {reach} that the kernel covers"
            )
    channels = weight.shape[0] // 2 if activation == "gated" else weight.shape[0]
    for name, tensor, shape in (
        ("bias", bias, (weight.shape[0],)),
        ("condition", condition, (*x.shape[:-3], weight.shape[0])),
        ("residual", residual, (*x.shape[:-3], channels, *result_size(x, weight, geometry))),
    ):
        if tensor is not None:
            check_float(name, tensor, x.device)
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} must have the shape {shape}, got {tuple(tensor.shape)}")


def check_dtypes(x: Tensor, *tensors: Tensor | None) -> None:
    """tensors: weight, and so on as in `fused`."""
    dtype = x.dtype
    for tensor in tensors:
        if tensor is not None and tensor.dtype is not dtype:
            names = ("weight", "bias", "condition", "residual", "other", "other_weight")
            name = next(name for name, other in zip(names, tensors, strict=False) if other is tensor)
            raise TypeError(f"x and {name} must have the same dtype, got {dtype} and {tensor.dtype}")
