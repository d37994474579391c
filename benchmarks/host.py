"""`python -m benchmarks host`: what the host takes for a call of each public operation, in microseconds; needs no GPU.

Launches end at a driver that does nothing (harness/mocked_launches.py): what remains is Python, PyTorch's dispatcher,
autograd, allocations and Triton's way to a launch. Sizes are small, for what the operations leave to PyTorch is
computed. On a GPU the driver's own 2 to 3 us a launch are added, and the column host_us of its rows is the whole.
"""

import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import launches, reconstruction_nll, reparameterize_kl
from benchmarks.cases.elbo import fused
from benchmarks.cases.elbo import inputs as elbo_inputs
from benchmarks.harness import machine, rows
from benchmarks.harness.case import Case
from benchmarks.harness.compare import Checked
from benchmarks.harness.mocked_launches import mocked
from benchmarks.harness.rows import Row
from benchmarks.harness.runner import empty_row, prepare
from benchmarks.harness.session import Session
from benchmarks.harness.timing import Samples
from fastgen import ops

PROVIDER = "fastgen, launches mocked"
WARM, CALLS, TURNS = 20, 20, 15


def cases() -> list[Case]:
    """One small size an operation, in float32; of the scan two: a launch in all, and a launch a step."""
    single = functools.partial
    convolution: dict[str, Any] = {"sizes": (2, 32, 64, 8), "kernel": 3, "mask_type": "B", "of_mask": 1}
    own = {"bernoulli": (8, 1, 8, 8), "gaussian": (8, 3, 8, 8), "categorical": (2, 3, 4, 4)}
    own["logistic_mixture"] = (2, 3, 8, 8)
    found: dict[tuple[str, str], tuple[Callable[..., Any], Callable[..., Any]]] = {
        ("masked_conv2d", "2x32x8x8 to 64, 3x3 B gated"): (
            single(launches.convolution, dtype=torch.float32, **convolution),
            single(launches.convolve, call=ops.masked_conv2d, activation="gated", impl="triton"),
        ),
        ("row_lstm", "B=2 h=16 8x8 k=3"): (
            single(launches.scan, dtype=torch.float32, sizes=(2, 16, 8, 8), taps=3),
            single(ops.row_lstm, impl="triton"),
        ),
        ("reparameterize_kl", "128x20"): (
            single(reparameterize_kl.inputs, shape=(128, 20), dtype=torch.float32),
            single(ops.reparameterize_kl, impl="triton"),
        ),
        ("elbo", "bernoulli 8x1x8x8 D=20"): (
            single(elbo_inputs, likelihood="bernoulli", image=(8, 1, 8, 8), latent=20),
            single(fused, likelihood="bernoulli", impl="triton"),
        ),
    }
    for units in (16, 128):
        found["diagonal_lstm", f"B=2 h={units} 8x8"] = (
            single(launches.scan, dtype=torch.float32, sizes=(2, units, 8, 8), taps=2),
            single(ops.diagonal_lstm, impl="triton"),
        )
    for likelihood, image in own.items():
        found["reconstruction_nll", f"{likelihood} {'x'.join(map(str, image))}"] = (
            single(reconstruction_nll.likelihood_inputs, likelihood=likelihood, image=image, dtype=torch.float32),
            single(ops.reconstruction_nll, likelihood=likelihood, impl="triton"),
        )
    return [
        Case(op, shape, torch.float32, inputs, {PROVIDER: call}, None, ("fwd", "full"))
        for (op, shape), (inputs, call) in found.items()
    ]


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
            names, samples = list(launched), Samples()
            for _ in range(TURNS):
                start = time.process_time()
                for _ in range(CALLS):
                    call()
                samples.add("host_us", [1e6 * (time.process_time() - start) / CALLS])
        row = empty_row(case, session, PROVIDER, mode, Checked(launched=names))
        found.append(row | {"host_us": min(samples.extra["host_us"]), "launches": len(names)})
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
