"""The evidence lower bound (ELBO) of a VAE, and its parts."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgen import ops

ACTIVE = 0.01  # least variance of an active unit's posterior mean over images (Burda et al. 2016, section 5.2)


class Bound(NamedTuple):
    """The evidence lower bound of a batch, and its parts.

    Attributes:
        elbo: -(nll + beta * kl), (B,) nats. For beta = 1 its expectation over z is a lower bound of log p(x).
        nll: reconstruction term -log p(x | z), (B,) nats.
        kl: KL(q(z | x) || p(z)), each latent dimension not below the free bits, (B,) nats.
        mu, logvar: mean and log-variance of q(z | x), (B, D), without gradient.
        dims: C * H * W, the dimensions of "bits/dim".
        density: True if nll comes from a density of float images, not from probabilities of levels.
    """

    elbo: Tensor
    nll: Tensor
    kl: Tensor
    mu: Tensor
    logvar: Tensor
    dims: int
    density: bool = False

    @property
    def bits_per_dim(self) -> Tensor:
        """(nll + kl) / (C * H * W * ln 2), (B,): an upper bound for any beta. NaN for a density, which has no bits."""
        bits = (self.nll + self.kl) / (self.dims * math.log(2))
        return torch.full_like(bits, math.nan) if self.density else bits

    @property
    def kl_per_dimension(self) -> Tensor:
        """Mean KL of each latent dimension over the batch, (D,) nats, without free bits."""
        columns = (
            tensor.reshape(-1, 1) for tensor in (self.mu, self.logvar)
        )  # every entry is a batch entry of its own
        _, kl = ops.reparameterize_kl(*columns, eps=self.mu.new_zeros(self.mu.numel(), 1))
        return kl.view(self.mu.shape).mean(0)

    @property
    def active_units(self) -> Tensor:
        """The number of latent dimensions whose posterior mean has a variance above 0.01 over the batch, () int64."""
        return (self.mu.float().var(0, correction=0) > ACTIVE).sum()

    def report(self) -> dict[str, Any]:
        """Means over the batch as Python numbers, for a log. Waits for the device.

        The keys are "elbo", "nll", "kl" (nats), "bits_per_dim" (not for a density), "kl_per_dimension", "active_units".
        """
        names = ("elbo", "nll", "kl") if self.density else ("elbo", "nll", "kl", "bits_per_dim")
        means = {name: getattr(self, name).detach().mean().item() for name in names}
        return {
            **means,
            "kl_per_dimension": self.kl_per_dimension.tolist(),
            "active_units": int(self.active_units),
        }
