"""What is measured: one module a benchmark, each with `cases(size, device)`."""

import importlib
from collections.abc import Iterator, Sequence

import torch

from benchmarks.harness.case import Case

# The most telling first: where time is short, every benchmark has its first case before any has its second.
ON_A_GPU = (
    *("masked_conv2d", "sampling", "training", "diagonal_lstm", "reconstruction_nll", "reparameterize_kl", "probes"),
    *("vae", "elbo", "row_lstm", "linear_cross_entropy"),
)
ON_A_CPU = (
    *("sampling", "diagonal_lstm", "row_lstm", "training", "vae", "masked_conv2d", "reconstruction_nll", "elbo"),
    *("reparameterize_kl", "linear_cross_entropy"),
)
NAMES = (*ON_A_GPU, "launches")  # the last compares only; first-contact has it
# Words in the names of providers that a size does without: a dry run neither compiles nor captures; configurations are
# searched for (minutes a case) only where all is asked for.
LEFT_OUT = {"toy": ("compiled", "CUDA graph", "launched"), "gpu": ("max-autotune",)}
ONLY_ON_A_GPU = ("reduce-overhead", "max-autotune", "CUDA graph", "launched", "persistent")


def load(name: str, size: str, device: torch.device) -> list[Case]:
    """The cases of one benchmark; see benchmarks.harness.case.SIZES."""
    of_all_providers = importlib.import_module(f"benchmarks.cases.{name}").cases(size, device)
    words = (*LEFT_OUT.get(size, ()), *(ONLY_ON_A_GPU if device.type != "cuda" else ()))
    return [case.without(*words) for case in of_all_providers]


def in_turns(names: Sequence[str], size: str, device: torch.device) -> Iterator[Case]:
    """The first case of every benchmark, then the second of every one, and so on."""
    waiting = [load(name, size, device) for name in names]
    while any(waiting):
        yield from [cases.pop(0) for cases in waiting if cases]
