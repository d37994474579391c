"""GPU tests in several processes: each test runs once, even if one of them kills its process or hangs."""

import pytest
import torch

from benchmarks import gpu_tests
from benchmarks.__main__ import main
from benchmarks.harness import launches, machine, processes, rows

TESTS = """
import os, time
import pytest

def test_lost(request):
    request.session.shouldstop = "the GPU answers nothing more"

@pytest.mark.parametrize("n", range(7))
def test_good(n):
    pass

def test_bad():
    assert 1 == 2

def test_skipped():
    pytest.skip("not here")

def test_crash():
    os.kill(os.getpid(), 11)

def test_hang():
    time.sleep(60)

def test_offsets_beyond():
    pass
"""


@pytest.fixture
def shares(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_tests.Share, "patience", 4.0)
    (tmp_path / "test_some.py").write_text(TESTS)
    arguments = [str(tmp_path / "test_some.py"), "--rootdir", str(tmp_path)]
    return [gpu_tests.Share(i, 2, arguments) for i in (0, 1)]


def test_a_process_that_dies_or_hangs_costs_the_test_it_was_at(shares):
    assert processes.run(shares, lanes=2) == []
    found = gpu_tests.counts(shares)
    assert {word: found[word] for word in ("passed", "failed", "skipped", "not_run")} == {
        "passed": 9,
        "failed": 3,
        "skipped": 1,
        "not_run": 0,
    }
    problems = {line.partition("::")[2].partition(": ")[0]: line for line in found["failures"]}
    assert "killed by SIGSEGV" in problems["test_crash"] and "no result within 4 s" in problems["test_hang"]
    assert "assert 1 == 2" in problems["test_bad"]
    beyond = next(share for share in shares for name in share.outcomes if "offsets_beyond" in name)
    assert beyond is shares[0]


def test_a_process_that_never_runs_a_test_is_not_started_again(tmp_path):
    share = gpu_tests.Share(0, 1, ["--no-such-option"])
    with (tmp_path / "log.txt").open("wb", buffering=0) as log:
        assert processes.run([share], log=log.fileno()) == []
    assert share.collected is None and "no-such-option" in (tmp_path / "log.txt").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_how_the_tests_went_becomes_a_row(tmp_path, monkeypatch, capsys):
    pytest.importorskip("triton")
    facts = {**machine.facts("cpu"), "gpu": "Imaginary 1", "driver": "1.0"}
    monkeypatch.setattr(processes, "in_a_process", lambda work: facts)
    monkeypatch.setattr(gpu_tests, "PROCESSES", 1)
    tests = "import pytest\n@pytest.mark.gpu\ndef test_one(): pass\ndef test_two(): pass\n"
    (tmp_path / "test_one.py").write_text(tests)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu\n    slow\n")
    assert main(["gpu-tests", str(tmp_path / "test_one.py"), "--results", str(tmp_path / "results")]) == 0
    (row,) = rows.load(tmp_path / "results")
    assert (row["op"], row["passed"], row["failed"], row["not_run"]) == (rows.TESTS, 1, 0, 0) and row["problem"] == ""
    assert set(launches.catalogue().values()) <= set(row["kernels"]) and len(row["kernel_sha256"]) == 64
    assert "1 passed" in capsys.readouterr().out
