"""Images by name, as integer levels, split into training, validation and test images.

    digits       scikit-learn's handwritten digits, 8x8, 17 grey levels; no network
    patches      32x32 RGB patches of scikit-learn's two photographs; no network
    mnist        28x28, 256 grey levels; downloaded once
    cifar10      32x32 RGB; downloaded once
    npz:PATH     arrays in an .npz file
    folder:PATH  image files
    hf:NAME      a data set of the Hugging Face hub, or a local one, through the `datasets` package

Every split is fixed: the same name gives the same images in the same order on any machine.
"""

from dataclasses import replace

from fastgen.data import sources
from fastgen.data.dataset import Dataset, Split, assemble

__all__ = ["Dataset", "Split", "assemble", "load"]

NAMED = {
    "digits": sources.digits,
    "patches": sources.patches,
    "mnist": sources.mnist,
    "cifar10": sources.cifar10,
}
SOURCES = {"npz": sources.npz, "folder": sources.folder, "hf": sources.hub}


def load(name: str) -> Dataset:
    """The data set of that name; see the module's docstring.

    Raises:
        ValueError: no such name; a file that is missing or holds something else; a package that is not installed.
        OSError: a file cannot be read or downloaded.
    """
    kind, _, rest = name.partition(":")
    if name in NAMED:
        return replace(NAMED[name](), name=name)
    if kind in SOURCES and rest:
        return replace(SOURCES[kind](rest), name=name)
    known = [*NAMED, *(f"{kind}:{'NAME' if kind == 'hf' else 'PATH'}" for kind in SOURCES)]
    raise ValueError(f"unknown data set {name!r}: expected one of {', '.join(known)}")
