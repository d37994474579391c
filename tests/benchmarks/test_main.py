"""The commands of `python -m benchmarks`, at toy size."""

import os
import re
import subprocess
import sys

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.cases import NAMES
from benchmarks.harness import machine


@pytest.mark.parametrize("name", [name for name in NAMES if name != "launches"])  # which have a test of their own
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in Triton's interpreter
def test_every_benchmark_agrees_with_float64_at_toy_size(name, capsys):
    assert main(["--dry-run", name]) == 0
    printed = capsys.readouterr().out
    assert "0 with a problem" in printed and "not timed, not saved" in printed


def test_wrong_usage_is_one_line_and_status_2(capsys):
    assert main(["no_such_benchmark"]) == main(["status", "masked_conv2d"]) == 2
    assert "unknown benchmark 'no_such_benchmark'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit:
        main(["--minutes", "soon"])
    assert exit.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_is_not_made_up(capsys):
    assert main(["--device", "cuda"]) == 2
    assert "finds no CUDA GPU" in capsys.readouterr().err
    for command in ("gpu-tests", "first-contact"):
        assert main([command]) == 2
        assert "finds no CUDA GPU" in capsys.readouterr().err


def test_pytest_benchmark_runs_the_same_cases():
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "--size", "toy", "--op", NAMES[0]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = ["-p", "no:xdist", "-p", "no:cacheprovider", "--benchmark-disable-gc"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=machine.ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Name (time in" in done.stdout


def test_the_harness_knows_no_case_and_cases_know_of_it_what_a_case_is():
    """Imports point in one direction."""
    rooms = {"harness": {"harness"}, "cases": {"cases", "harness.case"}}
    rooms["figures"] = {"figures", "harness", "cases.sampling"}
    for folder, allowed in rooms.items():
        for file in (machine.ROOT / "benchmarks" / folder).glob("*.py"):
            for name in re.findall(r"^\s*(?:from|import) benchmarks\.?(\S*)", file.read_text(), re.M):
                assert any(f"{name}.".startswith(f"{one}.") for one in allowed), (file.name, name)
