"""Arguments and look-ups that several commands share."""

import argparse
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DATA_HELP = "digits, patches, mnist, cifar10, npz:PATH, folder:PATH or hf:NAME"


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


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")


def device_of(arguments: argparse.Namespace) -> "torch.device":
    """Raises ValueError where a GPU is asked for and there is none."""
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA GPU (fastgen doctor says more)")
    return torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
