"""`python -m benchmarks host`: measures the host's time, in microseconds, for a call of each public operation. Needs no
GPU.

Launches end at a mocked driver that does nothing. What is measured is Python, PyTorch's dispatcher, autograd,
allocations and Triton's launching code. On a GPU the real driver adds 2 to 3 us per launch; the column host_us of rows
from a GPU includes them.
"""

import contextlib
import functools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from benchmarks.cases import launches
from benchmarks.harness import machine, rows
from benchmarks.harness.case import Case
from benchmarks.harness.compare import Checked
from benchmarks.harness.launches import catalogue
from benchmarks.harness.rows import Row
from benchmarks.harness.runner import empty_row, prepare
from benchmarks.harness.session import Session

PROVIDER = "fastgen, launches mocked"
WARM, CALLS, TURNS = 20, 20, 15
_mocked: list[str] = []  # names of launched kernels; a single list, since compiled kernels outlive a `mocked` block


@contextlib.contextmanager
def mocked() -> Iterator[list[str]]:
    """Inside, `impl="triton"` accepts CPU tensors and launches nothing. Yields the list of launched kernels, one name
    for each launch.

    All launches pass through Triton's driver, whether by `kernel[grid](...)`, which binds and specializes the
    arguments, or by calling an already compiled kernel. Here it is replaced by a driver for sm_90 that does nothing,
    and compiling gives an empty kernel.

    Raises:
        RuntimeError: TRITON_INTERPRET=1 is set, so that kernels run in Triton's interpreter.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    catalogue()  # imports all kernels, before TRITON_INTERPRET is set below
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 is set: kernels run in the interpreter, and are not launched")
    _mocked.clear()

    def compiled(self: Any, key: Any, *rest: Any, **more: Any) -> Any:
        name = self.fn.__name__
        kernel = SimpleNamespace(name=name, function=0, packed_metadata=())
        kernel.run = lambda *arguments: _mocked.append(name)
        kernel.launch_metadata = lambda *arguments: None
        self.device_caches[0][0][key] = kernel
        return kernel

    idle = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 0)
    idle.get_current_target = lambda: GPUTarget("cuda", 90, 32)
    with (
        mock.patch.object(driver, "_active", idle),
        mock.patch.object(JITFunction, "_do_compile", compiled),
        mock.patch.dict(os.environ, TRITON_INTERPRET="1"),  # `impl="triton"` requires it for CPU tensors
    ):
        yield _mocked


def cases() -> list[Case]:
    """One case for each operation of `launches.of_host`."""
    small_cases = []
    for operation in launches.of_host():
        inputs = functools.partial(operation.inputs, dtype=torch.float32)
        provider = {PROVIDER: functools.partial(operation.call, impl="triton")}
        small_cases.append(Case(operation.op, operation.shape, torch.float32, inputs, provider, None, ("fwd", "full")))
    return small_cases


def measure(case: Case, session: Session) -> list[Row]:
    """One row for each mode. The time is the minimum, over TURNS, of the mean processor time of CALLS calls: other work
    on the machine can only add to it."""
    inputs = case.inputs(session.device)
    measured = []
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
        measured.append(row | {"host_us": min(means), "launches": len(names)})
    return measured


def run(folder: Path, command: str) -> int:
    """Measures, prints and saves. Raises ValueError if Triton is not installed."""
    os.environ.pop("TRITON_INTERPRET", None)  # kernels read it when they are defined
    torch.set_num_threads(1)
    session = Session(machine.facts("cpu"), command, timing=False)
    for case in cases():
        measured = measure(case, session)
        rows.save(measured, folder / machine.folder_name(session.facts) / rows.FILE)
        for row in measured:
            print(f"{case.title:<66} {row['mode']:<5} {row['host_us']:8.1f} us  {row['launches']} launches", flush=True)
    return 0
