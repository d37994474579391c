"""Rejects inputs that are not digits, by scores of a VAE's likelihood."""

from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fastgen import data, likelihood, scores
from fastgen.demos.common import digits_vae, fit
from fastgen.demos.pictures import rows_of, sheet
from fastgen.models import VAE

IMPORTANCE_SAMPLES = 32


def strangers(images: Tensor, levels: int) -> dict[str, Tensor]:
    """Inputs that are not digits: those of `scores.strangers` and three more kinds, (n, C, H, W) of each, by name."""
    half = images.shape[3] // 2
    return {
        **scores.strangers(images, levels),
        "flat": torch.randint(levels, (len(images), 1, 1, 1)).to(images.dtype).expand_as(images).contiguous(),
        "upside down": images.flip(2),
        "halves of two": torch.cat((images[..., :half], images.roll(1, 0)[..., half:]), 3),
    }


def run(*, steps: int = 1200, seed: int = 0) -> tuple[dict[str, Any], Image.Image]:
    """Trains a VAE on digits and rejects inputs by three scores, with thresholds that accept 95 % of held-out digits.

    The scores are -log p ("unlikely"), the likelihood ratio to a background VAE that is trained on spoilt digits (Ren
    et al. 2019), and typicality (Nalisnick et al. 2019).

    Returns:
        "rejected": for each score, the fraction of test digits and of each other kind of input that is rejected.
        "auroc": for each score and kind, the probability that such an input scores higher than a test digit.
    """
    digits = data.load("digits")
    levels = digits.levels
    model, background = digits_vae(digits), digits_vae(digits)
    fit(model, digits, steps, seed)
    spoilt = likelihood.perturb(digits.train.images.repeat(4, 1, 1, 1), levels, 0.3)
    fit(background, replace(digits, train=data.Split(spoilt)), steps // 2, seed)
    inputs = {"digits": digits.test.images, **strangers(digits.test.images, levels)}
    training, held_out = (
        _log_probs(model, background, split.images) for split in (digits.train[:300], digits.validation)
    )
    log_probs = {name: _log_probs(model, background, x) for name, x in inputs.items()}
    score_functions = {
        "unlikely": lambda log_p, log_background: -log_p,
        "likelihood ratio": likelihood.likelihood_ratio,
        "typicality": lambda log_p, log_background: likelihood.typicality(log_p, training[0]),
    }
    numbers: dict[str, Any] = {"rejected": {}, "auroc": {}}
    for score, function in score_functions.items():
        threshold = likelihood.rejection_threshold(function(*held_out), 0.05)
        values = {name: function(*pair) for name, pair in log_probs.items()}
        numbers["rejected"][score] = {name: (x > threshold).double().mean().item() for name, x in values.items()}
        numbers["auroc"][score] = {
            name: likelihood.auroc(values["digits"], x) for name, x in values.items() if name != "digits"
        }
    order = log_probs["digits"][0].argsort()
    rows = [
        ("The least likely test digits", rows_of(inputs["digits"][order[:16]].unsqueeze(0), levels)),
        ("The most likely", rows_of(inputs["digits"][order[-16:]].unsqueeze(0), levels)),
    ]
    for name, x in inputs.items():
        fractions = ", ".join(f"{score} {100 * row[name]:.0f} %" for score, row in numbers["rejected"].items())
        rows.append((f"{name}, rejected: {fractions}", rows_of(x[:16].unsqueeze(0), levels)))
    return numbers, sheet(*rows)


def _log_probs(model: VAE, background: VAE, images: Tensor) -> tuple[Tensor, Tensor]:
    """log p of images under the model and under the background model, (n,) nats each."""
    log_p, log_background = (
        likelihood.log_likelihoods(vae, images, n_samples=IMPORTANCE_SAMPLES) for vae in (model, background)
    )
    return log_p, log_background
