"""A convolution some of whose weights are masked out, with bias and activation: the definition in plain PyTorch, the
operator that visits only live weights, the public function."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgen.ops._implementation import uses_triton

ACTIVATIONS = ("none", "relu", "gated")


def masked_conv2d_reference(
    x: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    activation: str = "none",
) -> Tensor:
    """The definition: arguments and result as in `masked_conv2d`, any float dtype, differentiable by autograd."""
    live = weight if mask is None else torch.where(mask, weight, 0)
    geometry = (as_pair("stride", stride, 1), as_pair("padding", padding, 0), as_pair("dilation", dilation, 1))
    out = F.conv2d(x, live, bias, *geometry)
    if activation == "relu":
        return out.relu()
    return gate(out) if activation == "gated" else out


def gate(pre: Tensor) -> Tensor:
    """tanh of the first half of the channels times sigmoid of the second (van den Oord et al. 2016b, equation 2)."""
    signal, valve = pre.chunk(2, -3)
    return signal.tanh() * valve.sigmoid()


# --- the operators; x (B, I, H, W), weight and mask (O, I, kh, kw)


@torch.library.custom_op("fastgen::masked_conv2d", mutates_args=())
def _operator(
    x: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """The result and, where `save` asks for it, what the gate needs in the backward: its input (B, O, H', W')."""
    from fastgen.kernels.masked_conv2d import masked_conv2d_forward

    return masked_conv2d_forward(x, weight, mask, bias, stride, padding, dilation, activation, save)


@_operator.register_fake
def _(x, weight, mask, bias, stride, padding, dilation, activation, save):
    size = _out_size(x, weight, stride, padding, dilation)
    channels = weight.shape[0] // 2 if activation == "gated" else weight.shape[0]
    pre = _empty_maps(x, weight.shape[0], size) if save and activation == "gated" else x.new_empty(0)
    return _empty_maps(x, channels, size), pre


@torch.library.custom_op("fastgen::masked_conv2d_backward", mutates_args=())
def _backward_operator(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    kept: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    activation: str,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, empty where not wanted; kept: the output (relu), the gate's input (gated)."""
    from fastgen.kernels.masked_conv2d import masked_conv2d_backward

    return masked_conv2d_backward(grad, x, weight, mask, kept, stride, padding, dilation, activation, wanted)


@_backward_operator.register_fake
def _(grad, x, weight, mask, kept, stride, padding, dilation, activation, wanted):
    return (
        _empty_maps(x, x.shape[1], x.shape[2:]) if wanted[0] else x.new_empty(0),
        torch.empty_like(weight, memory_format=torch.contiguous_format) if wanted[1] else x.new_empty(0),
        weight.new_empty(weight.shape[0]) if wanted[2] else x.new_empty(0),
    )


def _out_size(x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]) -> list[int]:
    return [
        (x.shape[2 + axis] + 2 * padding[axis] - dilation[axis] * (weight.shape[2 + axis] - 1) - 1) // stride[axis] + 1
        for axis in range(2)
    ]


def _empty_maps(like: Tensor, channels: int, size) -> Tensor:
    """(B, channels, *size), uninitialized, in the layout that the kernels write: channels-last."""
    return like.new_empty((like.shape[0], *size, channels)).permute(0, 3, 1, 2)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, mask, bias, ctx.stride, ctx.padding, ctx.dilation, ctx.activation, _ = inputs
    out, pre = output
    ctx.mark_non_differentiable(pre)
    ctx.with_bias = bias is not None
    kept = {"none": None, "relu": out, "gated": pre}[ctx.activation]
    ctx.save_for_backward(x, weight, mask, kept)


def _backward(ctx, grad, _grad_pre):
    x, weight, mask, kept = ctx.saved_tensors
    needs = ctx.needs_input_grad
    wanted = [needs[0], needs[1], needs[3] and ctx.with_bias]
    kept = x.new_empty(0) if kept is None else kept
    geometry = (ctx.stride, ctx.padding, ctx.dilation)
    grads = _backward_operator(grad, x, weight, mask, kept, *geometry, ctx.activation, wanted)
    of_x, of_weight, of_bias = (one if asked else None for one, asked in zip(grads, wanted, strict=True))
    return of_x, of_weight, None, of_bias, None, None, None, None, None


_operator.register_autograd(_backward, setup_context=_setup_context)


# --- the public function


