"""Demonstrations, most on scikit-learn's handwritten digits, each a picture and its numbers, on a CPU.

    python -m fastgen demo [NAME] --out FOLDER

`digits`, the first, is the main job from start to end; `examples/` holds short programs to copy from. They need
scikit-learn: pip install fastgen[demo].
"""

import importlib
import json
import os
from pathlib import Path
from typing import Any

DEMOS = {
    "digits": "the main job: train, score, sample, complete; in minutes, with a report",
    "vae": "samples, reconstructions and interpolation",
    "latent_map": "a plane of latent variables, decoded",
    "bounds": "ELBO <= importance-weighted bounds <= log p",
    "bayes": "classification by p(x | y)",
    "outliers": "rejecting unlikely inputs",
    "autoencoder": "features for a classifier with few labels",
    "code_prior": "a VQ-VAE of photographs, and a PixelCNN that draws and completes its codes",
    "ising": "free energies of a spin lattice from exact samples, beside the exact ones",
}


def perform(name: str, folder: str | os.PathLike, *, seed: int = 0, **options: Any) -> dict[str, Any]:
    """Runs one of DEMOS other than `digits` and writes NAME.png and NAME.json.

    Args:
        name: of a module of this package, whose `run(seed=..., **options)` gives numbers and a picture.
        folder: to write to.
        seed: of everything random; torch's own generator is left as it was.

    Returns:
        The numbers; their meaning is in the docstring of the module's `run`.

    Raises:
        OSError: the folder cannot be written to; known before the work starts.
        ValueError: scikit-learn is missing.
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
