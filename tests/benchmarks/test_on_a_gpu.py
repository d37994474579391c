"""On a GPU: everything that is launched by default, first of all tests; every benchmark at its real sizes, again and
again with the same bits; and every kernel under compute-sanitizer."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from benchmarks import cases
from benchmarks.harness import machine
from benchmarks.harness.compare import compare, evaluate
from benchmarks.harness.session import Session

pytestmark = pytest.mark.gpu
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LAUNCHES = [
    pytest.param(index, id=f"{case.shape} {case.dtype}", marks=[pytest.mark.slow] * (case.dtype == torch.float16))
    for index, case in enumerate(cases.load("launches", "gpu", CPU))
]
CASES = [
    pytest.param(name, index, id=f"{name}-{case.shape}-{case.dtype}")
    for name in cases.ON_A_GPU
    for index, case in enumerate(cases.load(name, "gpu", CPU))
]


@pytest.fixture(scope="module")
def session():
    return Session(machine.facts("cuda"), "pytest", timing=False)


@pytest.mark.parametrize("index", LAUNCHES)
def test_every_launch_is_right(index, session):
    case = cases.load("launches", "gpu", CUDA)[index]
    machine.allow_tf32(case.tf32)
    problems = {provider: one.problem for provider, one in compare(case, case.inputs(CUDA), session).items()}
    assert not problems["fastgen"], problems


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool):
    """Every kernel at toy size. Sampling has CUDA graphs, which need the cache of memory that is off there."""
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("compute-sanitizer is not installed")
    # Without the cache every tensor is an allocation of its own, and what lies beyond it is out of bounds.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    options = {"cwd": machine.ROOT, "env": environment, "timeout": 420, "text": True}
    command = ["compute-sanitizer", f"--tool={tool}", "--error-exitcode=9", "--report-api-errors=no", sys.executable]
    command += ["-m", "benchmarks", "--dry-run", "--device", "cuda"]
    command += [name for name in cases.NAMES if name != "sampling"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    assert done.returncode == 0, done.stdout[-5000:]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "index"), CASES)
def test_kernels_at_real_sizes(name, index, session):
    case = cases.load(name, "gpu", CUDA)[index].without("compiled", "distributions", "F.")
    machine.allow_tf32(case.tf32)
    inputs = case.inputs(CUDA)
    problems = {provider: checked.problem for provider, checked in compare(case, inputs, session).items()}
    assert not any(problem for provider, problem in problems.items() if provider.startswith("fastgen")), problems
    # A race shows as a result that changes.
    inputs |= case.given(inputs)
    first = evaluate(case, case.providers["fastgen"], inputs)
    for _ in range(20):
        again = evaluate(case, case.providers["fastgen"], inputs)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True) if a is not None)
