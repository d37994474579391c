"""`python -m benchmarks host`: what the host takes for a call of each public operation, in microseconds; needs no GPU.

Launches end at a driver that does nothing (harness/launches.py): what remains is Python, PyTorch's dispatcher,
autograd, allocations and Triton's way to a launch. On a GPU the driver's own 2 to 3 us a launch are added, and the
column host_us of its rows is the whole.
"""

import functools
import os
import time
from pathlib import Path

import torch

from benchmarks.cases import launches
from benchmarks.harness import machine, rows
from benchmarks.harness.case import Case
from benchmarks.harness.compare import Checked
from benchmarks.harness.launches import mocked
from benchmarks.harness.rows import Row
from benchmarks.harness.runner import empty_row, prepare
from benchmarks.harness.session import Session

PROVIDER = "fastgen, launches mocked"
WARM, CALLS, TURNS = 20, 20, 15


def cases() -> list[Case]:
    found = []
    for one in launches.of_host():
        inputs = functools.partial(one.inputs, dtype=torch.float32)
        own = {PROVIDER: functools.partial(one.call, impl="triton")}
        found.append(Case(one.op, one.shape, torch.float32, inputs, own, None, ("fwd", "full")))
    return found


def measure(case: Case, session: Session) -> list[Row]:
    """A row a mode: the least of some means over calls, of the processor's time, for what else runs only adds to it."""
    inputs = case.inputs(session.device)
    found = []
    for mode in case.modes:
        with mocked() as launched:
            call = prepare(case, case.providers[PROVIDER], mode, inputs)
            for _ in range(WARM):
                launched.clear()
                call()
            names, means = list(launched), []
            for _ in range(TURNS):
                start = time.process_time()
                for _ in range(CALLS):
                    call()
                means.append(1e6 * (time.process_time() - start) / CALLS)
        row = empty_row(case, session, PROVIDER, mode, Checked(launched=names))
        found.append(row | {"host_us": min(means), "launches": len(names)})
    return found


def run(folder: Path, command: str) -> int:
    """Raises ValueError where Triton is not installed."""
    os.environ.pop("TRITON_INTERPRET", None)  # read when kernels are defined
    torch.set_num_threads(1)
    session = Session(machine.facts("cpu"), command, timing=False)
    for case in cases():
        found = measure(case, session)
        rows.save(found, folder / machine.folder_name(session.facts))
        for row in found:
            print(f"{case.title:<66} {row['mode']:<5} {row['host_us']:8.1f} us  {row['launches']} launches", flush=True)
    return 0
