"""Exact negative log-likelihood of an image given a decoder's parameters: Bernoulli, Gaussian, softmax over levels, and
PixelCNN++'s discretized mixture of logistics. The definition in plain PyTorch, the operator, the public function."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgen.ops._implementation import is_plain, may_read_values, uses_triton

LIKELIHOODS = ("bernoulli", "gaussian", "categorical", "logistic_mixture")
REDUCTIONS = ("sample", "none")
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

MIN_LOG_SCALE = -7.0  # PixelCNN++ bounds the log-scales from below here
LOG_VARIANCE_RANGE = (-100.0, 80.0)  # the range in which exp(-log_variance / 2) and its square stay in float32
# Finite parameters must give finite likelihoods and gradients: what exceeds these saturates (no gradient beyond).
LOGIT_LIMIT = 1e30
DEVIATION_LIMIT = 1e15


def reconstruction_nll_reference(
    params: Tensor,
    target: Tensor,
    likelihood: str = "bernoulli",
    *,
    levels: int = 256,
    reduction: str = "sample",
    compat: str | None = None,
) -> Tensor:
    """The definition: arguments and result as in `reconstruction_nll`, any float dtype, differentiable by autograd."""
    if params.dtype != torch.float64:
        params = params.float()
    if likelihood == "bernoulli":
        nll = _bernoulli(params, target)
    elif likelihood == "gaussian":
        nll = _gaussian(params, target)
    elif likelihood == "categorical":
        nll = _categorical(params, target)
    elif compat == "pixelcnn++":
        nll = _pixelcnnpp(params, target)
    else:
        nll = _logistic_mixture(params, target, levels)
    return nll if reduction == "none" else nll.unsqueeze(-1).flatten(1).sum(1)


def _bernoulli(logits: Tensor, target: Tensor) -> Tensor:
    logits = logits.clamp(-LOGIT_LIMIT, LOGIT_LIMIT)
    target = target.to(logits.dtype)
    return -(target * F.logsigmoid(logits) + (1 - target) * F.logsigmoid(-logits))


def _gaussian(params: Tensor, target: Tensor) -> Tensor:
    mean, log_variance = params.chunk(2, 1)
    log_variance = log_variance.clamp(*LOG_VARIANCE_RANGE)
    difference = (target.to(mean.dtype) - mean).clamp(-DEVIATION_LIMIT, DEVIATION_LIMIT)
    deviation = (difference * torch.exp(-0.5 * log_variance)).clamp(-DEVIATION_LIMIT, DEVIATION_LIMIT)
    return 0.5 * (deviation.square() + log_variance + math.log(2 * math.pi))


def _categorical(logits: Tensor, target: Tensor) -> Tensor:
    logits = logits.clamp(-LOGIT_LIMIT, LOGIT_LIMIT)
    return -logits.log_softmax(1).gather(1, target.long().unsqueeze(1)).squeeze(1)


def split_mixture(params: Tensor, channels: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Logits (B, M, ...), means and log-scales (B, C, M, ...), coefficients (B, 3, M, ...) or None for one channel."""
    n_mix = params.shape[1] // (10 if channels == 3 else 3)
    of_colour = params[:, n_mix:].unflatten(1, (channels, -1, n_mix))
    coefficients = of_colour[:, :, 2].tanh() if channels == 3 else None
    logits = params[:, :n_mix].clamp(-LOGIT_LIMIT, LOGIT_LIMIT)
    means = of_colour[:, :, 0].clamp(-DEVIATION_LIMIT, DEVIATION_LIMIT)
    return logits, means, of_colour[:, :, 1].clamp(MIN_LOG_SCALE, LOGIT_LIMIT), coefficients


def component_mean(channel: int, means: Tensor, coefficients: Tensor | None, x: Tensor) -> Tensor:
    """Means (B, M, ...) of one colour given the colours before it in x (B, C, 1, ...), PixelCNN++ equation 3."""
    mean = means[:, channel]
    if coefficients is None or channel == 0:
        return mean
    if channel == 1:
        return mean + coefficients[:, 0] * x[:, 0]
    return mean + coefficients[:, 1] * x[:, 0] + coefficients[:, 2] * x[:, 1]


