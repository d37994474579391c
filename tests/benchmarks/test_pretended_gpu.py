"""What the suite does on a GPU, on one that is only pretended: no branch of it runs there for the first time."""

import pytest
import torch
from pretended_gpu import NAME, pretend

from benchmarks import agenda, machine, rows
from benchmarks.__main__ import NAMES, main

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(autouse=True)
def settings():
    precision, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    for cached in (machine.environment, machine.commit):
        cached.cache_clear()
    yield
    machine.environment.cache_clear()
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = convolutions


@pytest.fixture
def no_kernels(monkeypatch):
    """Leaves out what launches kernels on any device: they run in the interpreter, as in a dry run, but slow."""
    load = agenda.load_cases

    def loaded(*arguments):
        for case in load(*arguments):
            kernels = (name for name in case.providers if name.startswith("fastgen, "))
            yield case.without(*(name for name in kernels if not name.endswith(("CUDA graph", "compiled"))))

    monkeypatch.setattr(agenda, "load_cases", lambda *arguments: list(loaded(*arguments)))


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_runs_and_saves_its_rows(name, monkeypatch, tmp_path, capsys):
    with pretend(monkeypatch, [name]):
        assert main(["--device", "cuda", "--full", "--results", str(tmp_path), name]) == 0, capsys.readouterr().out
        saved = rows.load(tmp_path / "Pretended-GPU")
        assert not [row["problem"] for row in saved if row["problem"]]
        for row in saved:
            assert row["gpu"] == NAME and row["threads"] is None and row["ms_p50"] > 0 and row["tf32"]
            assert {"warm_ms_p50", "wall_ms_p50"} <= row.keys() and row["power"]
            assert ("graph_ms_p50" in row) is not ("reduce-overhead" in row["provider"] or "CUDA" in row["provider"])
            assert row["landmark"] or row["error"] is not None or "compiled" in row["provider"]
        written = {(row["op"], row["shape"], row["dtype"], row["provider"], row["mode"]): row["time"] for row in saved}
        assert len(written) == len(saved)
        assert main(["--device", "cuda", "--full", "--results", str(tmp_path), "--resume", name]) == 0
        assert f"{len(saved)} rows of an earlier run are still true" in capsys.readouterr().out


def test_where_no_time_is_left_the_rest_is_named_and_resumed(monkeypatch, tmp_path, capsys):
    with pretend(monkeypatch, ["elbo"]):
        run = ["--device", "cuda", "--results", str(tmp_path), "elbo"]
        assert main([*run, "--budget", "0"]) == 0
        assert "no time was left for 2 cases (2 of elbo)" in capsys.readouterr().out and not list(tmp_path.iterdir())
        monkeypatch.setattr(machine, "lost", lambda device: True)
        monkeypatch.setattr("os.execv", lambda program, command: commands.append(command) or 0)
        commands = []
        main([*run, "--budget", "500"])
        ((_, _, module, name, *options),) = commands
        assert (module, name) == ("benchmarks", "elbo") and options[:3] == ["--resume", "--device", "cuda"]
        assert options[3:5] == ["--results", str(tmp_path)] and 0 < float(options[-1]) <= 500
        saved = rows.load(tmp_path)
        monkeypatch.setattr(machine, "lost", lambda device: False)
        capsys.readouterr()
        assert main([*run, "--resume"]) == 0
        assert f"{len(saved)} rows of an earlier run" in capsys.readouterr().out
        assert len(rows.load(tmp_path)) == 2 * len(saved)


def test_rows_of_another_kernel_or_version_are_measured_again(monkeypatch, tmp_path):
    device = torch.device("cuda")
    with pretend(monkeypatch, ["elbo"]):
        main(["--device", "cuda", "--results", str(tmp_path), "elbo"])
        item = next(agenda.agenda(["elbo"], "gpu", device))
        saved = {rows.key(row): row for row in rows.load(tmp_path)}
        assert agenda.already_measured(item, device, saved)
        for change in ({"torch": "1.0"}, {"driver": "1.0"}):
            assert agenda.already_measured(item, device, {k: row | change for k, row in saved.items()}) is None
        stale = {k: row | ({"kernel_sha256": "old"} if row["kernels"] else {}) for k, row in saved.items()}
        assert agenda.already_measured(item, device, stale) is None
        assert agenda.already_measured(item, device, dict(list(saved.items())[1:])) is None
