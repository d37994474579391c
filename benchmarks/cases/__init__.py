"""The benchmarks: one module for each, with a function `cases(size, device)`."""

import importlib
from collections.abc import Iterator, Sequence

import torch

from benchmarks.harness.case import Case

# The most important first. With little time, every benchmark runs its first case before any runs its second.
ON_A_GPU = (
    *("masked_conv2d", "sampling", "training", "diagonal_lstm", "reconstruction_nll", "reparameterize_kl", "probes"),
    *("vae", "elbo", "row_lstm", "linear_cross_entropy"),
)
ON_A_CPU = (
    *("sampling", "diagonal_lstm", "row_lstm", "training", "vae", "masked_conv2d", "reconstruction_nll", "elbo"),
    *("reparameterize_kl", "linear_cross_entropy"),
)
NAMES = (*ON_A_GPU, "launches")  # the last one only compares; first-contact runs it
# Words in the names of providers that a size leaves out. A dry run neither compiles nor captures CUDA graphs;
# autotuning, which takes minutes for each case, is left to --full.
LEFT_OUT = {"toy": ("compiled", "CUDA graph", "launched"), "gpu": ("max-autotune",)}
ONLY_ON_A_GPU = ("reduce-overhead", "max-autotune", "CUDA graph", "launched", "persistent")


def load(name: str, size: str, device: torch.device) -> list[Case]:
    """The cases of a benchmark at one of `benchmarks.harness.case.SIZES`, without providers that do not run there."""
    cases = importlib.import_module(f"benchmarks.cases.{name}").cases(size, device)
    words = (*LEFT_OUT.get(size, ()), *(ONLY_ON_A_GPU if device.type != "cuda" else ()))
    return [case.without(*words) for case in cases]


def in_turns(names: Sequence[str], size: str, device: torch.device) -> Iterator[Case]:
    """The first case of every benchmark, then the second of each, and so on."""
    waiting = [load(name, size, device) for name in names]
    while any(waiting):
        yield from [cases.pop(0) for cases in waiting if cases]
