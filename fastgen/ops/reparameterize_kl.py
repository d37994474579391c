"""Reparameterization of a diagonal Gaussian posterior together with its KL from the standard normal prior (Kingma &
Welling 2014, equation 10 and appendix B). The definition in plain PyTorch, the operators, the public function."""

import math
from typing import Any

import torch
from torch import Tensor

from fastgen.kernels.maps import empty_in_order, order_of
from fastgen.ops._implementation import is_plain, uses_triton

MIN_LOGVAR, MAX_LOGVAR = -100.0, 80.0  # the range in which exp and its square root stay in float32


class _ClampMax(torch.autograd.Function):
    """min(x, high), with slope 1 also beyond it: what has run away can still be pulled back."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, high: float) -> Tensor:
        return x.clamp(max=high)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _expm1_minus(x: Tensor) -> Tensor:
    """exp(x) - 1 - x, never negative; by its Taylor series near 0, where the difference cancels."""
    order = 13 if x.dtype == torch.float64 else 8
    near = x.clamp(-0.25, 0.25)
    series = torch.full_like(x, 1 / math.factorial(order))
    for k in range(order - 1, 1, -1):
        series = series * near + 1 / math.factorial(k)
    return torch.where(x == near, series * near.square(), torch.expm1(x) - x)


def reparameterize_kl_reference(
    mu: Tensor,
    logvar: Tensor,
    *,
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
    free_bits: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The definition: arguments and result as in `reparameterize_kl`, any float dtype, differentiable by autograd."""
    dtype = torch.promote_types(mu.dtype, logvar.dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    mu, logvar = mu.to(wide), logvar.to(wide)
    if eps is None:
        # Shapes that vary under torch.compile take no generator, not even None.
        options: dict[str, Any] = {} if generator is None else {"generator": generator}
        eps = torch.randn(mu.shape, dtype=wide, device=mu.device, **options)
    z = mu + torch.exp(logvar.clamp(MIN_LOGVAR, MAX_LOGVAR) / 2) * eps.to(wide)

    # Below the range only the linear term goes on; above it, that term would be lost beside exp(80).
    clipped = _ClampMax.apply(logvar.clamp(min=MIN_LOGVAR), MAX_LOGVAR)
    below = torch.where(logvar < MIN_LOGVAR, logvar - MIN_LOGVAR, 0)
    kl = 0.5 * (_expm1_minus(clipped) - below) + 0.5 * mu * mu  # the slope of square() overflows where mu does not
    kl = kl.clamp(min=free_bits).unsqueeze(-1).flatten(1).sum(1)
    return z.to(dtype), _ClampMax.apply(kl, torch.finfo(wide).max)


@torch.library.custom_op("fastgen::reparameterize_kl", mutates_args=())
def _reparameterize_kl(
    mu: Tensor, logvar: Tensor, eps: Tensor | None, seed: Tensor, free_bits: float
) -> tuple[Tensor, Tensor]:
    from fastgen.kernels.vae import reparameterize_kl as kernels

    return kernels.forward(mu, logvar, eps, seed, free_bits)


@_reparameterize_kl.register_fake
def _(mu, logvar, eps, seed, free_bits):
    z = empty_in_order(mu, order_of(mu), torch.promote_types(mu.dtype, logvar.dtype))
    return z, mu.new_empty(mu.shape[:1], dtype=torch.float32)


@torch.library.custom_op("fastgen::reparameterize_kl_backward", mutates_args=())
def _reparameterize_kl_backward(
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    mu: Tensor,
    logvar: Tensor,
    eps: Tensor | None,
    seed: Tensor,
    free_bits: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of mu, logvar and eps; one that is not needed is an empty tensor, as operators cannot return None."""
    from fastgen.kernels.vae import reparameterize_kl as kernels

    grads = kernels.backward(grad_z, grad_kl, mu, logvar, eps, seed, free_bits, needs)
    grad_mu, grad_logvar, grad_eps = (mu.new_empty(0) if grad is None else grad for grad in grads)
    return grad_mu, grad_logvar, grad_eps


@_reparameterize_kl_backward.register_fake
def _(grad_z, grad_kl, mu, logvar, eps, seed, free_bits, needs):
    grad_mu, grad_logvar, grad_eps = (
        empty_in_order(x, order_of(mu), x.dtype) if needed else mu.new_empty(0)
        for x, needed in zip((mu, logvar, eps), needs, strict=True)
    )
    return grad_mu, grad_logvar, grad_eps


def _setup_context(ctx, inputs, output) -> None:
    mu, logvar, eps, seed, ctx.free_bits = inputs
    ctx.save_for_backward(mu, logvar, eps, seed)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_z, grad_kl):
    needs = list(ctx.needs_input_grad[:3])
    if grad_z is None and grad_kl is None:
        return None, None, None, None, None
    grads = _reparameterize_kl_backward(grad_z, grad_kl, *ctx.saved_tensors, ctx.free_bits, needs)
    return *(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), None, None


def _no_second_derivative(ctx, *grads):
    raise RuntimeError("the Triton kernel of reparameterize_kl has no second derivative: use impl='reference'")


class _Direct(torch.autograd.Function):
    """The kernels without operators."""

    @staticmethod
    def forward(ctx, mu, logvar, eps, seed, free_bits):
        from fastgen.kernels.vae import reparameterize_kl as kernels

        ctx.free_bits = free_bits
        ctx.save_for_backward(mu, logvar, eps, seed)
        ctx.set_materialize_grads(False)
        return kernels.forward(mu, logvar, eps, seed, free_bits)

    @staticmethod
    def backward(ctx, grad_z, grad_kl):
        if torch.is_grad_enabled():
            return _backward(ctx, grad_z, grad_kl)  # whose operator says that it cannot be differentiated again
        if grad_z is None and grad_kl is None:
            return None, None, None, None, None
        from fastgen.kernels.vae import reparameterize_kl as kernels

        mu, logvar, eps, seed = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        return *kernels.backward(grad_z, grad_kl, mu, logvar, eps, seed, ctx.free_bits, needs), None, None


_reparameterize_kl.register_autograd(_backward, setup_context=_setup_context)
_reparameterize_kl_backward.register_autograd(_no_second_derivative)


def reparameterize_kl(
    mu: Tensor,
    logvar: Tensor,
    *,
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
    free_bits: float = 0.0,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Sample z ~ N(mu, exp(logvar)) by reparameterization, and the KL of that posterior from N(0, I).

    z = mu + exp(logvar / 2) * eps, and kl = (exp(logvar) - 1 - logvar + mu^2) / 2 summed over the latent dimensions
    (Kingma & Welling 2014, appendix B), each not below `free_bits` (Kingma et al. 2016, equation 15, per sample).
    Exact for logvar in [-100, 80]. Outside, exp uses the nearer end: z no longer depends on logvar, while the KL keeps
    its slope and so can pull logvar back (below -100 its linear term goes on; above 80 its value stays). The sum
    saturates at the largest float, so that kl is finite for finite inputs; it is never negative; NaN gives NaN.

    Args:
        mu: means (B, D...) with any number of trailing dimensions, of any float dtype and strides.
        logvar: log-variances, the same shape.
        eps: standard normal noise, the same shape. None draws it: in the Triton kernel from Philox (Salmon et al.
            2011), keyed by one number of torch's generator and drawn again in backward instead of being stored.
        generator: where the noise comes from, if eps is None; None is torch's default generator of the device.
        free_bits: the least KL of a dimension, nats; a dimension below it gets no gradient from kl.
        impl: "auto" is Triton on CUDA tensors and the PyTorch definition elsewhere. float64 is always computed by
            the definition, as the kernel works in float32. The two draw different noise from the same seed.

    Returns:
        z, of mu's shape, the wider of the two dtypes, dense with mu's order of dimensions; and kl (B,) in nats, float32
        (float64 for float64), whatever the storage type.

    Raises:
        TypeError: mu, logvar or eps is not a float tensor, or generator or free_bits has a wrong type.
        ValueError: shapes or devices differ, mu has no batch dimension, both eps and generator are given, free_bits is
            not finite or is negative, or an unknown impl.
        RuntimeError: impl="triton" where it cannot run; a second derivative of the kernel.
    """
    for name, tensor in (("mu", mu), ("logvar", logvar), ("eps", eps)):
        if tensor is None and name == "eps":
            continue
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a float tensor, got {kind}")
        if tensor.shape != mu.shape:
            raise ValueError(f"{name} must have the shape of mu, {tuple(mu.shape)}, got {tuple(tensor.shape)}")
        if tensor.device != mu.device:
            raise ValueError(f"{name} must be on the device of mu, {mu.device}, got {tensor.device}")
    if mu.dim() == 0:
        raise ValueError("mu must have a batch dimension (B, D...), got the shape ()")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")
    if generator is not None and generator.device.type != mu.device.type:
        raise ValueError(f"generator must be on the device of mu, {mu.device}, got {generator.device}")
    if generator is not None and eps is not None:
        raise ValueError("eps and generator exclude each other: with eps, no noise is drawn")
    if isinstance(free_bits, bool) or not isinstance(free_bits, int | float):
        raise TypeError(f"free_bits must be a number, got {type(free_bits).__name__}")
    if not 0 <= free_bits < math.inf:
        raise ValueError(f"free_bits must be finite and not negative, got {free_bits!r}")

    if not uses_triton(impl, mu) or torch.float64 in (mu.dtype, logvar.dtype):
        return reparameterize_kl_reference(mu, logvar, eps=eps, generator=generator, free_bits=free_bits)
    # A tensor on the device, not a Python number: a CUDA graph draws a new key at each replay, and nothing waits.
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), generator=generator, device=mu.device)
    run = _Direct.apply if is_plain(mu, logvar, eps) else _reparameterize_kl
    return run(mu, logvar, eps, seed, float(free_bits))
