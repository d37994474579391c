"""Saved rows: replaced by key, fresh or stale; the status of kernels; changes beyond noise."""

import json
import re

import pytest

from benchmarks.__main__ import main
from benchmarks.harness import launches, machine, report, rows

OP = "reparameterize_kl"
(FILE,) = machine.KERNELS.rglob(f"{OP}.py")
KERNEL = FILE.relative_to(machine.KERNELS).with_suffix("").as_posix()


def row(**changes):
    found = {"op": OP, "kernels": [KERNEL], "shape": "1024x4096", "dtype": "float32", "provider": "fastgen"}
    found |= {
        "mode": "full",
        "ms_p20": 0.9,
        "ms_p50": 1.0,
        "ms_p80": 1.1,
        "peak_mb": 50.0,
        "error": 1e-7,
        "problem": "",
    }
    found |= {"gpu": "Imaginary 1", "driver": "1.0", "cuda": "13.0", "torch": "2.13.0", "triton": "3.7.1", "cpu": "C"}
    found |= {"commit": "abc", "kernel_sha256": machine.kernel_sha256([KERNEL]), "time": "2030-01-01", "command": ""}
    found |= {"baseline": "eager", "times_baseline": 0.5, "bytes": 100, "flops": 200, "copy_gb_s": 10.0, "batch": 1024}
    found |= {"matmul_tflop_s": 1.0, "threads": None, "copy_fraction": 0.8, "launched": []}
    return {**found, **changes}


def test_a_row_of_the_same_key_is_replaced(tmp_path):
    rows.save([row(), row(mode="fwd")], tmp_path / rows.FILE)
    rows.save([row(ms_p50=2.0)], tmp_path / rows.FILE)
    found = rows.load(tmp_path)
    assert [(r["mode"], r["ms_p50"]) for r in found] == [("full", 2.0), ("fwd", 1.0)]
    assert [file.name for file in tmp_path.iterdir()] == [rows.FILE]


def test_a_line_without_its_end_is_no_row(tmp_path):
    rows.save([row()], tmp_path / rows.FILE)
    with (tmp_path / rows.FILE).open("a") as file:
        file.write('{"op": "torn')
    assert len(rows.load(tmp_path)) == 1
    rows.save([row(mode="fwd")], tmp_path / rows.FILE)
    assert len(rows.load(tmp_path)) == 2 and len((tmp_path / rows.FILE).read_text().splitlines()) == 2


def test_rows_of_a_copy_are_saved_for_their_machine_with_the_commit_of_their_source(tmp_path):
    same = {"commit": "unknown", "source_sha256": machine.source_sha256()}
    brought = tmp_path / "out"
    rows.save([row(**same), row(mode="fwd", commit="unknown"), row(mode="bwd", gpu=None)], brought / rows.FILE)
    assert main(["adopt", str(brought / rows.FILE), "--results", str(tmp_path / "results")]) == 0
    found = rows.load(tmp_path / "results" / "Imaginary-1")
    assert [one["commit"] for one in found] == [machine.commit(), "unknown"]
    assert rows.load(tmp_path / "results" / "cpu-C")[0]["mode"] == "bwd"


def test_what_is_no_row_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(row()) + "\n{broken\n")
    with pytest.raises(ValueError, match=r"a.jsonl:2: not a row"):
        rows.load(tmp_path)
    with pytest.raises(ValueError, match="no such file"):
        rows.load(tmp_path / "nothing")
    (tmp_path / "b.jsonl").write_text('{"side": 8}\n')
    assert rows.read(tmp_path / "b.jsonl") == [{"side": 8}]
    with pytest.raises(ValueError, match=r"b.jsonl:1: not a row of benchmark results"):
        rows.load(tmp_path / "b.jsonl")
    assert main(["--compare", str(tmp_path), OP]) == 2


def test_status_tells_of_each_kernel_how_it_went_and_whether_that_is_of_todays_source():
    names = ["forward", "backward", "walk", "scan"]
    saved = [row(launched=["forward"], verdict="correct"), row(op=rows.TESTS, ms_p50=None, launched=[])]
    saved += [row(mode="fwd", launched=["backward"], ms_p50=None, verdict="wrong", problem="wrong: error 1")]
    saved += [row(mode="bwd", launched=["forward", "walk"], verdict="dead", died_in="walk", problem="SIGSEGV")]
    forward, backward, walk, scan = report.kernels(saved, names)
    assert re.match(r"correct +forward +times fresh \(2 rows\) +tests fresh +largest error 1.0e-07$", forward)
    assert re.match(r"wrong +backward +times missing \(0 rows\) .* 1024x4096 float32 fwd: wrong: error 1$", backward)
    assert re.match(r"dead +walk .*SIGSEGV$", walk) and re.match(r"not launched +scan +times missing", scan)
    saved = [row(launched=["forward"], kernel_sha256="old"), row(op=rows.TESTS, problem="1 failed")]
    assert "times stale (1 rows)" in report.kernels(saved, names)[0]
    assert all("tests failed" in line for line in report.kernels(saved, names))


def test_status_lists_every_kernel_of_the_catalogue(tmp_path, capsys):
    pytest.importorskip("triton")
    rows.save([row(launched=["reparameterize_kl_forward_kernel"])], tmp_path / rows.FILE)
    assert main(["status", "--results", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Imaginary 1" and len(lines) == 1 + len(launches.catalogue())
    for name, line in zip(launches.catalogue(), lines[1:], strict=True):
        assert name in line and ("times fresh" in line) is (name == "reparameterize_kl_forward_kernel")


def test_only_changes_beyond_noise_are_shown():
    old = [row(), row(mode="fwd"), row(mode="bwd"), row(dtype="bfloat16")]
    new = [
        row(provider="eager", ms_p50=None, problem="never had a time"),
        row(ms_p20=1.8, ms_p50=2.0, ms_p80=2.2),
        row(mode="fwd", ms_p20=0.95, ms_p50=1.05, ms_p80=1.2),
        row(mode="bwd", ms_p20=0.4, ms_p50=0.5, ms_p80=0.6),
        row(dtype="bfloat16", ms_p50=None, problem="out of memory"),
        row(shape="other"),
    ]
    slower, faster, failing = report.changes(old, new)
    assert "full" in slower and "2.00 times slower" in slower and "bwd" in faster and "2.00 times faster" in faster
    assert "bfloat16" in failing and "had a time, and now: out of memory" in failing


def test_rows_of_two_cpus_are_not_compared():
    assert report.changes([row(gpu=None, cpu="A")], [row(gpu=None, cpu="B", ms_p20=8, ms_p50=9, ms_p80=10)]) == []
