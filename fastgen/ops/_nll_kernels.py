"""The kernels of `reconstruction_nll` as operations that are differentiable, compiled and traced.

Here every image has four dimensions: params (B, P, H, W), of a softmax (B, K, C, H, W), and target (B, C, H, W).
`kept` is what a forward leaves for its backward: running maxima and sums of a softmax or a mixture.
"""

import torch
from torch import Tensor

from fastgen.ops._implementation import is_plain

KEPT = {"categorical": 2, "logistic_mixture": 4}  # numbers an element of an image, or a pixel of a mixture


def _run_forward(
    params: Tensor, target: Tensor, likelihood: str, levels: int, per_element: bool, save: bool = True
) -> tuple[Tensor, Tensor | None]:
    from fastgen.kernels.likelihood import categorical, mixture, pointwise

    target = target.view(torch.uint8) if target.dtype == torch.bool else target
    if likelihood == "logistic_mixture":
        return mixture.forward(params, target, levels, per_element, save)
    if likelihood == "categorical":
        return categorical.forward(params, target, per_element, save)
    gaussian = likelihood == "gaussian"
    return pointwise.forward(_planes(params, gaussian), target, gaussian, per_element), None


def _run_backward(
    upstream: Tensor, params: Tensor, target: Tensor, kept: Tensor | None, likelihood: str, levels: int
) -> Tensor:
    from fastgen.kernels.likelihood import categorical, mixture, pointwise

    target = target.view(torch.uint8) if target.dtype == torch.bool else target
    upstream = upstream.float()
    grad = torch.empty_like(params)
    if likelihood == "logistic_mixture":
        assert kept is not None
        mixture.backward(params, target, upstream, kept, grad, levels)
    elif likelihood == "categorical":
        assert kept is not None
        categorical.backward(params, target, upstream, kept, grad)
    else:
        gaussian = likelihood == "gaussian"
        pointwise.backward(_planes(params, gaussian), target, upstream, _planes(grad, gaussian), gaussian)
    return grad


@torch.library.custom_op("fastgen::reconstruction_nll", mutates_args=())
def _forward_operator(
    params: Tensor, target: Tensor, likelihood: str, levels: int, per_element: bool
) -> tuple[Tensor, Tensor]:
    """Nats, and what the backward takes: an empty tensor where that is nothing."""
    nll, kept = _run_forward(params, target, likelihood, levels, per_element)
    return nll, params.new_empty(0) if kept is None else kept


@_forward_operator.register_fake
def _(params: Tensor, target: Tensor, likelihood: str, levels: int, per_element: bool) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = target.shape
    channels = 1 if likelihood == "logistic_mixture" else channels
    nll = params.new_empty((batch, channels, height, width) if per_element else (batch,), dtype=torch.float32)
    if likelihood not in KEPT:
        return nll, params.new_empty(0)
    size = (batch, KEPT[likelihood], *target.shape[2 if likelihood == "logistic_mixture" else 1 :])
    return nll, params.new_empty(size, dtype=torch.float32)


@torch.library.custom_op("fastgen::reconstruction_nll_backward", mutates_args=())
def _backward_operator(
    upstream: Tensor, params: Tensor, target: Tensor, kept: Tensor, likelihood: str, levels: int
) -> Tensor:
    return _run_backward(upstream, params, target, kept, likelihood, levels)


@_backward_operator.register_fake
def _(upstream: Tensor, params: Tensor, target: Tensor, kept: Tensor, likelihood: str, levels: int) -> Tensor:
    return torch.empty_like(params)


def _planes(params: Tensor, gaussian: bool) -> Tensor:
    """A view (B, P, C, H, W): the P parameters of an element on dim 1."""
    return params.unflatten(1, (2, -1)) if gaussian else params.unsqueeze(1)


def _setup_context(ctx, inputs, output) -> None:
    params, target, ctx.likelihood, ctx.levels, _ = inputs
    ctx.save_for_backward(params, target, output[1])


def _gradients(ctx, backward, upstream):
    """Of params and target."""
    params, target, kept = ctx.saved_tensors
    if not (ctx.needs_input_grad[0] or ctx.needs_input_grad[1]):
        return None, None
    grad = backward(upstream, params, target, kept, ctx.likelihood, ctx.levels)
    if not ctx.needs_input_grad[1]:
        return grad, None
    # The mean and the target enter as a difference; a Bernoulli's nats are linear in its target.
    if ctx.likelihood == "gaussian":
        return grad, -grad.chunk(2, 1)[0].to(target.dtype)
    upstream = upstream if upstream.dim() == 4 else upstream[:, None, None, None]
    return grad, (-upstream.float() * params).to(target.dtype)


def _backward(ctx, upstream, _grad_kept):
    return *_gradients(ctx, _backward_operator, upstream), None, None, None


_forward_operator.register_autograd(_backward, setup_context=_setup_context)


class _Direct(torch.autograd.Function):
    """The kernels without operators."""

    @staticmethod
    def forward(ctx, params, target, likelihood, levels, per_element):
        nll, kept = _run_forward(params, target, likelihood, levels, per_element)
        ctx.likelihood, ctx.levels = likelihood, levels
        ctx.save_for_backward(params, target, kept)
        return nll

    @staticmethod
    def backward(ctx, upstream):
        # Where the gradient is to be differentiated, the operator says that it cannot be.
        run = _backward_operator if torch.is_grad_enabled() else _run_backward
        return *_gradients(ctx, run, upstream), None, None, None


def nll_by_kernel(params: Tensor, target: Tensor, likelihood: str, levels: int, *, per_element: bool) -> Tensor:
    """`reconstruction_nll` of arguments that have passed its checks, with fewer dimensions than four as well."""
    missing = 4 - target.dim()
    for _ in range(missing):
        params, target = params.unsqueeze(-1), target.unsqueeze(-1)
    options = (likelihood, levels, per_element)
    if not is_plain(params, target):
        nll = _forward_operator(params, target, *options)[0]
    elif torch.is_grad_enabled() and (params.requires_grad or target.requires_grad):
        nll = _Direct.apply(params, target, *options)
    else:
        nll = _run_forward(params, target, *options, save=False)[0]
    return nll.view(nll.shape[: nll.dim() - missing]) if per_element and missing else nll
