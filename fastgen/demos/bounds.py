"""The ELBO and importance-weighted bounds of log p, in a VAE whose log p is known exactly."""

import math
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fastgen import data
from fastgen.demos.pictures import COLOURS, INK, Axes, sheet
from fastgen.models import VAE

REPEATS = 4  # independent estimates for each test image; their mean is less noisy


class LinearVAE(VAE):
    """Probabilistic PCA (Tipping & Bishop 1999), fitted in closed form, as a VAE: p(x | z) = N(W z + b, s^2 I). log
    p(x) is known exactly.

    The true posterior is Gaussian with correlated dimensions, because W is rotated at random; q(z | x) is the closest
    Gaussian without correlations. The ELBO is therefore strictly smaller than log p(x).

    Args:
        images: floats (n, C, H, W) to fit.
        latent: number of principal components, the dimensions of z.
    """

    def __init__(self, images: Tensor, latent: int) -> None:
        super().__init__(tuple(images.shape[1:]), latent, likelihood="gaussian", channels=1)  # type: ignore[arg-type]
        self.double()
        x = images.double().flatten(1)
        self.offset = x.mean(0)
        values, vectors = torch.linalg.eigh(torch.cov(x.T))
        largest = values[-latent:]
        self.noise = values[:-latent].mean()  # s^2
        rotation = torch.linalg.qr(torch.randn(latent, latent, dtype=torch.float64))[0]
        self.weight = vectors[:, -latent:] * (largest - self.noise).sqrt() @ rotation
        precision = torch.eye(latent).double() + self.weight.T @ self.weight / self.noise
        self.to_mean = torch.linalg.solve(precision, self.weight.T / self.noise)
        self.logvar = -precision.diagonal().log()  # minimizes the KL divergence of q from the true posterior

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
    """Computes the ELBO, importance-weighted bounds and log p of test digits under a linear VAE.

    Args:
        samples: the largest number of importance samples; the others are the powers of two below it.

    Returns:
        Means over the test digits in nats: "elbo", "log_p", and "importance" for each number of samples.
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
        ("Mean log p of test digits in nats, known exactly for a linear VAE (black), and the", None),
        (f"importance-weighted bound over samples (blue); ELBO {elbo:.3f}, log p {exact:.3f}", axes.picture),
    )
    return numbers, picture
