"""Classification by Bayes' rule with p(x | y)."""

from typing import Any

import torch
from PIL import Image

from fastgen import data, likelihood
from fastgen.demos.common import digits_vae, fit
from fastgen.demos.pictures import rows_of, sheet

IMPORTANCE_SAMPLES = 32


def run(*, steps: int = 1500, seed: int = 0) -> tuple[dict[str, Any], Image.Image]:
    """Trains a class-conditional VAE p(x | y) and classifies test digits by p(y | x), proportional to p(x | y) p(y).

    Returns:
        "accuracy" on the test digits, and "nats", the mean of their -log p(x) = -log sum_y p(x | y) p(y).
    """
    digits = data.load("digits")
    test, labels = digits.test.images, digits.test.labels
    assert labels is not None
    model = digits_vae(digits, n_classes=digits.n_classes)
    fit(model, digits, steps, seed)
    posterior = likelihood.class_posterior(model, test, n_samples=IMPORTANCE_SAMPLES)
    classes = torch.arange(10).repeat_interleave(16)
    samples = model.sample(160, seed=seed, condition=classes, expected=True).view(10, 16, *digits.shape)
    right = posterior.labels == labels
    numbers = {"accuracy": right.double().mean().item(), "nats": -posterior.log_likelihood.mean().item()}
    wrong = (~right).nonzero().flatten()[:16]
    guesses = ", ".join(
        f"{labels[i]} as {posterior.labels[i]} ({posterior.log_probs[i].max().exp():.2f})" for i in wrong[:8].tolist()
    )
    rows = [
        (f"Bayes' rule classifies {100 * numbers['accuracy']:.1f} % of {len(test)} test digits rightly", None),
        ("Expected images E[x | z, y] of each class, z from the prior", rows_of(samples, digits.levels)),
    ]
    if len(wrong) > 0:
        rows.append((f"Errors, with p(y | x): {guesses}", rows_of(test[wrong].unsqueeze(0), digits.levels)))
    return numbers, sheet(*rows)
