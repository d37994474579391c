"""A VAE of the digits: samples, reconstructions, interpolation; a map of two latent dimensions; the bounds on log p."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen import data
from fastgen.baselines import histogram_bits_per_dim
from fastgen.demonstrations.common import put_down, train
from fastgen.demonstrations.pictures import COLOURS, FONT, INK, Axes, sheet, tiles
from fastgen.likelihood import evaluate
from fastgen.models import VAE

LATENT = 8
MIXTURE: dict[str, Any] = {"likelihood": "logistic_mixture", "n_mix": 3}
IMPORTANCE_SAMPLES = 64


def fit(model: VAE, images: Tensor, steps: int, labels: Tensor | None = None) -> None:
    """Trains a VAE; the weight of the KL rises to 1 in the first fifth of the steps."""

    def loss(chosen: Tensor, step: int) -> Tensor:
        condition = None if labels is None else labels[chosen]
        return model.loss(images[chosen], condition, beta=min(1.0, 5 * (step + 1) / steps))

    train(model, loss, len(images), steps)


def run_vae(out: str | Path | None = None, *, steps: int = 1500, seed: int = 0) -> dict[str, Any]:
    """Trains a VAE with 8 latent dimensions; samples, reconstructions and interpolations of test digits.

    Args:
        out: folder for vae.png and vae.json; None writes nothing.
        steps: of training.
        seed: of everything random; torch's own generator is left as it was.

    Returns:
        "nats" and "bits_per_dim" of the test images by "elbo" and by "importance" (64 samples), both upper bounds of
        -log p, and for comparison by "histogram", a model of independent pixels. "kl_per_dimension" in nats,
        "active_units".
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        digits = data.load("digits")
        test = digits.test.images
        model = VAE(digits.shape, LATENT, levels=digits.levels, **MIXTURE)
        fit(model, digits.train.images, steps)
        with torch.no_grad():
            report = model.elbo(test).report()
        importance = evaluate(model, test, n_samples=IMPORTANCE_SAMPLES)
        histogram = histogram_bits_per_dim(digits, digits.test)
        numbers = {
            "nats": {"elbo": -report["elbo"], "importance": importance.nats},
            "bits_per_dim": {
                "elbo": report["bits_per_dim"],
                "importance": importance.bits_per_dim,
                "histogram": histogram,
            },
            "reconstruction": report["nll"],
            "kl": report["kl"],
            "kl_per_dimension": report["kl_per_dimension"],
            "active_units": report["active_units"],
        }
        drawn = model.sample(32, seed=seed).view(2, 16, *digits.shape)
        expected = model.sample(32, seed=seed, expected=True).view(2, 16, *digits.shape)
        rebuilt = torch.stack((test[:16], model.reconstruct(test[:16])))
        path = model.interpolate(test[:3], test[3:6], 16).transpose(0, 1)
    summary = (
        f"Test digits: <= {importance.bits_per_dim:.3f} bits/dim ({IMPORTANCE_SAMPLES} importance samples), "
        f"<= {report['bits_per_dim']:.3f} by the ELBO; independent pixels {histogram:.3f}"
    )
    rows = [
        (summary, None),
        ("Samples of the model", tiles(drawn, digits.levels)),
        ("What the decoder expects for the same z", tiles(expected, digits.levels)),
        ("Test digits and their reconstructions", tiles(rebuilt, digits.levels)),
        ("From one test digit to another through the latent space", tiles(path, digits.levels)),
    ]
    return put_down(out, "vae", numbers, sheet(rows))


def run_latent_map(out: str | Path | None = None, *, steps: int = 1500, seed: int = 0) -> dict[str, Any]:
    """A VAE with two latent dimensions: what it decodes over the plane, and where the test digits lie in it.

    Arguments as in `run_vae`; latent_map.png and latent_map.json.

    Returns:
        "nats" and "bits_per_dim" of the test images (upper bounds); "neighbours": the fraction of test digits whose
        nearest training digit in the plane has the same label.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        digits = data.load("digits")
        model = VAE(digits.shape, 2, levels=digits.levels, **MIXTURE)
        fit(model, digits.train.images, steps)
        importance = evaluate(model, digits.test.images, n_samples=IMPORTANCE_SAMPLES)
        side = 17
        quantiles = torch.special.ndtri((torch.arange(side) + 0.5) / side)
        across, up = torch.meshgrid(quantiles, quantiles.flip(0), indexing="xy")
        with torch.no_grad():
            plane = model.expected(torch.stack((across, up), 2).view(-1, 2)).view(side, side, *digits.shape)
            places = [model.encode(split.images)[0] for split in (digits.train, digits.test)]
    assert digits.train.labels is not None and digits.test.labels is not None
    nearest = torch.cdist(places[1], places[0]).argmin(1)
    neighbours = (digits.train.labels[nearest] == digits.test.labels).double().mean().item()
    limit = 1.05 * float(places[1].abs().max())
    axes = Axes((-limit, limit), (-limit, limit), (620, 600))
    whole = range(-int(limit), int(limit) + 1)
    axes.ticks({float(value): str(value) for value in whole}, {float(value): str(value) for value in whole})
    for (x, y), label in zip(places[1].tolist(), digits.test.labels.tolist(), strict=True):
        axes.draw.text(axes.place(x, y), str(label), COLOURS[label], FONT, anchor="mm")
    numbers = {"nats": importance.nats, "bits_per_dim": importance.bits_per_dim, "neighbours": neighbours}
    rows = [
        (f"Two latent dimensions: <= {importance.bits_per_dim:.3f} bits/dim", None),
        ("Decoded at the prior's quantiles", tiles(plane, digits.levels)),
        (f"Test digits by label; {100 * neighbours:.1f} % have a nearest neighbour of their class", axes.picture),
    ]
    return put_down(out, "latent_map", numbers, sheet(rows))


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


def run_bounds(out: str | Path | None = None, *, samples: int = 512, seed: int = 0) -> dict[str, Any]:
    """ELBO <= importance-weighted bounds <= log p, in a linear VAE of the digits whose log p is known.

    Args:
        out: folder for bounds.png and bounds.json; None writes nothing.
        samples: the most importance samples.
        seed: of everything random; torch's own generator is left as it was.

    Returns:
        Mean nats of test digits: "elbo", "log_p", and "importance" by the number of samples.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        digits = data.load("digits")
        images, test = (split.images.double() / 8 - 1 for split in (digits.train, digits.test))
        model = LinearVAE(images, 16)
        with torch.no_grad():
            exact = model.exact_log_prob(test).mean().item()
            repeats = 4
            elbo = model.elbo(test.repeat(repeats, 1, 1, 1)).elbo.mean().item()
            counts = [2**power for power in range(int(math.log2(samples)) + 1)]
            bounds = {count: model.log_prob(test.repeat(repeats, 1, 1, 1), count).mean().item() for count in counts}
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
    rows = [
        ("Mean log p of test digits in nats (black), exactly known in a linear VAE,", None),
        (f"and the importance-weighted bound (blue) by samples; ELBO {elbo:.3f}, log p {exact:.3f}", axes.picture),
    ]
    return put_down(out, "bounds", numbers, sheet(rows))
