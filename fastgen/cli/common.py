"""Arguments that several commands share, and what they stand for: data sets and devices."""

import argparse
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from fastgen.data import Dataset

DATA_HELP = "digits, patches, mnist, cifar10, npz:PATH, folder:PATH or hf:NAME"
LOADING = ("levels", "resize", "crop")  # keyword arguments of fastgen.data.load


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text!r}")
    return int(text)


def non_negative_int(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"expected an integer in 0..2**31-1, got {text!r}")
    return int(text)


def finite_number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text!r}")
    return value


def add_run(parser: argparse.ArgumentParser, run: Any) -> None:
    parser.add_argument("folder", metavar="RUN", help="folder of a training run, or written by fastgen.save")
    add_device(parser)
    parser.set_defaults(run=run)


def add_data(parser: Any, required: bool = True, more: str = "") -> None:
    (parser.add_required if required else parser.add_argument)("--data", help=DATA_HELP + more)
    parser.add_argument("--levels", type=positive_int, help="number of levels of a channel (npz:, folder: and hf:)")
    parser.add_argument(
        "--resize", type=positive_int, metavar="N", help="scale image files so that the shorter side has N pixels"
    )
    parser.add_argument("--crop", type=positive_int, metavar="N", help="then cut out the middle NxN pixels")


def add_split(parser: Any) -> None:
    parser.add_argument("--split", choices=("train", "validation", "test"), default="test", help="default: test")


def load_data(arguments: argparse.Namespace, **defaults: Any) -> "Dataset":
    """Loads the data set that the arguments name; `defaults` are used for what is not given. Prints the data set's
    attribution and its note. Raises as `fastgen.data.load`."""
    from fastgen import data

    given = {name: getattr(arguments, name) for name in ("data", *LOADING)}
    chosen = {**defaults, **{name: value for name, value in given.items() if value is not None}}
    dataset = data.load(chosen.pop("data"), **chosen)
    for line in (dataset.attribution, dataset.note):
        if line:
            print(line)
    return dataset


def load_run_data(arguments: argparse.Namespace, model: Any, **defaults: Any) -> "Dataset":
    """`load_data` with the model's number of levels, unless the arguments name another.

    Raises:
        ValueError: the images do not fit the model; or as `load_data`.
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
    """The device of this process. Under torchrun, each process of a machine takes its own GPU.

    Raises:
        ValueError: --device names a kind of GPU that torch does not find, or there are more processes than GPUs.
    """
    import torch

    from fastgen import distributed

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA GPU (see fastgen doctor)")
    if arguments.device == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps: torch finds no Apple GPU")
    kind = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind != "cuda":
        return torch.device(kind)
    index = distributed.local_rank()
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"process {index} of this machine has no GPU: torch finds {torch.cuda.device_count()}, one for each process"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
