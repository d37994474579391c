"""On a GPU: every benchmark at its real sizes against float64, and again and again with the same bits; and every kernel
under compute-sanitizer."""

import os
import shutil
import subprocess

import pytest
import torch

from benchmarks import machine, verify
from benchmarks.__main__ import NAMES
from benchmarks.agenda import load_cases
from benchmarks.runner import Session, compare, evaluate

CASES = [
    pytest.param(name, index, id=f"{name}-{case.shape}-{case.dtype}")
    for name in NAMES
    for index, case in enumerate(load_cases(name, "gpu", torch.device("cpu")))
]


@pytest.mark.gpu
@pytest.mark.parametrize("tool", verify.SANITIZERS)
def test_compute_sanitizer_finds_nothing(tool):
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("compute-sanitizer is not installed")
    # Without the cache every tensor is an allocation of its own, and what lies beyond it is out of bounds.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    options = {"cwd": machine.ROOT, "env": environment, "timeout": 420, "text": True}
    done = subprocess.run(verify.sanitize(tool), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    assert done.returncode == 0, done.stdout[-5000:]


@pytest.fixture
def tf32():
    """A session allows TF32; the tests that follow do not."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.gpu
@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize(("name", "index"), CASES)
def test_kernels_at_real_sizes(name, index):
    case = load_cases(name, "gpu", torch.device("cuda"))[index].without("compiled", "distributions", "F.")
    inputs = case.inputs(torch.device("cuda"))
    session = Session(torch.device("cuda"), "pytest", budget=0.0, timing=False)
    problems = {provider: checked.problem for provider, checked in compare(case, inputs, session).items()}
    assert not any(problem for provider, problem in problems.items() if provider.startswith("fastgen")), problems
    # A race shows as a result that changes.
    inputs |= case.given(inputs)
    first = evaluate(case, case.providers["fastgen"], inputs)
    for _ in range(20):
        again = evaluate(case, case.providers["fastgen"], inputs)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True) if a is not None)
