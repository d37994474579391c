"""Demonstrations on scikit-learn's handwritten digits, each a picture and its numbers, in seconds on a CPU.

    python -m fastgen.demonstrations autoencoder --out DIR   features for a classifier with few labels
    python -m fastgen.demonstrations vae         --out DIR   samples, reconstructions, interpolation
    python -m fastgen.demonstrations latent_map  --out DIR   a plane of digits
    python -m fastgen.demonstrations bounds      --out DIR   ELBO <= importance-weighted bounds <= log p
    python -m fastgen.demonstrations bayes       --out DIR   classification by p(x | y)
    python -m fastgen.demonstrations outliers    --out DIR   rejecting unlikely inputs
    python -m fastgen.demonstrations all         --out DIR

They need scikit-learn: pip install fastgen[demo].
"""

from collections.abc import Callable
from typing import Any

from fastgen.demonstrations.autoencoder import run_autoencoder
from fastgen.demonstrations.likelihoods import run_bayes, run_outliers
from fastgen.demonstrations.vae import run_bounds, run_latent_map, run_vae

DEMONSTRATIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "autoencoder": run_autoencoder,
    "vae": run_vae,
    "latent_map": run_latent_map,
    "bounds": run_bounds,
    "bayes": run_bayes,
    "outliers": run_outliers,
}

__all__ = ["DEMONSTRATIONS", "run_autoencoder", "run_bayes", "run_bounds", "run_latent_map", "run_outliers", "run_vae"]
