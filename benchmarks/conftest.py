"""`pytest benchmarks --benchmark-only`: the same cases under pytest-benchmark, to track regressions with it."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # must be chosen before kernels are defined


def pytest_addoption(parser):
    parser.addoption("--size", default=None, help="toy, cpu, cpu-full, gpu or gpu-full (default: cpu or gpu)")
    parser.addoption("--op", default=None, help="only this benchmark")


def pytest_generate_tests(metafunc):
    """One test a case, provider and mode. All of them stand first in their file's own order."""
    from benchmarks.cases import NAMES, load
    from benchmarks.harness.case import INTERPRETED, SIZES, name_of

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = metafunc.config.getoption("--size") or ("gpu" if device.type == "cuda" else "cpu")
    if size not in SIZES:
        raise pytest.UsageError(f"--size must be one of {', '.join(SIZES)}, got {size!r}")
    only = metafunc.config.getoption("--op")
    if only not in (None, *NAMES):
        raise pytest.UsageError(f"--op must be one of {', '.join(NAMES)}, got {only!r}")
    parameters = [
        pytest.param(case, provider, mode, id=f"{name}-{case.shape}-{name_of(case.dtype)}-{provider}-{mode}")
        for name in ([only] if only else NAMES)
        for case in load(name, size, device)
        for provider in case.providers
        for mode in case.timed_modes(provider)
        if INTERPRETED not in provider
    ]
    metafunc.parametrize(("case", "provider", "mode"), parameters)
