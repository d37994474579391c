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
    """Trains a VAE with 8 latent dimensions; samples, reconstructions and interpolations of test digits.

    Returns:
        "nats" and "bits_per_dim" of the test images by "elbo" and by "importance" (64 samples), both upper bounds of
        -log p, and for comparison by "histogram", a model of independent pixels. "kl_per_dimension" in nats,
        "active_units".
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
    drawn = model.sample(32, seed=seed).view(2, 16, *digits.shape)
    expected = model.sample(32, seed=seed, expected=True).view(2, 16, *digits.shape)
    rebuilt = torch.stack((test[:16], model.reconstruct(test[:16])))
    path = model.interpolate(test[:3], test[3:6], 16).transpose(0, 1)
    summary = (
        f"Test digits: <= {importance.bits_per_dim:.3f} bits/dim ({IMPORTANCE_SAMPLES} importance samples), "
        f"<= {report['bits_per_dim']:.3f} by the ELBO; independent pixels {histogram:.3f}"
    )
    picture = sheet(
        (summary, None),
        ("Samples of the model", rows_of(drawn, digits.levels)),
        ("What the decoder expects for the same z", rows_of(expected, digits.levels)),
        ("Test digits and their reconstructions", rows_of(rebuilt, digits.levels)),
        ("From one test digit to another through the latent space", rows_of(path, digits.levels)),
    )
    return numbers, picture
