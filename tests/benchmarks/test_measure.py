"""`python -m benchmarks` on a pretended GPU, so that no branch of it runs for the first time on a real one."""

from dataclasses import replace

import pytest
import torch
from pretended_gpu import NAME, pretend

from benchmarks import cases
from benchmarks.__main__ import main
from benchmarks.harness import machine, rows

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.mark.parametrize("name", cases.ON_A_GPU)
def test_every_benchmark_runs_and_saves_its_rows(name, monkeypatch, tmp_path, capsys):
    with pretend(monkeypatch):
        assert main(["--device", "cuda", "--full", "--results", str(tmp_path), name]) == 0, capsys.readouterr().out
        saved = rows.load(tmp_path / "Pretended-GPU")
        assert not [row["problem"] for row in saved if row["problem"]]
        for row in saved:
            assert row["gpu"] == NAME and row["threads"] is None and row["ms_p50"] > 0 and row["tf32"]
            assert {"warm_ms_p50", "wall_ms_p50"} <= row.keys() and row["power"] and row["host_us"] > 0
            assert ("graph_ms_p50" in row) is not ("reduce-overhead" in row["provider"] or "CUDA" in row["provider"])
            assert row["landmark"] or row["error"] is not None or row["share"]
        written = {(row["op"], row["shape"], row["dtype"], row["provider"], row["mode"]) for row in saved}
        assert len(written) == len(saved)
        assert main(["--device", "cuda", "--full", "--results", str(tmp_path), "--resume", name]) == 0
        assert f"{len(saved)} rows of an earlier run are still valid" in capsys.readouterr().out


def test_where_no_time_is_left_the_rest_is_named(monkeypatch, tmp_path, capsys):
    with pretend(monkeypatch):
        run = ["--device", "cuda", "--results", str(tmp_path), "elbo"]
        assert main([*run, "--budget", "0"]) == 0
        assert "no time was left for 2 cases (2 of elbo)" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_rows_of_another_kernel_or_version_are_measured_again(monkeypatch, tmp_path):
    with pretend(monkeypatch):
        main(["--device", "cuda", "--results", str(tmp_path), "elbo"])
        case = cases.load("elbo", "gpu", torch.device("cuda"))[0]
    saved = {rows.key(row): row for row in rows.load(tmp_path)}
    facts = {name: next(iter(saved.values()))[name] for name in ("gpu", "cpu", "source_sha256", *rows.VERSIONS)}

    def known(saved, timed=True):
        return not rows.left([case], facts, saved, timed=timed)

    assert known(saved)
    for change in ({"torch": "1.0"}, {"driver": "1.0"}):
        assert not known({k: row | change for k, row in saved.items()})
    assert not known({k: row | {"kernels": ["changed"]} for k, row in saved.items()})
    assert not known(dict(list(saved.items())[1:]))
    untimed = {k: row | {"ms_p50": None} for k, row in saved.items()}
    assert not known(untimed) and known(untimed, timed=False)
    assert known({k: row | {"ms_p50": None, "problem": "out of memory"} for k, row in saved.items()})


def test_a_cpu_is_measured_with_one_thread_and_with_all(monkeypatch, tmp_path):
    load = cases.load
    small = lambda name, size, device: [replace(case, modes=("fwd",)) for case in load(name, "toy", device)[:1]]  # noqa: E731
    monkeypatch.setattr(cases, "load", small)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert main(["--device", "cpu", "--results", str(tmp_path), "elbo"]) == 0
    saved = rows.load(tmp_path / machine.folder_name(machine.facts("cpu")))
    assert {row["threads"] for row in saved} == {1, 2}
    timed = [row for row in saved if "interpreted" not in row["provider"]]
    assert all(row["ms_p50"] and row["copy_gb_s"] and row["gpu"] is None for row in timed)
