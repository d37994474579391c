"""A convolution some of whose weights are masked, with bias and activation: its definition in plain PyTorch, the
operator that visits only live weights, and the public function."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgen.kernels.maps import empty_map, result_size
from fastgen.kernels.masked_conv2d.cudnn import finish
from fastgen.ops._implementation import autocast_dtype, is_plain, under_autocast, uses_triton
from fastgen.ops._masked_conv2d_arguments import as_pairs, check, check_dtypes, check_float, known_pairs


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
    condition: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The definition: arguments and result as in `masked_conv2d`, any float dtype, differentiable by autograd."""
    live = weight if mask is None else torch.where(mask, weight, 0)
    out = F.conv2d(x, live, bias, *as_pairs(stride, padding, dilation))
    if condition is not None:
        out = out + condition[..., None, None]
    if activation == "relu":
        out = out.relu()
    if activation == "gated":
        out = gate(out)
    return out if residual is None else out + residual


def gate(pre: Tensor) -> Tensor:
    """tanh of the first half of the channels times sigmoid of the second (van den Oord et al. 2016b, equation 2)."""
    signal, valve = pre.chunk(2, -3)
    return signal.tanh() * valve.sigmoid()


# --- the operators; x (B, I, H, W), weight and mask (O, I, kh, kw)