def as_pair(name: str, value: int | Sequence[int], least: int) -> list[int]:
    """[along the height, along the width]; ValueError where it is no int >= least, nor a pair of them."""
    pair = [value, value] if isinstance(value, int) else list(value) if isinstance(value, (tuple, list)) else []
    if len(pair) != 2 or any(not isinstance(one, int) or one < least for one in pair):
        raise ValueError(f"{name} must be an int >= {least} or a pair of them, got {value!r}")
    return pair


def _check(x: Tensor, weight: Tensor, mask: Tensor | None, bias: Tensor | None, activation: str) -> None:
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is None and name == "bias":
            continue
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a float tensor, got {kind}")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool):
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool tensor, True where the weight is used, got {kind}")
    if weight.dim() != 4:
        raise ValueError(f"weight must have the shape (O, I, kh, kw), got {tuple(weight.shape)}")
    if x.dim() not in (3, 4) or x.shape[-3] != weight.shape[1]:
        raise ValueError(
            f"x must have the shape (B, {weight.shape[1]}, H, W) or ({weight.shape[1]}, H, W) for a weight of the "
            f"shape {tuple(weight.shape)}, got {tuple(x.shape)}"
        )
    if mask is not None and mask.shape != weight.shape:
        raise ValueError(f"mask must have the shape of weight, {tuple(weight.shape)}, got {tuple(mask.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have the shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    for name, tensor in (("weight", weight), ("mask", mask), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}; expected the same device")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    if activation == "gated" and weight.shape[0] % 2:
        raise ValueError(
            f"activation='gated' halves the channels: weight needs an even number, got {tuple(weight.shape)}"
        )


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    activation: str = "none",
    impl: str = "auto",
) -> Tensor:
    """activation(F.conv2d(x, weight * mask, bias, stride, padding, dilation)), visiting live weights only.

    Args:
        x: (B, I, H, W) or (I, H, W), any float dtype and any strides.
        weight: (O, I, kh, kw). Masked weights take no part whatever their value; their gradient is exactly zero.
        mask: BoolTensor of the shape of weight, True where the weight is used; None for all of them.
        bias: (O,) or None.
        stride, padding, dilation: as in `F.conv2d`, an int or a pair of them.
        activation: "none", "relu", or "gated": tanh(first half of the channels) * sigmoid(second half), which leaves
            O / 2 channels (van den Oord et al. 2016b, equation 2).
        impl: "auto" is Triton on CUDA tensors (not for float64), the PyTorch definition elsewhere.

    Returns:
        (B, O, H', W') or (B, O / 2, H', W'), of the dtype of x (under autocast: the autocast dtype).

    Raises:
        TypeError: x, weight or bias is no float tensor, mask no bool tensor, or dtypes differ (outside autocast).
        ValueError: shapes, devices or options that do not fit.
        RuntimeError: impl="triton" where it cannot run.
    """
    _check(x, weight, mask, bias, activation)
    geometry = [as_pair("stride", stride, 1), as_pair("padding", padding, 0), as_pair("dilation", dilation, 1)]
    for axis, side in ((-2, "height"), (-1, "width")):
        reach = geometry[2][axis] * (weight.shape[axis] - 1) + 1
        if x.shape[axis] + 2 * geometry[1][axis] < reach:
            raise ValueError(
                f"x has the {side} {x.shape[axis]}, with padding {x.shape[axis] + 2 * geometry[1][axis]}, which is "
                f"less than the {reach} that the kernel covers"
            )
    x, weight, bias = _under_autocast(x, weight, bias)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(f"x and {name} must have the same dtype, got {x.dtype} and {tensor.dtype}")
    if not _runs_triton(impl, x):
        options = {"stride": geometry[0], "padding": geometry[1], "dilation": geometry[2]}
        return masked_conv2d_reference(x, weight, mask, bias, activation=activation, **options)
    tensors = [x, weight] + ([] if bias is None else [bias])
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    batch = x if x.dim() == 4 else x.unsqueeze(0)
    out = _operator(batch, weight, mask, bias, *geometry, activation, save)[0]
    return out if x.dim() == 4 else out.squeeze(0)


def _under_autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """All in the autocast dtype where autocast is on, as `F.conv2d` takes them; float64 stays."""
    kind = x.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    if not autocast or torch.float64 in (x.dtype, weight.dtype):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(kind)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _runs_triton(impl: str, x: Tensor) -> bool:
    """`uses_triton`, with float64 left to the definition; TypeError where impl="triton" asks for it."""
    triton = uses_triton(impl, x)
    if triton and x.dtype == torch.float64:
        if impl == "triton":
            raise TypeError("x is float64, which the Triton kernel does not take: use impl='auto' or 'reference'")
        return False
    return triton
