"""`pytest benchmarks --benchmark-only`: the same cases under pytest-benchmark, to track regressions with it."""

import os

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # must be set before kernels are defined


def pytest_addoption(parser):
    parser.addoption("--size", help="toy, cpu, cpu-full, gpu or gpu-full (default: cpu or gpu)")
    parser.addoption("--op", help="only this benchmark")


def pytest_generate_tests(metafunc):
    """Makes one test for each case, provider and mode."""
    from benchmarks.cases import NAMES, load
    from benchmarks.harness.case import INTERPRETED, SIZES, name_of

    size = metafunc.config.getoption("--size") or DEVICE.type.replace("cuda", "gpu")
    only = metafunc.config.getoption("--op")
    for option, value, known in (("--size", size, SIZES), ("--op", only, (None, *NAMES))):
        if value not in known:
            raise pytest.UsageError(f"{option} must be one of {', '.join(filter(None, known))}, got {value!r}")
    parameters = [
        pytest.param(case, provider, mode, id=f"{name}-{case.shape}-{name_of(case.dtype)}-{provider}-{mode}")
        for name in ([only] if only else NAMES)
        for case in load(name, size, DEVICE)
        if case.timed
        for provider in case.providers
        for mode in case.timed_modes(provider)
        if INTERPRETED not in provider
    ]
    metafunc.parametrize(("case", "provider", "mode"), parameters)
