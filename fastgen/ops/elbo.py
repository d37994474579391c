"""The evidence lower bound of a VAE from its two parts."""

from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from fastgen.ops.reconstruction_nll import reconstruction_nll


class Elbo(NamedTuple):
    """The bound and its parts for each image, (B,) nats each."""

    elbo: Tensor
    nll: Tensor
    kl: Tensor


def elbo(
    params: Tensor,
    target: Tensor,
    kl: Tensor,
    likelihood: str,
    *,
    beta: float | Tensor = 1.0,
    levels: int = 256,
    impl: str = "auto",
) -> Elbo:
    """ELBO = -(nll + beta * kl), a lower bound of log p(target) for beta = 1 (Kingma & Welling 2014, equation 3).

    With `reparameterize_kl` before the decoder, nothing is kept beyond z and the decoder's output.

    Args:
        params, target, likelihood, levels, impl: as in `reconstruction_nll`.
        kl: KL divergence of the posterior from the prior, (B,) nats, as `reparameterize_kl` gives it.
        beta: weight of the KL (Higgins et al. 2017), a finite number >= 0; a tensor of one element where it is annealed
            under `torch.compile`.

    Returns:
        The named tuple (elbo, nll, kl), (B,) nats each; kl as it was given.

    Raises:
        TypeError, ValueError, RuntimeError: as `reconstruction_nll`; or kl is not (B,), or beta not such a number.
    """
    return bound_of(reconstruction_nll(params, target, likelihood, levels=levels, impl=impl), kl, beta)


def bound_of(nll: Tensor, kl: Tensor, beta: float | Tensor) -> Elbo:
    """`elbo` of a likelihood that is known, (B,) nats."""
    if not isinstance(kl, Tensor) or not kl.is_floating_point():
        raise TypeError(f"kl must be a float tensor, got {kl.dtype if isinstance(kl, Tensor) else type(kl).__name__}")
    if isinstance(beta, Tensor):
        if beta.numel() != 1:
            raise ValueError(f"beta must be one number, got a tensor of the shape {tuple(beta.shape)}")
        beta = beta.reshape(())
    elif isinstance(beta, bool) or not isinstance(beta, Real):
        raise TypeError(f"beta must be a number or a tensor of one element, got {type(beta).__name__}")
    elif not 0 <= beta < float("inf"):
        raise ValueError(f"beta must be a finite number >= 0, got {beta!r}")
    if kl.shape != nll.shape:
        raise ValueError(f"kl must have the shape ({nll.shape[0]},), one value an image, got {tuple(kl.shape)}")
    kl = kl.to(torch.promote_types(kl.dtype, nll.dtype))
    return Elbo(-(nll + beta * kl), nll, kl)
