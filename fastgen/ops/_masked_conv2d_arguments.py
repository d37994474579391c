"""The checks of a masked convolution's arguments: each error names the argument, its value and what was expected."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgen.kernels.maps import result_size

Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]  # stride, padding, dilation
ACTIVATIONS = ("none", "relu", "gated")


def as_pair(name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    """(along the height, along the width); ValueError where it is no int >= least, nor a pair of them."""
    pair = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(pair) != 2 or any(not isinstance(side, int) or side < least for side in pair):
        raise ValueError(f"{name} must be an int >= {least} or a pair of them, got {value!r}")
    return pair


def _check_float(name: str, tensor: Any, device: torch.device | None = None) -> None:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a float tensor, got {kind}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, x on {device}; expected the same device")


def check(x, weight, mask, bias, condition, residual, stride, padding, dilation, activation) -> Geometry:
    """Stride, padding and dilation in pairs, if all arguments of `masked_conv2d` fit."""
    _check_float("x", x)
    _check_float("weight", weight, x.device)
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
    geometry = (as_pair("stride", stride, 1), as_pair("padding", padding, 0), as_pair("dilation", dilation, 1))
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
            _check_float(name, tensor, x.device)
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} must have the shape {shape}, got {tuple(tensor.shape)}")
    return geometry


_checked: dict[Any, Geometry] = {}  # by all that `check` reads


def checked_geometry(*arguments: Any) -> Geometry:
    """`check`, once for each kind of call."""
    if torch.compiler.is_compiling():
        return check(*arguments)
    try:
        key = tuple([(a.shape, a.dtype, a.device) if isinstance(a, Tensor) else a for a in arguments])
        geometry = _checked.get(key)
    except TypeError:  # what cannot be hashed
        return check(*arguments)
    if geometry is None:
        geometry = check(*arguments)
        if len(_checked) >= 4096:
            _checked.clear()
        _checked[key] = geometry
    return geometry


def check_dtypes(x: Tensor, *tensors: Tensor | None) -> None:
    """tensors: weight, and so on as in `fused`."""
    dtype = x.dtype
    for tensor in tensors:
        if tensor is not None and tensor.dtype is not dtype:
            names = ("weight", "bias", "condition", "residual", "other", "other_weight")
            name = next(name for name, other in zip(names, tensors, strict=False) if other is tensor)
            raise TypeError(f"x and {name} must have the same dtype, got {dtype} and {tensor.dtype}")
