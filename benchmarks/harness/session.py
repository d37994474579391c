"""`Session`: one run on one device, and how it reports progress and failures."""

import contextlib
import functools
import gc
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.harness import machine
from benchmarks.harness.case import Case
from benchmarks.harness.timing import CpuTimer, CudaTimer, timer

OUT_OF_MEMORY = "out of memory"


class DeviceLost(Exception):
    """This process can no longer use the GPU. The message is the failure that caused it."""


def failure(error: BaseException) -> str:
    """An exception as one line for a row; OUT_OF_MEMORY if memory has run out."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "not enough memory" in text:
        return OUT_OF_MEMORY
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}"[:300]


@dataclass
class Session:
    """One run on one device.

    Attributes:
        facts: the result of `machine.facts`.
        command: the command line, for the rows.
        budget: seconds of samples for one provider in one mode.
        timing: False: only compare, measure no times.
        patience: seconds that one step of one provider (its comparison, a few samples) may take, with compilation.
        rates: results of `timing.rates` by number of threads (None on a GPU); empty if they were not measured.
        tell: is called with ("doing", provider), with ("kernel", name) before a launch, and with ("row", row).
    """

    facts: dict[str, Any]
    command: str
    budget: float = 0.1
    timing: bool = True
    patience: float = 60.0
    rates: dict[int | None, dict[str, float]] = field(default_factory=dict)
    tell: Callable[[str, Any], Any] = lambda kind, value: None

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.facts["gpu"] else "cpu")

    @functools.cached_property
    def clock(self) -> CpuTimer | CudaTimer:
        return timer(self.device)

    @contextlib.contextmanager
    def doing(self, case: Case, provider: str | None) -> Iterator[list[str]]:
        """Catches exceptions of a provider, or with None of the case as a whole. Yields a list that gets a line for an
        exception; stderr gets the whole traceback.

        Raises:
            DeviceLost: after the exception this process can no longer use the GPU.
        """
        problems: list[str] = []
        self.tell("doing", provider)
        try:
            yield problems
        except Exception as error:  # any failure of a provider becomes a row and does not end the run
            problems.append(failure(error))
            print(f"{case.title}, {provider}\n{traceback.format_exc()}", file=sys.stderr)
            del error
            gc.collect()  # frees the tensors that the traceback's frames held
            if machine.lost(self.device):
                raise DeviceLost(problems[0]) from None
