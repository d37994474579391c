"""How the tests went on a GPU, as a row: `pytest -m gpu` saves one at its end, `gpu-tests` runs it in parallel."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, rows
from benchmarks.rows import Row

SANITIZERS = ("memcheck", "racecheck")
NO_TIME = "no time was left"  # reason of tests skipped by --seconds
PROCESSES = 6  # each compiles its kernels, and holds some gigabytes of the GPU


def counts(stats: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """passed, failed (errors too), skipped, not_run of a test run's reports, and the names of the first that failed."""
    failed = [*stats.get("failed", ()), *stats.get("error", ())]
    skipped = stats.get("skipped", ())
    late = [report for report in skipped if NO_TIME in str(report.longrepr)]
    return {
        "passed": len(stats.get("passed", ())),
        "failed": len(failed),
        "skipped": len(skipped) - len(late),
        "not_run": len(late),
        "failures": [report.nodeid for report in failed[:50]],
    }


def row(what: str, problem: str, found: dict[str, Any], device: torch.device, command: str) -> Row:
    kernels = sorted(file.stem for file in machine.KERNELS.glob("*.py") if "\nCATALOGUE" in file.read_text())
    kernels = machine.sources(tuple(kernels))
    return {
        "op": rows.TESTS,
        "kernels": kernels,
        "shape": what,
        "dtype": "all",
        "provider": "pytest",
        "mode": "full",
        **dict.fromkeys(("ms_p20", "ms_p50", "ms_p80", "peak_mb", "error", "threads", "batch")),
        "problem": problem,
        **found,
        "sanitizer": shutil.which("compute-sanitizer") is not None,
        **machine.environment(device),
        "kernel_sha256": machine.kernel_sha256(kernels),
        "source_sha256": machine.source_sha256(),
        "power": machine.power_state(device),
        "time": rows.now(),
        "command": command,
    }


def save(stats: Mapping[str, Sequence[Any]], status: int, config: Any) -> None:
    """Saves what a run of `pytest -m gpu` found, called at its end with its reports and its exit status."""
    device = torch.device("cuda")
    found = counts(stats)
    paths = [argument for argument in config.args if Path(argument).resolve() != machine.ROOT / "tests"]
    problem = "" if status == 0 else f"pytest: exit status {status}, {found['failed']} failed"
    command = " ".join(["python -m pytest", *config.invocation_params.args])
    folder = Path(config.getoption("--rows") or rows.RESULTS) / machine.folder_name(device)
    rows.save([row(" ".join(paths) or "all", problem, found, device, command)], folder)


def run(folder: Path, paths: Sequence[str], budget: float | None) -> int:
    """`pytest -m gpu`, in several processes where pytest-xdist is installed. Returns its exit status.

    Raises:
        ValueError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise ValueError("gpu-tests: torch finds no CUDA GPU; `make test` runs the kernels in the interpreter")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", *(paths or ["tests"]), "-p", "no:cacheprovider"]
    command += ["--rows", str(folder.resolve())]
    if budget is not None:
        command += ["--seconds", str(budget)]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(PROCESSES, os.cpu_count() or 1)), "--dist", "loadgroup"]
    return subprocess.run(command, cwd=machine.ROOT).returncode


def sanitize(tool: str) -> list[str]:
    """The command that runs every kernel, at toy size, under a tool of compute-sanitizer. Sampling has no kernel of its
    own, and its CUDA graphs need the cache of memory that is off there."""
    from benchmarks.__main__ import NAMES

    checked = ["compute-sanitizer", f"--tool={tool}", "--error-exitcode=9", "--report-api-errors=no"]
    toy = [sys.executable, "-m", "benchmarks", "--dry-run", "--device", "cuda"]
    return [*checked, *toy, *(name for name in NAMES if name != "sampling")]
