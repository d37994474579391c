"""The evidence lower bound of a VAE's training step, and its parts."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgen import ops

ACTIVE = 0.01  # variance of a posterior mean over images (Burda et al. 2016, section 5.2)


class Bound(NamedTuple):
    """The evidence lower bound of a batch and what it is made of.

    Attributes:
        elbo: -(nll + beta * kl), (B,) nats; for beta = 1 a lower bound of log p(x), in expectation over z.
        nll: reconstruction, -log p(x | z), (B,) nats.
        kl: KL of the posterior from the prior, each dimension not below the free bits, (B,) nats.
        mu, logvar: the posterior, (B, D), without gradient.
        dims: C * H * W, the dimensions of "bits/dim".
        density: whether nll is of a density (a Gaussian's, of images that are floats), and not of levels.
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
        """(nll + kl) / (C * H * W * ln 2), (B,): an upper bound whatever beta is. NaN for a density, which has none."""
        bits = (self.nll + self.kl) / (self.dims * math.log(2))
        return torch.full_like(bits, math.nan) if self.density else bits

    @property
    def kl_per_dimension(self) -> Tensor:
        """Mean KL of each latent dimension over the batch, (D,) nats, without free bits."""
        one_each = (half.reshape(-1, 1) for half in (self.mu, self.logvar))
        _, kl = ops.reparameterize_kl(*one_each, eps=self.mu.new_zeros(self.mu.numel(), 1))
        return kl.view(self.mu.shape).mean(0)

    @property
    def active_units(self) -> Tensor:
        """How many dimensions have a posterior mean whose variance over the batch exceeds 0.01, () int64."""
        return (self.mu.float().var(0, correction=0) > ACTIVE).sum()

    def report(self) -> dict[str, Any]:
        """All of it as Python numbers, means over the batch, for a log; waits for the device."""
        names = ("elbo", "nll", "kl") if self.density else ("elbo", "nll", "kl", "bits_per_dim")
        means = {name: getattr(self, name).detach().mean().item() for name in names}
        return {
            **means,
            "kl_per_dimension": self.kl_per_dimension.tolist(),
            "active_units": int(self.active_units),
        }
