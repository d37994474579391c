"""Text that is written from rows: the README's section, and the table of each machine."""

import pytest

from benchmarks.__main__ import main
from benchmarks.figures import tables
from benchmarks.harness import rows
from tests.benchmarks.harness.test_rows import row


def test_the_table_names_the_best_rival_and_claims_nothing_else():
    saved = [row(graph_ms_p50=0.5), row(provider="eager", ms_p50=4.0), row(provider="fastgen, other", ms_p50=0.2)]
    saved += [
        row(provider="compiled", ms_p50=3.0, graph_ms_p50=2.0),
        row(provider="recurrence", ms_p50=0.1, error=None),
    ]
    saved += [row(provider="unchecked rival", error=None, ms_p50=3.5, landmark=False)]
    slower = {"shape": "8x8"}
    saved += [row(**slower), row(**slower, provider="eager", ms_p50=0.25), row(op=rows.TESTS, ms_p50=None)]
    section = tables.performance_section(saved)
    # 3 and 1/4: a loss counts as every other size does.
    assert "| reparameterize_kl | full | 2 | 0.87 | 0.25 | 3.00 | 4.00 |" in section
    assert tables.NOT_MEASURED not in section
    table = tables.gpu_table("Imaginary 1", saved)
    assert (
        "| 1024x4096 | float32 | full | fastgen | 1 (0.5) | compiled: 3 | 3.00 | 80% | - | - | 50 | 1.0e-07 |" in table
    )
    assert "| 8x8 | float32 | full | fastgen | 1 | eager: 0.25 | 0.25 |" in table and rows.TESTS not in table


def test_a_gpu_has_its_table_beside_its_rows(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"{tables.BEGIN}\n{tables.END}\n")
    rows.save([row(), row(provider="eager")], tmp_path / "results" / "Imaginary-1" / rows.FILE)
    table = tmp_path / "results" / "Imaginary-1" / tables.TABLE
    assert tables.write(tmp_path / "results", check=True, readme=readme) == 1 and not table.exists()
    assert tables.write(tmp_path / "results", check=False, readme=readme) == 0
    assert "Imaginary 1" in table.read_text() and "(benchmarks/results/Imaginary-1/table.md)" in readme.read_text()
    assert tables.write(tmp_path / "results", check=True, readme=readme) == 0
    table.write_text("old")
    assert tables.write(tmp_path / "results", check=True, readme=readme) == 1


def test_without_gpu_rows_nothing_is_claimed_of_a_gpu():
    of_cpu = {"op": "sampling", "gpu": None, "cpu": "C", "baseline": "forward pass"}
    times = {("m 1x2x3", 1): {"forward pass": 1.0, "eager": 3.7, "fastgen": 2.0}}
    times |= {("m 1x2x3", 2): {"forward pass": 1.0, "fastgen": 1.5}, ("n 1x4x4", 1): {"naive": 20.0, "fastgen": 0.5}}
    saved = [
        row(**of_cpu, shape=shape, threads=threads, provider=name, times_baseline=value)
        for (shape, threads), group in times.items()
        for name, value in group.items()
    ]
    section = tables.performance_section([*saved, row(gpu=None)])
    assert tables.NOT_MEASURED in section
    assert r"| m 1x2x3 | 2 | 6\* | 1.5 | 4 | 2" in section and "| n 1x4x4 | 1 | 20 | 0.5 | 40 | 2" in section
    table = tables.cpu_table("C", tables.cpu_samples(saved)["C"])
    assert "| m 1x2x3 | 1 | 3.7 | 2 | - | 2" in table and "| n 1x4x4 | 1 | - | 0.5 | 20 | 2" in table


def test_a_wrong_result_is_called_wrong_and_has_no_time():
    of_cpu = {"op": "sampling", "gpu": None, "cpu": "C", "baseline": "forward pass", "shape": "M 1x4x4", "threads": 1}
    naive = row(**of_cpu, provider="naive", times_baseline=16.0)
    wrong = row(**of_cpu, provider="fastgen", times_baseline=None, ms_p50=None, problem="wrong: error 1, allowed 0")
    sampled = tables.cpu_samples([naive, wrong])["C"]
    assert "| 16 | wrong: error 1, allowed 0 |" in tables.cpu_table("C", sampled)
    assert "M 1x4x4" not in "\n".join(tables.cpu_summary("C", sampled))


def test_the_readme_is_what_the_rows_say():
    assert main(["readme-tables", "--check"]) == 0, "run `make readme-tables` and commit the result"


def test_a_stale_readme_is_noticed_and_written(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"above\n{tables.BEGIN}\nold\n{tables.END}\nbelow\n")
    assert tables.write(tmp_path / "none", check=True, readme=readme) == 1
    assert tables.write(tmp_path / "none", check=False, readme=readme) == 0
    text = readme.read_text()
    assert text.startswith("above\n") and text.endswith("below\n") and tables.NOT_MEASURED in text
    assert tables.write(tmp_path / "none", check=True, readme=readme) == 0
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="expected one pair"):
        tables.write(tmp_path, check=True, readme=readme)
