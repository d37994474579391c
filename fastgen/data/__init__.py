"""Data sets of images by name, as integer levels, with training, validation and test images.

    digits       scikit-learn's handwritten digits, 8x8, 17 grey levels; no download
    patches      32x32 RGB patches of scikit-learn's two photographs; no download
    mnist        28x28, 256 grey levels; downloaded once
    cifar10      32x32 RGB; downloaded once
    npz:PATH     arrays in an .npz file
    folder:PATH  a folder of image files
    hf:NAME      a data set of the Hugging Face hub, or a local one, read by the `datasets` package

The splits are fixed: the same name gives the same images in the same order on any machine.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fastgen.data import sources
from fastgen.data.dataset import Dataset, Split, assemble, hold_out, sha256

__all__ = ["Dataset", "Split", "assemble", "hold_out", "load", "sha256"]

NAMED = {
    "digits": sources.digits,
    "patches": sources.patches,
    "mnist": sources.mnist,
    "cifar10": sources.cifar10,
}
SOURCES: dict[str, Callable[..., Dataset]] = {"npz": sources.npz, "folder": sources.folder, "hf": sources.hub}
PATHS = ("npz", "folder")


def load(name: str, *, levels: int | None = None, resize: int | None = None, crop: int | None = None) -> Dataset:
    """Loads a data set.

    Args:
        name: a name of the list in the docstring of `fastgen.data`.
        levels: number of levels of a channel, for npz:, folder: and hf:. None takes the number that the data set
            states, or else infers it from the images; `Dataset.note` says if it was inferred.
        resize: scales image files (folder:, hf:) so that the shorter side has this many pixels.
        crop: then cuts out the central square with this side.

    Returns:
        A `Dataset` of uint8 levels (n, C, H, W) and int64 classes (n,).

    Raises:
        TypeError: name is not a str.
        ValueError: the name is unknown, a file is missing or holds something else, an argument is not for this data
            set, or a package is not installed.
        OSError: a file cannot be read or downloaded.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, got {type(name).__name__}")
    kind, _, rest = name.partition(":")
    arguments = {"levels": levels, "resize": resize, "crop": crop}
    loading = {key: value for key, value in arguments.items() if value is not None}
    accepted: tuple[str, ...] = ("levels",) if kind == "npz" else ("levels", "resize", "crop")
    for key, value in loading.items():
        least = 2 if key == "levels" else 1
        if not isinstance(value, int) or value < least or (key == "levels" and value > 256):
            raise ValueError(f"{key} must be an int {'in 2..256' if key == 'levels' else '>= 1'}, got {value!r}")
    if name in NAMED:
        dataset = NAMED[name]()
        if loading.pop("levels", dataset.levels) != dataset.levels:
            raise ValueError(f"levels must be {dataset.levels}, the number of levels of {name}, got {levels}")
        accepted = ()
    elif kind not in SOURCES or not rest:
        known = [*NAMED, *(f"{kind}:{'NAME' if kind == 'hf' else 'PATH'}" for kind in SOURCES)]
        raise ValueError(f"unknown data set {name!r}: expected one of {', '.join(known)}")
    for key in loading.keys() - set(accepted):
        raise ValueError(f"{key} is for image files (folder:PATH, hf:NAME), not for {name}")
    if name in NAMED:
        return replace(dataset, name=name)
    dataset = SOURCES[kind](rest, **loading)
    return replace(dataset, name=f"{kind}:{Path(rest).resolve()}" if kind in PATHS else name, loading=loading)