def _logistic_mixture(params: Tensor, target: Tensor, levels: int) -> Tensor:
    """Exact: log(sigmoid(a) - sigmoid(b)) = logsigmoid(a) + logsigmoid(-b) + log(1 - exp(b - a)), with the two ends of
    a level's bin at a and b in units of the component's scale, so that no threshold is needed anywhere."""
    half = (levels - 1) / 2
    level = target.to(params.dtype).unsqueeze(2)
    logits, means, log_scales, coefficients = split_mixture(params, target.shape[1])
    log_joint = logits.log_softmax(1)
    for channel in range(target.shape[1]):
        mean = component_mean(channel, means, coefficients, level / half - 1)
        log_scale = log_scales[:, channel]
        width = torch.exp(-log_scale) / half  # of a level, in scales
        # Distance from the mean in levels. Where they are close, half * mean = (levels / 2 - 1 / 2) * mean taken in
        # two steps keeps the digits that a level / half - 1 rounded to float32 has lost.
        distance = (level[:, channel] - half - (levels / 2) * mean) + 0.5 * mean
        upper = F.logsigmoid((distance + 0.5) * width)
        lower = F.logsigmoid(-(distance - 0.5) * width)
        # log(1 - exp(-width)); for wide scales as log(width) + log((1 - exp(-width)) / width), without underflow.
        small = width.clamp(1e-30, 1)
        wide = torch.log(-torch.expm1(-small) / small) - log_scale - math.log(half)
        log_width = torch.where(width > 1, torch.log1p(-torch.exp(-width.clamp(min=1))), wide)
        first, last = level[:, channel] == 0, level[:, channel] == levels - 1
        log_probability = torch.where(first, upper, torch.where(last, lower, upper + lower + log_width))
        log_joint = log_joint + log_probability
    return -log_joint.logsumexp(1, keepdim=True)


def _pixelcnnpp(params: Tensor, target: Tensor) -> Tensor:
    """The published recipe: a difference of sigmoids, and where that is below 1e-5 the density times the bin width."""
    x = target.to(params.dtype).unsqueeze(2) / 127.5 - 1
    logits, means, log_scales, coefficients = split_mixture(params, target.shape[1])
    log_joint = logits.log_softmax(1)
    for channel in range(target.shape[1]):
        centred = x[:, channel] - component_mean(channel, means, coefficients, x)
        inverse_scale = torch.exp(-log_scales[:, channel])
        middle = inverse_scale * centred
        upper = inverse_scale * (centred + 1 / 255)
        lower = inverse_scale * (centred - 1 / 255)
        difference = upper.sigmoid() - lower.sigmoid()
        density = middle - log_scales[:, channel] - 2 * F.softplus(middle) - math.log(127.5)
        inside = torch.where(difference > 1e-5, difference.clamp(min=1e-12).log(), density)
        last = torch.where(x[:, channel] > 0.999, -F.softplus(lower), inside)
        log_joint = log_joint + torch.where(x[:, channel] < -0.999, upper - F.softplus(upper), last)
    return -log_joint.logsumexp(1, keepdim=True)


# --- the operators; params (B, P, H, W), categorical (B, K, C, H, W), target (B, C, H, W)

SUMS = {"categorical": 2, "logistic_mixture": 4}  # numbers an element, of a mixture a pixel, that its backward takes


