"""A GPU and little time, on a GPU that is only pretended: the order, and what is left after a crash, a wrong result, a
hang, no memory, a lost context, and after the run itself was killed."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from pretended_gpu import NAME, pretend

from benchmarks import cases, first_contact
from benchmarks.__main__ import main
from benchmarks.cases import launches
from benchmarks.harness import machine, rows
from tests.benchmarks.square import case, out_of_memory, square

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


MODES = ("fwd", "bwd", "full")


def crash(x):
    os.kill(os.getpid(), signal.SIGSEGV)


def wrong(x):
    return x * x * 1.001


def hang(x):
    time.sleep(60)


def illegal_access(x):
    machine.lost = lambda device: True  # of this process only
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


PLANTED = {
    crash: ("dead", "killed by SIGSEGV"),
    wrong: ("wrong", "wrong: error 0.001"),
    hang: ("dead", "no result within 2 s"),
    out_of_memory: ("dead", "out of memory"),
    illegal_access: ("dead", "an illegal memory access was encountered"),
}


def case_of(shape, planted, **options):
    return case({"fastgen": planted, "compiled": lambda x: x**2}, shape, **options)


@pytest.fixture
def planted(monkeypatch, tmp_path):
    """first-contact with one launch and one headline on a pretended GPU; `run(fault)` returns status and rows."""

    def start(fault, *options):
        monkeypatch.setattr(first_contact, "PATIENCE", 2.0 if fault is hang else 20.0)
        compared = {"modes": ("full",), "timed": False, "blocking": True}
        own = {"launches": [case_of("launch", fault, **compared), case_of("next", square, **compared)]}
        own["square"] = [case_of("headline", fault), case_of("later", square)]
        monkeypatch.setattr(cases, "load", lambda name, size, device: own[name])
        monkeypatch.setattr(cases, "ON_A_GPU", ("square",))
        monkeypatch.setattr(first_contact, "HEADLINES", [("square", "float32", "headline")])
        status = main(["first-contact", "--minutes", "1", *options])
        return status, {(row["shape"], row["provider"], row["mode"]): row for row in rows.load(tmp_path)}

    monkeypatch.setenv("OUT", str(tmp_path))
    with pretend(monkeypatch):
        yield start


@pytest.mark.parametrize("fault", PLANTED)
def test_a_fault_costs_its_own_row_only(fault, planted, tmp_path, capsys):
    status, saved = planted(fault)
    assert status == (0 if fault is out_of_memory else 1)
    verdict, problem = PLANTED[fault]
    expected = {("launch", "full"), ("next", "full"), *((s, m) for s in ("headline", "later") for m in MODES)}
    assert {(shape, mode) for shape, _, mode in saved} == expected
    for (shape, provider, mode), row in saved.items():
        assert row["gpu"] == NAME and row["matmul_tflop_s"] == 1.0
        if provider == "fastgen" and shape in ("launch", "headline"):
            assert row["verdict"] == verdict and problem in row["problem"] and not row["ms_p50"]
        else:
            assert row["verdict"] == "correct" and row["error"] is not None and not row["problem"]
            assert (row["ms_p50"] is None) is (shape in ("launch", "next")), (shape, provider, mode)
    assert problem in capsys.readouterr().out
    assert sorted(file.name for file in tmp_path.iterdir()) == ["log.txt", "rows.jsonl", "table.md"]
    before = (tmp_path / "rows.jsonl").read_text()
    assert planted(fault, "--resume")[0] == 0 and (tmp_path / "rows.jsonl").read_text() == before


def test_what_was_mended_is_run_again(planted, monkeypatch):
    planted(crash)
    monkeypatch.setattr(machine, "source_sha256", lambda: "another")
    status, saved = planted(square, "--resume")
    assert status == 0 and all(row["verdict"] == "correct" for row in saved.values())


def test_the_kernel_that_a_process_died_in_is_named(planted, monkeypatch, tmp_path, capsys):
    """The dead kernel is the last one that was launched."""
    pytest.importorskip("triton")
    kl = next(one for one in launches.operations(launches.TOY) if one.op == "reparameterize_kl")

    def launch_and_crash(x):
        kl.call(**kl.inputs(torch.device("cpu"), dtype=torch.float32), impl="triton")
        os.kill(os.getpid(), signal.SIGSEGV)

    saved = planted(launch_and_crash)[1]
    dead = saved["launch", "fastgen", "full"]
    assert dead["launched"] == ["reparameterize_kl_forward_kernel"] and dead["died_in"] == dead["launched"][0]
    assert "dead         reparameterize_kl_forward_kernel" in capsys.readouterr().out


def test_imports_that_use_cuda_are_done_without(monkeypatch, capsys):
    """Otherwise forks could not use CUDA."""
    started = []

    def initialized():
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

    monkeypatch.setattr(torch.cuda, "init", initialized)
    monkeypatch.setattr(os, "execv", lambda program, command: started.append(command))
    monkeypatch.setattr(sys, "argv", ["benchmarks", "first-contact", "--minutes", "3"])
    monkeypatch.setenv(first_contact.LEAN, "")
    monkeypatch.delenv(first_contact.LEAN)  # and gone again after the test
    first_contact._preload()
    assert started == [[sys.executable, "-m", "benchmarks", "first-contact", "--minutes", "3"]]
    first_contact._preload()
    assert len(started) == 1


def test_the_headlines_are_cases_of_a_gpu():
    for name, dtype, shape in first_contact.HEADLINES:
        if name != "probes":
            own = cases.load(name, "gpu", torch.device("cpu"))
            found = [(case.op, str(case.dtype), case.shape) for case in own]
            assert found.count((name, f"torch.{dtype}", shape)) == 1, (name, dtype, shape)


def test_a_killed_run_leaves_whole_rows_and_goes_on(tmp_path):
    """Runs the command itself, on all benchmarks at toy size."""
    command = [sys.executable, "-m", "tests.benchmarks.pretended_gpu", "first-contact", "--minutes", "0.5"]
    environment = {**os.environ, "OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(command, cwd=machine.ROOT, env=environment, stdout=subprocess.DEVNULL)
    file = tmp_path / rows.FILE
    end = time.monotonic() + 40
    while time.monotonic() < end and (not file.exists() or len(file.read_text().splitlines()) < 10):
        time.sleep(0.05)
    run.kill()
    run.wait()
    killed = file.read_text()
    assert killed.endswith("\n") and len(rows.load(tmp_path)) >= 10
    assert sorted(one.name for one in tmp_path.iterdir()) == ["log.txt", rows.FILE]
    time.sleep(1.5)
    assert file.read_text() == killed, "a child went on alone"
    with file.open("a") as torn:
        torn.write('{"op": "to')
    assert len(rows.load(tmp_path)) == len(killed.splitlines())
    rows.save([], tmp_path / rows.FILE)
    assert file.read_text() == killed
