"""Saved rows: replaced by key, fresh or stale, changes beyond noise; and what is drawn from them."""

import json

import pytest

from benchmarks.__main__ import main
from benchmarks.harness import cpu_tables, launches, machine, report, rows

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
    rows.save([row(), row(mode="fwd")], tmp_path)
    rows.save([row(ms_p50=2.0)], tmp_path)
    found = rows.load(tmp_path)
    assert [(r["mode"], r["ms_p50"]) for r in found] == [("full", 2.0), ("fwd", 1.0)]
    assert [file.name for file in tmp_path.iterdir()] == [rows.FILE]


def test_a_line_without_its_end_is_no_row(tmp_path):
    rows.save([row()], tmp_path)
    with (tmp_path / rows.FILE).open("a") as file:
        file.write('{"op": "torn')
    assert len(rows.load(tmp_path)) == 1
    rows.save([row(mode="fwd")], tmp_path)
    assert len(rows.load(tmp_path)) == 2 and len((tmp_path / rows.FILE).read_text().splitlines()) == 2


def test_rows_of_a_copy_are_saved_for_their_machine_with_the_commit_of_their_source(tmp_path):
    same = {"commit": "unknown", "source_sha256": machine.source_sha256()}
    brought = tmp_path / "out"
    rows.save([row(**same), row(mode="fwd", commit="unknown"), row(mode="bwd", gpu=None)], brought)
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
    assert main(["--compare", str(tmp_path), OP]) == 2


def test_status_tells_fresh_stale_and_missing():
    kernels = ["forward", "backward", "walk"]
    both = {"launched": ["forward", "backward"]}
    saved = [row(launched=["forward"]), row(gpu="Imaginary 2", kernel_sha256="old", **both), row(gpu=None)]
    saved += [row(op=rows.TESTS, ms_p50=None), row(op=rows.TESTS, gpu="Imaginary 2", ms_p50=None, problem="1 failed")]
    saved += [row(mode="fwd", launched=["backward"], ms_p50=None, problem="wrong")]
    assert rows.status(saved, kernels, ["Imaginary 1", "Imaginary 2"]) == [
        ("Imaginary 1", "forward", "fresh", 1, "fresh"),
        ("Imaginary 1", "backward", "missing", 0, "fresh"),
        ("Imaginary 1", "walk", "missing", 0, "fresh"),
        ("Imaginary 2", "forward", "stale", 1, "failed"),
        ("Imaginary 2", "backward", "stale", 1, "failed"),
        ("Imaginary 2", "walk", "missing", 0, "failed"),
    ]


