"""Exact negative log-likelihood of an image given a decoder's parameters: Bernoulli, Gaussian, softmax over levels, and
PixelCNN++'s discretized mixture of logistics. The definition in plain PyTorch, and the public function."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgen.kernels.likelihood.limits import DEVIATION_LIMIT, LOGIT_LIMIT
from fastgen.mixture import component_mean, mixture_log_prob, split_mixture
from fastgen.ops._implementation import may_read_values, uses_triton
from fastgen.ops._nll_kernels import nll_by_kernel

LIKELIHOODS = ("bernoulli", "gaussian", "categorical", "logistic_mixture")
REDUCTIONS = ("sample", "none")
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

LOG_VARIANCE_RANGE = (-100.0, 80.0)  # the range in which exp(-log_variance / 2) and its square stay in float32


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
        nll = -mixture_log_prob(params, target, levels)
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
    if impl == "auto" and likelihood == "categorical" and torch.compiler.is_compiling():
        return False  # its compiler reads and writes each logit as often
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
        impl: "auto" is Triton on CUDA tensors (not for float64, nor for "categorical" under `torch.compile`), the
            PyTorch definition elsewhere.

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
        return nll_by_kernel(params, target, likelihood, levels, per_element=reduction == "none")
    if compat is not None and impl == "triton":
        raise ValueError("compat='pixelcnn++' has no Triton kernel: use impl='auto' or 'reference'")
    return reconstruction_nll_reference(params, target, likelihood, levels=levels, reduction=reduction, compat=compat)