@torch.library.custom_op("fastgen::masked_conv2d", mutates_args=())
def _operator(
    x: Tensor, weight: Tensor, mask: Tensor | None, bias: Tensor | None, condition: Tensor | None,
    residual: Tensor | None, other: Tensor | None, other_weight: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int], activation: str, keep: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `fused` below, a residual only without an activation; and what is kept: "", empty; "valve", the input of the
    gate's second half (B, O / 2, H', W'); "both" halves' (B, O, H', W'), differentiable."""
    tensors = (x, weight, mask, bias, condition, residual, other, other_weight)
    out, kept, _ = _launch().forward(*tensors, (tuple(stride), tuple(padding), tuple(dilation)), activation, keep)
    return out, x.new_empty(0) if kept is None else kept


@functools.cache
def _launch() -> Any:
    """The kernels, imported where they run: the library does without Triton."""
    from fastgen.kernels.masked_conv2d import launch

    return launch


@_operator.register_fake
def _(x, weight, mask, bias, condition, residual, other, other_weight, stride, padding, dilation, activation, keep):
    height, width = result_size(x, weight, (stride, padding, dilation))
    channels = weight.shape[0] // 2 if activation == "gated" else weight.shape[0]
    out = empty_map(x, channels, height, width)
    if not keep:
        return out, x.new_empty(0)
    return out, empty_map(x, weight.shape[0] if keep == "both" else channels, height, width)


@torch.library.custom_op("fastgen::masked_conv2d_backward", mutates_args=())
def _backward_operator(
    grad: Tensor | None, grad_pre: Tensor | None, x: Tensor, weight: Tensor, mask: Tensor | None, out: Tensor | None,
    kept: Tensor | None, other: Tensor | None, other_weight: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int], saved: str, wanted: list[bool],
) -> list[Tensor]:  # fmt: skip
    """Gradients of x, weight, bias, condition, other and other_weight, empty where not wanted."""
    tensors = (grad, grad_pre, x, weight, mask, out, kept, other, other_weight)
    geometry = (tuple(stride), tuple(padding), tuple(dilation))
    gradients = _launch().backward(*tensors, geometry, saved, tuple(wanted))
    return [x.new_empty(0) if gradient is None else gradient for gradient in gradients]


@_backward_operator.register_fake
def _(grad, grad_pre, x, weight, mask, out, kept, other, other_weight, stride, padding, dilation, saved, wanted):
    shapes = (
        lambda: empty_map(x, *x.shape[1:]),
        lambda: torch.empty_like(weight, memory_format=torch.contiguous_format),
        lambda: weight.new_empty(weight.shape[0]),
        lambda: x.new_empty(x.shape[0], weight.shape[0]),
        lambda: empty_map(other, *other.shape[1:]),
        lambda: torch.empty_like(other_weight, memory_format=torch.contiguous_format),
    )
    return [make() if asked else x.new_empty(0) for make, asked in zip(shapes, wanted, strict=True)]


def in_aten(
    x, weight, mask, bias, condition, residual, other, other_weight, stride, padding, dilation, activation, keep
) -> tuple[Tensor, Tensor]:
    """What the operator computes, written out in plain PyTorch with its own arguments, for what reads graphs."""
    pre = masked_conv2d_reference(x, weight, mask, bias, stride=stride, padding=padding, dilation=dilation)
    out, kept = finish(pre, activation, keep, condition, residual, other, other_weight)
    return out, x.new_empty(0) if kept is None else kept


def _setup_context(ctx, inputs, output) -> None:
    out, kept = output
    activation, keep = inputs[11:]
    if keep != "both":
        ctx.mark_non_differentiable(kept)
    _save(ctx, inputs[:8], tuple(map(tuple, inputs[8:11])), activation, keep, out, kept, None)


def _save(ctx, tensors, geometry, activation, keep, out, kept, plans) -> None:
    x, weight, mask, _, _, _, other, other_weight = tensors
    ctx.set_materialize_grads(False)
    ctx.geometry, ctx.saved, ctx.plans = geometry, keep or activation, plans
    out, kept = None if ctx.saved == "none" else out, kept if keep else None
    ctx.save_for_backward(x, weight, mask, other, other_weight, out, kept)


def _backward(ctx, grad, grad_kept=None):
    x, weight, mask, other, other_weight, out, kept = ctx.saved_tensors
    grad_pre = grad_kept if ctx.saved == "both" else None
    needs = ctx.needs_input_grad
    if grad is None and grad_pre is None:
        return (None,) * len(needs)
    wanted = (needs[0], needs[1], needs[3], needs[4], needs[6], needs[7])
    tensors = (grad, grad_pre, x, weight, mask, out, kept, other, other_weight)
    if not torch.is_grad_enabled() and is_plain(grad, grad_pre):
        gradients = _launch().backward(*tensors, ctx.geometry, ctx.saved, wanted, ctx.plans)
    else:
        computed = _backward_operator(*tensors, *ctx.geometry, ctx.saved, list(wanted))
        gradients = [gradient if asked else None for gradient, asked in zip(computed, wanted, strict=True)]
    x_gradient, weight_gradient, bias_gradient, condition_gradient, *others = gradients
    residual_gradient = grad if needs[5] else None
    tensors = (x_gradient, weight_gradient, None, bias_gradient, condition_gradient, residual_gradient, *others)
    return tensors + (None,) * (len(needs) - 8)


def _no_second_derivative(ctx, *grads):
    raise RuntimeError("the Triton kernel of masked_conv2d has no second derivative: use impl='reference'")


_operator.register_autograd(_backward, setup_context=_setup_context)
_backward_operator.register_autograd(_no_second_derivative)


def _check(x, weight, mask, bias, condition, residual, other, other_weight, geometry, activation) -> None:
    check(x, weight, mask, bias, condition, residual, geometry, activation)
    check_dtypes(x, weight, bias, condition, residual, other, other_weight)


class _WithoutDispatch(torch.autograd.Function):
    """The operator without its dispatch, which takes the host longer than the launches."""

    @staticmethod
    def forward(ctx, *inputs):
        geometry, activation, keep = inputs[8:]
        out, kept, plans = _launch().forward(*inputs, _check)
        _save(ctx, inputs[:8], geometry, activation, keep, out, kept, plans)
        return (out, kept) if keep == "both" else out

    backward = staticmethod(_backward)


# `Function.apply` looks for transforms of `torch.func`, which `is_plain` has excluded, and goes on to this one.
_apply_without_dispatch = super(torch.autograd.Function, _WithoutDispatch).apply


def fused(
    x: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    geometry: Any,
    activation: str,
    *,
    condition: Tensor | None = None,
    residual: Tensor | None = None,
    other: Tensor | None = None,
    other_weight: Tensor | None = None,
    keep_pre: bool = False,
) -> tuple[Tensor, Any]:
    """One launch: activation(conv(x) + conv1x1(other) + bias + condition) + residual, and what enters the activation.

    The second result is only there with keep_pre, which needs the gate. geometry: stride, padding, dilation. Other
    arguments as in `forward` of the kernels. What is given is checked once for each kind of call.

    Raises:
        TypeError, ValueError: as `masked_conv2d`.
    """
    if residual is not None and activation != "none":  # no model of the library adds one there
        _check(x, weight, mask, bias, condition, residual, other, other_weight, as_pairs(*geometry), activation)
        more: Any = {"condition": condition, "other": other, "other_weight": other_weight, "keep_pre": keep_pre}
        out, pre = fused(x, weight, mask, bias, geometry, activation, **more)
        return out + residual, pre
    tensors = (x, weight, mask, bias, condition, residual, other, other_weight)
    plain = is_plain(*tensors)
    if plain:
        geometry = known_pairs(*geometry)
    else:
        geometry = as_pairs(*geometry)
        _check(*tensors, geometry, activation)
    # Most often the map answers, which spares a generator.
    train = torch.is_grad_enabled() and (x.requires_grad or any(t is not None and t.requires_grad for t in tensors))
    keep = "both" if keep_pre else "valve" if train and activation == "gated" else ""
    if not plain:
        return _operator(*tensors, *map(list, geometry), activation, keep)
    if not train:
        return _launch().forward(*tensors, geometry, activation, keep, _check)[:2]
    # Here, so that it is kept so for the backward.
    tensors = (x.contiguous(memory_format=torch.channels_last), *tensors[1:])
    results = _apply_without_dispatch(*tensors, geometry, activation, keep)
    return results if keep == "both" else (results, None)


# --- the public function


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
    condition: Tensor | None = None,
    residual: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """activation(F.conv2d(x, weight * mask, bias, stride, padding, dilation)), visiting live weights only.

    The kernel runs with float32 sums; float32 inputs are multiplied in TF32 where PyTorch's setting for convolutions
    says so. Results repeat to the last bit. For the backward it stores, besides x, weight and result: with a gate, half
    of what eager PyTorch stores; otherwise nothing. Maps that are not channels-last are copied.

    The first call with a mask reads it, and the first with a shape compares the kernel with cuDNN on the GPU, which
    waits for it; later calls do not. Where cuDNN is expected to be faster, or was measured so on the GPU
    (`python -m fastgen.kernels.masked_conv2d.tune`), or the kernel fails its check, cuDNN computes the sums;
    `MaskedConv2d.provider(x)` tells. With a gate in bfloat16 tanh and sigmoid come from the GPU's special function
    unit, to 2^-11.

    Args:
        x: (B, I, H, W) or (I, H, W), any float dtype and any strides.
        weight: (O, I, kh, kw). Masked weights take no part whatever their value; their gradient is exactly zero.
        mask: BoolTensor of the shape of weight, True where the weight is used; None for all of them.
        bias: (O,) or None.
        stride, padding, dilation: as in `F.conv2d`, an int or a pair of them.
        activation: "none", "relu", or "gated": tanh(first half of the channels) * sigmoid(second half), which leaves
            O / 2 channels (van den Oord et al. 2016b, equation 2).
        condition: (B, O), or (O,) for one image, an image's own bias: the class-conditional one of the Gated PixelCNN
            (equation 3), say. Added before the activation.
        residual: of the shape of the result, added to it.
        impl: "auto" is Triton on CUDA tensors (not for float64, nor inside a transform of `torch.func`), the PyTorch
            definition elsewhere.

    Returns:
        (B, O, H', W') or (B, O / 2, H', W'), of the dtype of x (under autocast: the autocast dtype).

    Raises:
        TypeError: x, weight or another is no float tensor, mask no bool tensor, or dtypes differ (outside autocast).
        ValueError: shapes, devices or options that do not fit; more than about 2^31 pixels for the kernel.
        RuntimeError: impl="triton" where it cannot run; a second derivative of the kernel; a mask or a shape that is
            seen for the first time while a CUDA graph is captured.
    """
    if not isinstance(x, Tensor):
        check_float("x", x)  # all else is checked once for each kind of call
    triton, cast, geometry = runs_triton(impl, x), autocast_dtype(x) is not None, (stride, padding, dilation)
    single = x.dim() == 3
    if cast or single or not triton:
        geometry = as_pairs(*geometry)
        check(x, weight, mask, bias, condition, residual, geometry, activation)
    if cast:
        x, weight, bias, condition, residual = under_autocast(x, weight, bias, condition, residual)
    if not triton:
        check_dtypes(x, weight, bias, condition, residual)
        options: Any = dict(zip(("stride", "padding", "dilation"), geometry, strict=True))
        options |= {"activation": activation, "condition": condition, "residual": residual}
        return masked_conv2d_reference(x, weight, mask, bias, **options)
    if single:
        x, condition, residual = (None if t is None else t.unsqueeze(0) for t in (x, condition, residual))  # type: ignore[assignment]
    out = fused(x, weight, mask, bias, geometry, activation, condition=condition, residual=residual)[0]
    return out.squeeze(0) if single else out


def runs_triton(impl: str, x: Tensor) -> bool:
    """`uses_triton`, with what the operator does not take left to the definition: float64, and the transforms of
    `torch.func`, which cannot differentiate an operator of torch.library.

    Raises:
        TypeError: impl="triton" for float64.
    """
    if not uses_triton(impl, x):
        return False
    if impl == "triton":
        if x.dtype == torch.float64:
            raise TypeError("x is float64, which the Triton kernel does not take: use impl='auto' or 'reference'")
        return True
    transformed = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
    return x.dtype != torch.float64 and not transformed