def test_status_lists_every_kernel_of_the_catalogue(tmp_path, capsys):
    pytest.importorskip("triton")
    rows.save([row(launched=["reparameterize_kl_forward_kernel"])], tmp_path)
    assert main(["status", "--results", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("reparameterize_kl_forward_kernel" in line and "fresh" in line for line in lines)
    for name in launches.catalogue():
        word = "fresh" if name == "reparameterize_kl_forward_kernel" else "missing"
        assert any(name in line and word in line for line in lines)


def test_only_changes_beyond_noise_are_shown(capsys):
    old = [row(), row(mode="fwd"), row(mode="bwd"), row(dtype="bfloat16")]
    new = [
        row(provider="eager", ms_p50=None, problem="never had a time"),
        row(ms_p20=1.8, ms_p50=2.0, ms_p80=2.2),
        row(mode="fwd", ms_p20=0.95, ms_p50=1.05, ms_p80=1.2),
        row(mode="bwd", ms_p20=0.4, ms_p50=0.5, ms_p80=0.6),
        row(dtype="bfloat16", ms_p50=None, problem="out of memory"),
        row(shape="other"),
    ]
    assert [(ratio, after["mode"]) for ratio, _, after in rows.changes(old, new)] == [(2.0, "full"), (0.5, "bwd")]
    report.changes(old, new)
    printed = capsys.readouterr().out
    assert "had a time, and now: out of memory" in printed and "never" not in printed
    assert "2 changes" in printed and "2.00 times slower" in printed and "2.00 times faster" in printed


def test_rows_of_two_cpus_are_not_compared():
    assert rows.changes([row(gpu=None, cpu="A")], [row(gpu=None, cpu="B", ms_p20=8, ms_p50=9, ms_p80=10)]) == []


def test_the_table_names_the_best_rival_and_claims_nothing_else():
    saved = [row(graph_ms_p50=0.5), row(provider="eager", ms_p50=4.0), row(provider="fastgen, other", ms_p50=0.2)]
    saved += [
        row(provider="compiled", ms_p50=3.0, graph_ms_p50=2.0),
        row(provider="recurrence", ms_p50=0.1, error=None),
    ]
    saved += [row(provider="unchecked rival", error=None, ms_p50=3.5, landmark=False)]
    slower = {"shape": "8x8"}
    saved += [row(**slower), row(**slower, provider="eager", ms_p50=0.25), row(op=rows.TESTS, ms_p50=None)]
    section = report.performance_section(saved)
    # 3 and 1/4: a loss counts as every other size does.
    assert "| reparameterize_kl | full | 2 | 0.87 | 0.25 | 3.00 | 4.00 |" in section
    assert report.NOT_MEASURED not in section
    table = report.gpu_table("Imaginary 1", saved)
    assert "| 1024x4096 | float32 | full | fastgen | 1 (0.5) | compiled: 3 | 3.00 | 80% | - | 50 | 1.0e-07 |" in table
    assert "| 8x8 | float32 | full | fastgen | 1 | eager: 0.25 | 0.25 |" in table and rows.TESTS not in table


def test_a_gpu_has_its_table_beside_its_rows(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"{report.BEGIN}\n{report.END}\n")
    rows.save([row(), row(provider="eager")], tmp_path / "results" / "Imaginary-1")
    table = tmp_path / "results" / "Imaginary-1" / report.TABLE
    assert report.readme_tables(tmp_path / "results", check=True, readme=readme) == 1 and not table.exists()
    assert report.readme_tables(tmp_path / "results", check=False, readme=readme) == 0
    assert "Imaginary 1" in table.read_text() and "(benchmarks/results/Imaginary-1/table.md)" in readme.read_text()
    assert report.readme_tables(tmp_path / "results", check=True, readme=readme) == 0
    table.write_text("old")
    assert report.readme_tables(tmp_path / "results", check=True, readme=readme) == 1


def test_without_gpu_rows_nothing_is_claimed_of_a_gpu():
    of_cpu = {"op": "sampling", "gpu": None, "cpu": "C", "baseline": "forward pass"}
    times = {("m 1x2x3", 1): {"forward pass": 1.0, "eager": 3.7, "fastgen": 2.0}}
    times |= {("m 1x2x3", 2): {"forward pass": 1.0, "fastgen": 1.5}, ("n 1x4x4", 1): {"naive": 20.0, "fastgen": 0.5}}
    saved = [
        row(**of_cpu, shape=shape, threads=threads, provider=name, times_baseline=value)
        for (shape, threads), group in times.items()
        for name, value in group.items()
    ]
    section = report.performance_section([*saved, row(gpu=None)])
    assert report.NOT_MEASURED in section
    assert r"| m 1x2x3 | 2 | 6\* | 1.5 | 4 | 2" in section and "| n 1x4x4 | 1 | 20 | 0.5 | 40 | 2" in section
    table = cpu_tables.table("C", saved)
    assert "| m 1x2x3 | 1 | 3.7 | 2 | - | 2" in table and "| n 1x4x4 | 1 | - | 0.5 | 20 | 2" in table


def test_the_readme_is_what_the_rows_say():
    assert main(["readme-tables", "--check"]) == 0, "run `make readme-tables` and commit the result"


def test_a_stale_readme_is_noticed_and_written(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"above\n{report.BEGIN}\nold\n{report.END}\nbelow\n")
    assert report.readme_tables(tmp_path / "none", check=True, readme=readme) == 1
    assert report.readme_tables(tmp_path / "none", check=False, readme=readme) == 0
    text = readme.read_text()
    assert text.startswith("above\n") and text.endswith("below\n") and report.NOT_MEASURED in text
    assert report.readme_tables(tmp_path / "none", check=True, readme=readme) == 0
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="expected one pair"):
        report.readme_tables(tmp_path, check=True, readme=readme)
