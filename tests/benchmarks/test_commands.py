"""The commands themselves, at toy size."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import machine, report, rows, verify
from benchmarks.__main__ import NAMES, main
from benchmarks.agenda import ON_A_CPU, ON_A_GPU, load_cases
from benchmarks.case import SIZES
from benchmarks.runner import Session, measure


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_agrees_with_float64_at_toy_size(name, capsys):
    assert main(["--dry-run", name]) == 0
    printed = capsys.readouterr().out
    assert "0 with a problem" in printed and "not timed, not saved" in printed


def test_every_benchmark_has_a_place_in_the_agenda():
    assert sorted(ON_A_GPU) == sorted(ON_A_CPU) == sorted(NAMES)


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


def test_how_the_tests_went_becomes_a_row(tmp_path):
    def outcome(name, why=""):
        return SimpleNamespace(nodeid=name, longrepr=("file", 1, f"Skipped: {why}"))

    stats = {"passed": [outcome("a")] * 6, "failed": [outcome("b")], "error": [outcome("c")], "": [outcome("setup")]}
    stats["skipped"] = [outcome("d", "needs two GPUs"), outcome("e", verify.NO_TIME)]
    found = verify.counts(stats)
    assert found == {"passed": 6, "failed": 2, "skipped": 1, "not_run": 1, "failures": ["b", "c"]}
    row = verify.row("all", "", found, torch.device("cpu"), "command")
    assert set(report.catalogue_kernels()) <= set(row["kernels"]) and len(row["kernel_sha256"]) == 64
    rows.save([row], tmp_path)
    assert rows.load(tmp_path)[0]["passed"] == 6


def test_pytest_benchmark_runs_the_same_cases():
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "--size", "toy", "--op", NAMES[0]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = ["-p", "no:xdist", "-p", "no:cacheprovider", "--benchmark-disable-gc"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=machine.ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Name (time in" in done.stdout


def test_the_likelihoods_kernels_are_all_launched_at_toy_size():
    """Those of the scans and of the masked convolution depend on the chip and the size."""
    pytest.importorskip("triton")
    session = Session(torch.device("cpu"), "", budget=0.0, timing=False)
    launched = set()
    for name in ("reparameterize_kl", "reconstruction_nll"):
        for case in load_cases(name, "toy", torch.device("cpu")):
            launched |= {kernel for row in measure(case, session) for kernel in row["launched"]}
    kernels = report.catalogue_kernels()
    modules = ("vae/reparameterize_kl", "likelihood/pointwise", "likelihood/categorical", "likelihood/mixture")
    assert launched == {kernel for module in modules for kernel in kernels[module]}