def _forward(
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
    upstream = _over_image(upstream)
    grad = torch.empty_like(params)
    if likelihood == "logistic_mixture":
        assert kept is not None
        mixture.backward(params, target, upstream.expand(-1, 1, *target.shape[2:]), kept, grad, levels)
        return grad
    upstream = upstream.expand(target.shape)
    if likelihood == "categorical":
        assert kept is not None
        categorical.backward(params, target, upstream, kept, grad)
    else:
        gaussian = likelihood == "gaussian"
        pointwise.backward(_planes(params, gaussian), target, upstream, _planes(grad, gaussian), gaussian)
    return grad


@torch.library.custom_op("fastgen::reconstruction_nll", mutates_args=())
def _operator(params: Tensor, target: Tensor, likelihood: str, levels: int, per_element: bool) -> tuple[Tensor, Tensor]:
    """Nats, and what the backward takes: an empty tensor where that is nothing."""
    nll, kept = _forward(params, target, likelihood, levels, per_element)
    return nll, params.new_empty(0) if kept is None else kept


@_operator.register_fake
def _(params: Tensor, target: Tensor, likelihood: str, levels: int, per_element: bool) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = target.shape
    channels = 1 if likelihood == "logistic_mixture" else channels
    nll = params.new_empty((batch, channels, height, width) if per_element else (batch,), dtype=torch.float32)
    if likelihood not in SUMS:
        return nll, params.new_empty(0)
    size = (batch, SUMS[likelihood], *target.shape[2 if likelihood == "logistic_mixture" else 1 :])
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


def _over_image(upstream: Tensor) -> Tensor:
    """Upstream gradients (B,) or (B, C, H, W) with four dimensions, float32."""
    return (upstream if upstream.dim() == 4 else upstream[:, None, None, None]).float()


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
    by_target = -grad.chunk(2, 1)[0] if ctx.likelihood == "gaussian" else -_over_image(upstream) * params
    return grad, by_target.to(target.dtype)


def _backward(ctx, upstream, _grad_kept):
    return *_gradients(ctx, _backward_operator, upstream), None, None, None


_operator.register_autograd(_backward, setup_context=_setup_context)


class _Direct(torch.autograd.Function):
    """The kernels without operators."""

    @staticmethod
    def forward(ctx, params, target, likelihood, levels, per_element):
        nll, kept = _forward(params, target, likelihood, levels, per_element)
        ctx.likelihood, ctx.levels = likelihood, levels
        ctx.save_for_backward(params, target, kept)
        return nll

    @staticmethod
    def backward(ctx, upstream):
        # Where the gradient is to be differentiated, the operator says that it cannot be.
        run = _backward_operator if torch.is_grad_enabled() else _run_backward
        return *_gradients(ctx, run, upstream), None, None, None


# --- the public function


def _check_shapes(params: Tensor, target: Tensor, likelihood: str) -> None:
    if likelihood == "categorical":
        fits = params.dim() == target.dim() + 1 and params.shape[1] > 0
        fits = fits and params.shape[:1] + params.shape[2:] == target.shape
        expected = "(B, K, ...) for a target (B, ...)"
    elif likelihood == "logistic_mixture":
        fits = target.dim() >= 2 and target.shape[1] in (1, 3) and params.dim() == target.dim()
        fits = fits and params.shape[:1] + params.shape[2:] == target.shape[:1] + target.shape[2:]
        fits = fits and params.shape[1] > 0 and params.shape[1] % (10 if target.shape[1] == 3 else 3) == 0
        expected = "(B, 10*M, ...) for an RGB target (B, 3, ...) or (B, 3*M, ...) for one channel (B, 1, ...)"
    elif likelihood == "gaussian":
        fits = target.dim() >= 2 and params.shape == (target.shape[0], 2 * target.shape[1], *target.shape[2:])
        expected = "(B, 2*C, ...), means then log-variances, for a target (B, C, ...)"
    else:
        fits = params.shape == target.shape and target.dim() >= 1
        expected = "that of target"
    if not fits:
        raise ValueError(
            f"params has the shape {tuple(params.shape)} and target {tuple(target.shape)}; "
            f"likelihood={likelihood!r} expects params of the shape {expected}"
        )
    if target.dim() > 4:
        raise ValueError(f"target must have at most 4 dimensions (B, C, H, W), got {tuple(target.shape)}")


def check_levels(target: Tensor, likelihood: str, levels: int) -> None:
    if likelihood == "gaussian" or target.numel() == 0 or not may_read_values(target):
        return
    if likelihood == "bernoulli":
        grey = (target != 0) & (target != 1)
        if grey.any():
            raise ValueError(
                f"target must be 0 or 1 for likelihood='bernoulli', got {target[grey][0].item()!r}: binarize the "
                "images, or use another likelihood for grey ones"
            )
        return
    lowest, highest = target.min().item(), target.max().item()
    if lowest < 0 or highest >= levels:
        raise ValueError(
            f"target must be in 0..{levels - 1} for likelihood={likelihood!r}, got values {lowest}..{highest}"
        )


def _uses_kernel(impl: str, params: Tensor, likelihood: str) -> bool:
    """The kernels compute in float32 and hold a softmax in one tile: what does not fit is for the definition."""
    fits = params.dtype != torch.float64 and (likelihood != "categorical" or params.shape[1] <= 4096)
    if not uses_triton(impl, params):
        return False
    if impl == "triton" and not fits:
        raise ValueError(
            f"impl='triton' computes in float32, at most 4096 levels; got {params.dtype} and the shape "
            f"{tuple(params.shape)}: use impl='auto' or 'reference'"
        )
    return fits


def reconstruction_nll(
    params: Tensor,
    target: Tensor,
    likelihood: str = "bernoulli",
    *,
    levels: int = 256,
    reduction: str = "sample",
    compat: str | None = None,
    impl: str = "auto",
) -> Tensor:
    """Negative log-likelihood of images, in nats, exact and normalized, summed over each image.

    Args:
        params: the decoder's output, any float dtype (arithmetic in float32, float64 for float64).
            "bernoulli": logits (B, C, H, W). "gaussian": (B, 2*C, H, W), means, then log-variances (exact in
            [-100, 80]; the nearer end outside). "categorical": logits (B, K, C, H, W). "logistic_mixture"
            (PixelCNN++, Salimans et al. 2017, equations 1-3), M components: (B, 10*M, H, W) for RGB, in order M mixture
            logits, then for each colour M means, M log-scales (not below -7), M coefficients (through tanh; r->g, r->b,
            g->b); (B, 3*M, H, W) for one channel, M logits, M means, M log-scales. Images may have fewer dimensions
            than (C, H, W).
        target: (B, C, H, W). "bernoulli": 0 or 1, any dtype. "gaussian": real. "categorical": integers in 0..K-1.
            "logistic_mixture": integers in 0..levels-1, standing for -1..1 in equal steps.
        likelihood: one of the above.
        levels: number of levels of "logistic_mixture"; the others ignore it.
        reduction: "sample" for (B,), "none" for the map: the target's shape, for "logistic_mixture" (B, 1, H, W), as a
            component is shared by the colours of a pixel.
        compat: "pixelcnn++" computes "logistic_mixture" by the published recipe, which switches to a density
            times a bin width at small probabilities; for reproducing old numbers (PyTorch definition only).
        impl: "auto" is Triton on CUDA tensors (not for float64), the PyTorch definition elsewhere.

    Returns:
        Nats, float32 or float64. NaN where params is NaN; finite where it is finite.

    Raises:
        TypeError: params is not a float tensor, or target has a dtype that the likelihood does not take.
        ValueError: an unknown likelihood, reduction or compat; shapes that do not fit; target values out of range
            (checked in eager mode on the CPU, elsewhere only under FASTGEN_CHECK=1).
        RuntimeError: impl="triton" where it cannot run.
    """
    if not isinstance(params, Tensor) or not params.is_floating_point():
        kind = params.dtype if isinstance(params, Tensor) else type(params).__name__
        raise TypeError(f"params must be a float tensor, got {kind}")
    if not isinstance(target, Tensor) or target.is_complex():
        kind = target.dtype if isinstance(target, Tensor) else type(target).__name__
        raise TypeError(f"target must be a real tensor, got {kind}")
    if likelihood not in LIKELIHOODS:
        raise ValueError(f"likelihood must be one of {LIKELIHOODS}, got {likelihood!r}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    if not isinstance(levels, int) or levels < 2:
        raise ValueError(f"levels must be an int >= 2, got {levels!r}")
    if compat is not None and (compat != "pixelcnn++" or likelihood != "logistic_mixture" or levels != 256):
        raise ValueError(
            f"compat must be None, or 'pixelcnn++' with likelihood='logistic_mixture' and 256 levels, got {compat!r} "
            f"with {likelihood!r} and {levels}"
        )
    if target.device != params.device:
        raise ValueError(f"target is on {target.device}, params on {params.device}; expected the same device")
    if likelihood in ("categorical", "logistic_mixture") and target.dtype not in INTEGERS:
        raise TypeError(f"target must hold integer levels for likelihood={likelihood!r}, got {target.dtype}")
    _check_shapes(params, target, likelihood)
    check_levels(target, likelihood, params.shape[1] if likelihood == "categorical" else levels)
    if compat is None and _uses_kernel(impl, params, likelihood):
        # The kernels see four dimensions, and five for a softmax: those that an image lacks are added, as views.
        missing = 4 - target.dim()
        for _ in range(missing):
            params, target = params.unsqueeze(-1), target.unsqueeze(-1)
        options = (likelihood, levels, reduction == "none")
        if not is_plain(params, target):
            nll = _operator(params, target, *options)[0]
        elif torch.is_grad_enabled() and (params.requires_grad or target.requires_grad):
            nll = _Direct.apply(params, target, *options)
        else:
            nll = _forward(params, target, *options, save=False)[0]
        return nll.view(nll.shape[: nll.dim() - missing]) if reduction == "none" and missing else nll
    if compat is not None and impl == "triton":
        raise ValueError("compat='pixelcnn++' has no Triton kernel: use impl='auto' or 'reference'")
    return reconstruction_nll_reference(params, target, likelihood, levels=levels, reduction=reduction, compat=compat)
