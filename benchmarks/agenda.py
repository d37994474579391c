"""Which cases are measured, in which order, and which need not be measured again."""

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from benchmarks import machine, rows
from benchmarks.case import Case
from benchmarks.rows import Row

# The most telling first: where time is short, every benchmark has its first case before any has its second.
ON_A_GPU = (
    "masked_conv2d",
    "sampling",
    "training",
    "diagonal_lstm",
    "reconstruction_nll",
    "reparameterize_kl",
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
VERSIONS = ("torch", "triton", "cuda", "driver")


@dataclass
class Item:
    """A case, and with how many threads the CPU is to run it."""

    name: str
    case: Case
    threads: int


def load_cases(name: str, size: str, device: torch.device) -> list[Case]:
    """The cases of one benchmark; see benchmarks.case.SIZES. A dry run neither compiles nor captures; a GPU is searched
    for configurations of rivals (minutes a case), and one thread of a CPU compiled for, only where all is asked for."""
    found = importlib.import_module(f"benchmarks.{name}").cases(size, device)
    left_out = {"toy": ("compiled", "CUDA graph"), "gpu": ("max-autotune",)}.get(size, ())
    return [case.without(*left_out) for case in found]


def agenda(names: Sequence[str], size: str, device: torch.device) -> Iterator[Item]:
    """The first case of every benchmark, then the second of every one, and so on. A case is let go of once it is
    measured: it may hold the memory of CUDA graphs."""
    waiting = {name: load_cases(name, size, device) for name in names}
    # A CPU is measured with one thread, where processor time tells what was disturbed, and with all.
    every = torch.get_num_threads()
    counts = [every] if device.type == "cuda" or size == "toy" else sorted({1, every})
    while any(waiting.values()):
        for name in names:
            if not waiting[name]:
                continue
            case = waiting[name].pop(0)
            for threads in counts:
                yield Item(name, case.without("compiled") if size == "cpu" and threads < every else case, threads)


def already_measured(item: Item, device: torch.device, saved: dict[tuple, Row]) -> list[Row] | None:
    """The saved rows (by key) of a case, failures among them, where all are there and none is outdated: the versions
    are today's, and so are the kernels that the row ran, or the whole source where it ran none. A rival of a kernel
    does not depend on the source."""
    case, cuda = item.case, device.type == "cuda"
    today = machine.environment(device)
    found = []
    for provider in case.providers:
        for mode in case.timed_modes(provider):
            wanted = {"gpu": today["gpu"], "cpu": today["cpu"], "op": case.op, "shape": case.shape, "mode": mode}
            wanted |= {"dtype": str(case.dtype).removeprefix("torch."), "provider": provider}
            row = saved.get(rows.key({**wanted, "threads": None if cuda else item.threads}))
            if row is None or any(row.get(name) != today[name] for name in VERSIONS):
                return None
            rival = cuda and case.kernels and not provider.startswith("fastgen")
            same = rows.state(row) == "fresh" if row["kernels"] else row.get("source_sha256") == machine.source_sha256()
            if not (rival or same):
                return None
            found.append(row)
    return found
