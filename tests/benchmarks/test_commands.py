"""The commands themselves, at toy size."""

import os
import subprocess
import sys

import pytest
import torch

from benchmarks import machine, rows, verify
from benchmarks.__main__ import NAMES, load_cases, main
from benchmarks.case import SIZES


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_agrees_with_float64_at_toy_size(name, capsys):
    assert main(["--dry-run", name]) == 0
    printed = capsys.readouterr().out
    assert "0 with a problem" in printed and "not timed, not saved" in printed


@pytest.mark.parametrize("name", NAMES)
def test_every_size_is_stated(name):
    for size in SIZES:
        cases = load_cases(name, size, torch.device("cpu"))
        assert cases and len({(case.op, case.shape, case.dtype) for case in cases}) == len(cases)
        assert cases[0].op == name  # a file may hold more that belongs to it, as whole layers do


def test_wrong_usage_is_one_line_and_status_2(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["no_such_benchmark"])
    assert exit.value.code == 2
    assert "unknown benchmark 'no_such_benchmark'" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_is_not_made_up(capsys):
    assert main(["--device", "cuda"]) == 2
    assert "finds no CUDA GPU" in capsys.readouterr().err
    assert main(["gpu-tests"]) == 2
    assert "finds no CUDA GPU" in capsys.readouterr().err


def test_a_report_of_tests_becomes_a_row(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite tests="9" failures="1" errors="1" skipped="2"/>'
        '<testsuite tests="1" failures="0" errors="0" skipped="0"/></testsuites>'
    )
    found = verify.counts(report)
    assert found == {"passed": 6, "failed": 2, "skipped": 2}
    row = verify.row("pytest", "", found, torch.device("cpu"), "command")
    assert (
        "reparameterize_kl" in row["kernels"] and "catalogue" not in row["kernels"] and len(row["kernel_sha256"]) == 64
    )
    rows.save([row], tmp_path)
    assert rows.load(tmp_path)[0]["passed"] == 6


def test_pytest_benchmark_runs_the_same_cases():
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "--size", "toy", "--op", NAMES[0]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = ["-p", "no:xdist", "-p", "no:cacheprovider", "--benchmark-disable-gc"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=machine.ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Name (time in" in done.stdout
