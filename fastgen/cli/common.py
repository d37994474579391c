"""Arguments and look-ups that several commands share."""

import argparse
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from fastgen.data import Dataset

DATA_HELP = "digits, patches, mnist, cifar10, npz:PATH, folder:PATH or hf:NAME"
LOADING = ("levels", "resize", "crop")  # of fastgen.data.load


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text!r}")
    return int(text)


def natural(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"expected an integer in 0..2**31-1, got {text!r}")
    return int(text)


def number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}")
    return value


def add_run(parser: argparse.ArgumentParser, run: Any) -> None:
    parser.add_argument("folder", metavar="RUN", help="folder of a run, or one written by fastgen.save")
    add_device(parser)
    parser.set_defaults(run=run)


def add_data(parser: Any, needed: bool = True, more: str = "") -> None:
    (parser.add_needed if needed else parser.add_argument)("--data", help=DATA_HELP + more)
    parser.add_argument("--levels", type=positive_int, help="levels of a channel, where the images do not say it")
    parser.add_argument("--resize", type=positive_int, metavar="N", help="scale image files: shorter side to N pixels")
    parser.add_argument("--crop", type=positive_int, metavar="N", help="then cut the middle NxN pixels")


def load_data(arguments: argparse.Namespace, **defaults: Any) -> "Dataset":
    """The data set that the arguments, or else `defaults`, name. Prints its attribution and its note."""
    from fastgen import data

    given = {name: getattr(arguments, name) for name in ("data", *LOADING)}
    chosen = {**defaults, **{name: value for name, value in given.items() if value is not None}}
    dataset = data.load(chosen.pop("data"), **chosen)
    for line in (dataset.attribution, dataset.note):
        if line:
            print(line)
    return dataset


def load_run_data(arguments: argparse.Namespace, model: Any, **defaults: Any) -> "Dataset":
    """`load_data` for a trained model: with its number of levels, unless another is asked for.

    Raises:
        ValueError: they do not fit.
    """
    from fastgen.data import NAMED
    from fastgen.train import check_fit

    named = (arguments.data or defaults["data"]) in NAMED
    dataset = load_data(arguments, **({} if named else {"levels": model.levels}), **defaults)
    check_fit(model, dataset)
    return dataset


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda", "mps"), help="default: the GPU if there is one")


def device_of(arguments: argparse.Namespace) -> "torch.device":
    """The device of this process; of several on a machine, each takes a GPU of its own.

    Raises:
        ValueError: a GPU is asked for and there is none.
    """
    import torch

    from fastgen import distributed

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA GPU (fastgen doctor says more)")
    if arguments.device == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps: torch finds no Apple GPU")
    kind = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind != "cuda":
        return torch.device(kind)
    place = distributed.local_rank()
    if place >= torch.cuda.device_count():
        raise ValueError(f"process {place} of this machine has no GPU: there are {torch.cuda.device_count()}")
    torch.cuda.set_device(place)
    return torch.device("cuda", place)
