"""A VAE of the digits: samples, reconstructions, interpolation."""

from typing import Any

import torch
from PIL import Image

from fastgen import data
from fastgen.demos.baselines import histogram_bits_per_dim
from fastgen.demos.common import digits_vae, fit
from fastgen.demos.pictures import rows_of, sheet
from fastgen.likelihood import evaluate

IMPORTANCE_SAMPLES = 64


def run(*, steps: int = 1500, seed: int = 0) -> tuple[dict[str, Any], Image.Image]:
    """Trains a VAE with 8 latent dimensions and draws samples, reconstructions and interpolations of test digits.

    Returns:
        "nats" and "bits_per_dim": means over the test images of two upper bounds of -log p, "elbo" and "importance" (64
        samples); "bits_per_dim" also of "histogram", a model of independent pixels. "reconstruction", "kl" and
        "kl_per_dimension": the parts of the ELBO in nats. "active_units": see `fastgen.models.bound.Bound`.
    """
    digits = data.load("digits")
    test = digits.test.images
    model = digits_vae(digits)
    fit(model, digits, steps, seed)
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
    samples = model.sample(32, seed=seed).view(2, 16, *digits.shape)
    expected = model.sample(32, seed=seed, expected=True).view(2, 16, *digits.shape)
    reconstructions = torch.stack((test[:16], model.reconstruct(test[:16])))
    interpolations = model.interpolate(test[:3], test[3:6], 16).transpose(0, 1)
    summary = (
        f"Test digits: <= {importance.bits_per_dim:.3f} bits/dim ({IMPORTANCE_SAMPLES} importance samples), "
        f"<= {report['bits_per_dim']:.3f} by the ELBO; independent pixels {histogram:.3f}"
    )
    picture = sheet(
        (summary, None),
        ("Samples of the model", rows_of(samples, digits.levels)),
        ("Expected images E[x | z] for the same z", rows_of(expected, digits.levels)),
        ("Test digits and their reconstructions", rows_of(reconstructions, digits.levels)),
        ("From one test digit to another through the latent space", rows_of(interpolations, digits.levels)),
    )
    return numbers, picture
