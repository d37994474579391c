"""What several demonstrations share: the VAE of the digits, and `fit`, which trains a model."""

import tempfile
from typing import Any

from torch import nn

from fastgen.data import Dataset
from fastgen.models import VAE
from fastgen.train import Settings, train


def digits_vae(digits: Dataset, latent_dim: int = 8, n_classes: int | None = None) -> VAE:
    """A VAE of the digits whose likelihood is a mixture of 3 logistics."""
    options: dict[str, Any] = {"likelihood": "logistic_mixture", "n_mix": 3}
    return VAE(digits.shape, latent_dim, levels=digits.levels, n_classes=n_classes, **options)


def fit(model: nn.Module, dataset: Dataset, steps: int, seed: int = 0, device: Any = "cpu") -> None:
    """Trains a model without keeping a file of the run. The learning rate rises for a tenth of the steps and then
    falls; the weight of a VAE's KL rises to 1 in the first fifth.

    Raises:
        KeyboardInterrupt: training was interrupted, by Ctrl-C for example.
        TypeError, ValueError, FloatingPointError: as `fastgen.train.train`.
    """
    settings = Settings(
        steps=steps,
        lr=2e-3,
        warmup=steps // 10,
        decay_steps=steps,
        validate_every=steps,
        beta_warmup=steps // 5 if isinstance(model, VAE) else 0,
        seed=seed,
    )
    with tempfile.TemporaryDirectory() as folder:
        result = train(model, dataset, folder, settings, progress=False, device=device)
    if result.reason == "interrupted":
        raise KeyboardInterrupt
