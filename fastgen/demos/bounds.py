"""The bounds on log p, in a VAE whose log p is known exactly."""

import math
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fastgen import data
from fastgen.demos.pictures import COLOURS, INK, Axes, sheet
from fastgen.models import VAE

REPEATS = 4  # of each test image, for means with less noise


class LinearVAE(VAE):
    """Probabilistic principal components (Tipping & Bishop 1999), fitted in closed form, as a VAE: p(x | z) =
    N(W z + b, s^2). log p(x) is known exactly. The true posterior is Gaussian too, but the axes of z are turned so that
    its dimensions are correlated, while q(z | x) is the best one without correlation: the bound is not tight."""

    def __init__(self, images: Tensor, latent: int) -> None:
        super().__init__(tuple(images.shape[1:]), latent, likelihood="gaussian", channels=1)  # type: ignore[arg-type]
        self.double()
        x = images.double().flatten(1)
        self.offset = x.mean(0)
        values, vectors = torch.linalg.eigh(torch.cov(x.T))
        kept = values[-latent:]
        self.noise = values[:-latent].mean()
        turn = torch.linalg.qr(torch.randn(latent, latent, dtype=torch.float64))[0]
        self.weight = vectors[:, -latent:] * (kept - self.noise).sqrt() @ turn
        precision = torch.eye(latent).double() + self.weight.T @ self.weight / self.noise
        self.to_mean = torch.linalg.solve(precision, self.weight.T / self.noise)
        self.logvar = -precision.diagonal().log()  # minimizes the divergence from the true posterior

    def encode(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        mean = (x.flatten(1) - self.offset) @ self.to_mean.T
        return mean, self.logvar.expand_as(mean)

    def decode(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        mean = (z @ self.weight.T + self.offset).view(-1, *self.shape)
        return torch.cat((mean, self.noise.log().expand_as(mean)), 1)

    def exact_log_prob(self, x: Tensor) -> Tensor:
        """log p(x) = log N(x; b, W W^T + s^2 I), (B,) nats."""
        covariance = self.weight @ self.weight.T + self.noise * torch.eye(len(self.offset)).double()
        return torch.distributions.MultivariateNormal(self.offset, covariance).log_prob(x.flatten(1))


def run(*, samples: int = 512, seed: int = 0) -> tuple[dict[str, Any], Image.Image]:
    """ELBO <= importance-weighted bounds <= log p, in a linear VAE of the digits whose log p is known.

    Args:
        samples: the most importance samples.

    Returns:
        Mean nats of test digits: "elbo", "log_p", and "importance" by the number of samples.
    """
    digits = data.load("digits")
    images, test = (split.images.double() / 8 - 1 for split in (digits.train, digits.test))
    model = LinearVAE(images, 16)
    counts = [2**power for power in range(int(math.log2(samples)) + 1)]
    with torch.no_grad():
        exact = model.exact_log_prob(test).mean().item()
        repeated = test.repeat(REPEATS, 1, 1, 1)
        elbo = model.elbo(repeated).elbo.mean().item()
        bounds = {count: model.log_prob(repeated, count).mean().item() for count in counts}
    numbers = {"elbo": elbo, "log_p": exact, "importance": {str(count): value for count, value in bounds.items()}}
    low, high = min(bounds.values()), exact
    axes = Axes((0, math.log2(samples)), (low - 0.05 * (high - low), high + 0.1 * (high - low)))
    step = (high - low) / 4
    axes.ticks(
        {math.log2(count): str(count) for count in counts},
        {low + step * number: f"{low + step * number:.3f}" for number in range(5)},
    )
    axes.draw.line((*axes.place(0, exact), *axes.place(math.log2(samples), exact)), INK, 2)
    axes.line([math.log2(count) for count in counts], list(bounds.values()), COLOURS[0])
    picture = sheet(
        ("Mean log p of test digits in nats (black), exactly known in a linear VAE,", None),
        (f"and the importance-weighted bound (blue) by samples; ELBO {elbo:.3f}, log p {exact:.3f}", axes.picture),
    )
    return numbers, picture
