"""What is measured: one module a benchmark, each with `cases(size, device)`."""

import importlib
from collections.abc import Iterator, Sequence

import torch

from benchmarks.harness.case import Case

# The most telling first: where time is short, every benchmark has its first case before any has its second.
ON_A_GPU = (
    "masked_conv2d",
    "sampling",
    "training",
    "diagonal_lstm",
    "reconstruction_nll",
    "reparameterize_kl",
    "probes",
    "vae",
    "elbo",
    "row_lstm",
    "linear_cross_entropy",
)
ON_A_CPU = (
    "sampling",
    "diagonal_lstm",
    "row_lstm",
    "training",
    "vae",
    "masked_conv2d",
    "reconstruction_nll",
    "elbo",
    "reparameterize_kl",
    "linear_cross_entropy",
)
NAMES = (*ON_A_GPU, "launches")  # the last compares only; first-contact has it


def load(name: str, size: str, device: torch.device) -> list[Case]:
    """The cases of one benchmark; see benchmarks.harness.case.SIZES. A dry run neither compiles nor captures; a GPU is
    searched for configurations of rivals (minutes a case), and one thread of a CPU compiled for, only where all is
    asked for."""
    found = importlib.import_module(f"benchmarks.cases.{name}").cases(size, device)
    left_out = {"toy": ("compiled", "CUDA graph"), "gpu": ("max-autotune",)}.get(size, ())
    return [case.without(*left_out) for case in found]


def in_turns(names: Sequence[str], size: str, device: torch.device) -> Iterator[Case]:
    """The first case of every benchmark, then the second of every one, and so on."""
    waiting = [load(name, size, device) for name in names]
    while any(waiting):
        yield from [cases.pop(0) for cases in waiting if cases]
