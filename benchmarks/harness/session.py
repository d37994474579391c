"""One run on one device, and what is told of it while it goes on."""

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
    """The GPU answers nothing more in this process; the text is the failure after which it did not."""


def failure(error: BaseException) -> str:
    """A line for the row; running out of memory is a result of its own."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "not enough memory" in text:
        return OUT_OF_MEMORY
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}"[:300]


@dataclass
class Session:
    """One run on one device.

    Attributes:
        facts: what every row says of the machine, `machine.facts`.
        command: the command line, for the rows.
        budget: seconds of samples for one provider in one mode.
        timing: False: only compare, take no time.
        patience: seconds that one step of one provider (its comparison, some samples) may take, compilation included.
        rates: results of `timing.rates` by number of threads (None on a GPU); empty where they were not measured.
        tell: is told ("doing", provider), ("kernel", name) before a launch, and ("row", row).
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
        """Whatever goes wrong inside is the provider's (None: of the whole case) problem; the list gets its text, and
        stderr all of it.

        Raises:
            DeviceLost: nothing more can be done in this process.
        """
        problems: list[str] = []
        self.tell("doing", provider)
        try:
            yield problems
        except Exception as error:  # a rival may fail in any way: that is a row, not the end of the run
            problems.append(failure(error))
            print(f"{case.title}, {provider}\n{traceback.format_exc()}", file=sys.stderr)
            del error
            gc.collect()  # what the frames of the failure held
            if machine.lost(self.device):
                raise DeviceLost(problems[0]) from None
