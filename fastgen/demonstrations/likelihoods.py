"""What p(x) is good for: classification by Bayes' rule, and rejecting inputs that are no digits."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen import data, likelihood
from fastgen.demonstrations.common import put_down
from fastgen.demonstrations.pictures import sheet, tiles
from fastgen.demonstrations.vae import LATENT, MIXTURE, fit
from fastgen.models import VAE

IMPORTANCE_SAMPLES = 32


def run_bayes(out: str | Path | None = None, *, steps: int = 1500, seed: int = 0) -> dict[str, Any]:
    """Trains p(x | y), a class-conditional VAE, and classifies test digits by p(y | x), proportional to p(x | y) p(y).

    Args:
        out: folder for bayes.png and bayes.json; None writes nothing.
        steps: of training.
        seed: of everything random; torch's own generator is left as it was.

    Returns:
        "accuracy" on the test digits, and "nats": their mean -log p(x) with the class summed out.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        digits = data.load("digits")
        test, labels = digits.test.images, digits.test.labels
        assert labels is not None
        model = VAE(digits.shape, LATENT, levels=digits.levels, n_classes=digits.n_classes, **MIXTURE)
        fit(model, digits.train.images, steps, digits.train.labels)
        posterior = likelihood.class_posterior(model, test, n_samples=IMPORTANCE_SAMPLES)
        each = torch.arange(10).repeat_interleave(16)
        samples = model.sample(160, seed=seed, condition=each, expected=True).view(10, 16, *digits.shape)
    right = posterior.labels == labels
    numbers = {"accuracy": right.double().mean().item(), "nats": -posterior.log_likelihood.mean().item()}
    wrong = (~right).nonzero().flatten()[:16]
    guesses = ", ".join(
        f"{labels[i]} as {posterior.labels[i]} ({posterior.log_probs[i].max().exp():.2f})" for i in wrong[:8].tolist()
    )
    rows = [
        (f"{100 * numbers['accuracy']:.1f} % of {len(test)} test digits right by Bayes' rule", None),
        ("What the decoder expects for each class, z from the prior", tiles(samples, digits.levels)),
    ]
    if len(wrong) > 0:
        rows.append((f"Mistaken, with p(y | x): {guesses}", tiles(test[wrong].unsqueeze(0), digits.levels)))
    return put_down(out, "bayes", numbers, sheet(rows))


def strangers(images: Tensor, levels: int) -> dict[str, Tensor]:
    """Inputs that are no digits, as many of each kind as there are images."""
    flat = images.flatten(1)
    order = torch.rand(flat.shape).argsort(1)
    half = images.shape[3] // 2
    return {
        "noise": torch.randint(levels, images.shape).to(images.dtype),
        "flat": torch.randint(levels, (len(images), 1, 1, 1)).to(images.dtype).expand_as(images).contiguous(),
        "inverted": levels - 1 - images,
        "shuffled": flat.gather(1, order).view_as(images),
        "upside down": images.flip(2),
        "halves of two": torch.cat((images[..., :half], images.roll(1, 0)[..., half:]), 3),
    }


def run_outliers(out: str | Path | None = None, *, steps: int = 1200, seed: int = 0) -> dict[str, Any]:
    """Trains a VAE on digits and rejects what is unlikely, with thresholds that pass 95 % of held-out digits.

    Scores: -log p; the likelihood ratio to a background VAE trained on spoilt digits (Ren et al. 2019); typicality
    (Nalisnick et al. 2019). Arguments as in `run_bayes`; outliers.png and outliers.json.

    Returns:
        For each score "rejected", the fraction of test digits and of each kind of stranger that is rejected, and
        "auroc", the probability that a stranger scores higher than a test digit.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        digits = data.load("digits")
        images, levels = digits.train.images, digits.levels
        model, background = (VAE(digits.shape, LATENT, levels=levels, **MIXTURE) for _ in range(2))
        fit(model, images, steps)
        fit(background, likelihood.perturb(images.repeat(4, 1, 1, 1), levels, 0.3), steps // 2)
        inputs = {"digits": digits.test.images, **strangers(digits.test.images, levels)}
        training, held_out = (
            _log_probs(model, background, split.images) for split in (digits.train[:300], digits.validation)
        )
        found = {name: _log_probs(model, background, x) for name, x in inputs.items()}
    scores = {
        "unlikely": lambda log_p, log_background: -log_p,
        "likelihood ratio": likelihood.likelihood_ratio,
        "typicality": lambda log_p, log_background: likelihood.typicality(log_p, training[0]),
    }
    numbers: dict[str, Any] = {"rejected": {}, "auroc": {}}
    for score, rule in scores.items():
        threshold = likelihood.rejection_threshold(rule(*held_out), 0.05)
        values = {name: rule(*log_probs) for name, log_probs in found.items()}
        numbers["rejected"][score] = {name: (x > threshold).double().mean().item() for name, x in values.items()}
        numbers["auroc"][score] = {
            name: likelihood.auroc(values["digits"], x) for name, x in values.items() if name != "digits"
        }
    order = found["digits"][0].argsort()
    rows = [
        ("The least likely test digits", tiles(inputs["digits"][order[:16]].unsqueeze(0), levels)),
        ("The most likely", tiles(inputs["digits"][order[-16:]].unsqueeze(0), levels)),
    ]
    for name, x in inputs.items():
        shares = ", ".join(f"{score} {100 * row[name]:.0f} %" for score, row in numbers["rejected"].items())
        rows.append((f"{name}: rejected by {shares}", tiles(x[:16].unsqueeze(0), levels)))
    return put_down(out, "outliers", numbers, sheet(rows))


def _log_probs(model: VAE, background: VAE, images: Tensor) -> tuple[Tensor, Tensor]:
    """log p of images under both models, nats."""
    model_log_p, background_log_p = (
        likelihood.log_likelihoods(each, images, n_samples=IMPORTANCE_SAMPLES) for each in (model, background)
    )
    return model_log_p, background_log_p
