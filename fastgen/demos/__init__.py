"""Demonstrations: each trains a model on a CPU and writes a picture and its numbers.

    python -m fastgen demo [NAME] --out FOLDER

`digits`, the default, runs everything from training to a report. `examples/` holds short programs to copy from. Most
demonstrations use the data sets of scikit-learn: pip install fastgen[demo].
"""

import importlib
import json
import os
from pathlib import Path
from typing import Any

DEMOS = {
    "digits": "train, score, sample and complete digits, with a report",
    "vae": "samples, reconstructions and interpolations of a VAE",
    "latent_map": "the images that a VAE decodes over a plane of two latent variables",
    "bounds": "ELBO <= importance-weighted bounds <= log p, where log p is known exactly",
    "bayes": "classification by Bayes' rule with p(x | y)",
    "outliers": "rejection of unlikely inputs",
    "autoencoder": "features for a classifier that has few labels",
    "code_prior": "a VQ-VAE of photographs, and a PixelCNN that draws and completes its codes",
    "ising": "free energies of a spin lattice, estimated from exact samples and compared with the exact solution",
}


def perform(name: str, folder: str | os.PathLike, *, seed: int = 0, **options: Any) -> dict[str, Any]:
    """Runs one of DEMOS other than `digits` and writes its picture NAME.png and its numbers NAME.json.

    Args:
        name: a module of this package. Its `run(seed=..., **options)` returns the numbers and the picture.
        folder: the folder to write to.
        seed: seed of everything random. torch's default generators are left as they were.
        options: further arguments of the module's `run`.

    Returns:
        The numbers; the docstring of the module's `run` says what they mean.

    Raises:
        OSError: the folder cannot be written to (checked before the work starts).
        ValueError: scikit-learn is not installed, or the folder is a file.
    """
    import torch

    from fastgen.files import make_folder, write_atomically
    from fastgen.plots import png

    folder = Path(folder)
    make_folder(folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        numbers, picture = importlib.import_module(f"fastgen.demos.{name}").run(seed=seed, **options)
    text = json.dumps(numbers, indent=2) + "\n"
    write_atomically({folder / f"{name}.png": png(picture), folder / f"{name}.json": text.encode()})
    return numbers
