"""`python -m benchmarks host`: what the host takes for a call of each public operation, in microseconds; needs no GPU.

Launches end at a driver that does nothing: what remains is Python, PyTorch's dispatcher, autograd, allocations and
Triton's way to a launch. On a GPU the driver's own 2 to 3 us a launch are added, and the
column host_us of its rows is the whole.
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
_mocked: list[str] = []  # one for all: what was compiled is kept beyond the `mocked` that it was compiled in


@contextlib.contextmanager
def mocked() -> Iterator[list[str]]:
    """Inside, `impl="triton"` takes tensors of a CPU and launches nothing; the names of the kernels, one a launch.

    Triton's driver is what all ways of launching share: `kernel[grid](...)` binds, specializes and looks up, later
    launches may call what that compiled at once, and both end at a launcher of the driver. Here the driver is one of
    sm_90 that does nothing, and what would be compiled is an empty kernel.

    Raises:
        RuntimeError: TRITON_INTERPRET=1 is set: kernels are in Triton's interpreter here.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    catalogue()  # defines all kernels, which read the environment then
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
        mock.patch.dict(os.environ, TRITON_INTERPRET="1"),  # what `impl="triton"` wants for tensors of a CPU
    ):
        yield _mocked


def cases() -> list[Case]:
    small_cases = []
    for operation in launches.of_host():
        inputs = functools.partial(operation.inputs, dtype=torch.float32)
        provider = {PROVIDER: functools.partial(operation.call, impl="triton")}
        small_cases.append(Case(operation.op, operation.shape, torch.float32, inputs, provider, None, ("fwd", "full")))
    return small_cases


def measure(case: Case, session: Session) -> list[Row]:
    """A row a mode: the least of some means over calls, of the processor's time, for what else runs only adds to it."""
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
    """Raises ValueError where Triton is not installed."""
    os.environ.pop("TRITON_INTERPRET", None)  # read when kernels are defined
    torch.set_num_threads(1)
    session = Session(machine.facts("cpu"), command, timing=False)
    for case in cases():
        measured = measure(case, session)
        rows.save(measured, folder / machine.folder_name(session.facts) / rows.FILE)
        for row in measured:
            print(f"{case.title:<66} {row['mode']:<5} {row['host_us']:8.1f} us  {row['launches']} launches", flush=True)
    return 0
