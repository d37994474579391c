"""The whole test suite on this GPU, then the toy benchmarks under compute-sanitizer where it is installed; as rows."""

import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch

from benchmarks import machine, rows
from benchmarks.rows import Row

SANITIZERS = ("memcheck", "racecheck")


def counts(report: Path) -> dict[str, int]:
    """passed, failed and skipped of a JUnit report; errors count as failed."""
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    total, failures, errors, skipped = (
        sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "failures", "errors", "skipped")
    )
    return {"passed": total - failures - errors - skipped, "failed": failures + errors, "skipped": skipped}


def row(provider: str, problem: str, found: dict[str, int], device: torch.device, command: str) -> Row:
    kernels = sorted(file.stem for file in machine.KERNELS.glob("*.py") if "\nCATALOGUE" in file.read_text())
    return {
        "op": "tests",
        "kernels": kernels,
        "shape": "all",
        "dtype": "all",
        "provider": provider,
        "mode": "full",
        **dict.fromkeys(("ms_p20", "ms_p50", "ms_p80", "peak_mb", "error", "threads", "batch")),
        "problem": problem,
        **found,
        **machine.environment(device),
        "kernel_sha256": machine.kernel_sha256(kernels),
        "time": rows.now(),
        "command": command,
    }


def run(folder: Path, command: str) -> int:
    """Returns 0 where everything passed.

    Raises:
        ValueError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise ValueError("gpu-tests: torch finds no CUDA GPU; `make test` runs the kernels in the interpreter")
    device = torch.device("cuda")
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary) / "report.xml"
        pytest = [sys.executable, "-m", "pytest", str(machine.ROOT / "tests"), "-p", "no:cacheprovider"]
        status = subprocess.run([*pytest, f"--junitxml={report}"], cwd=machine.ROOT).returncode
        found = counts(report) if report.exists() else {}
    problem = "" if status == 0 else f"pytest: exit status {status}"
    results = [row("pytest", problem, found, device, command)]
    for tool in SANITIZERS if shutil.which("compute-sanitizer") else ():
        toy = [sys.executable, "-m", "benchmarks", "--dry-run", "--device", "cuda"]
        checked = ["compute-sanitizer", f"--tool={tool}", "--error-exitcode=9", *toy]
        status = subprocess.run(checked, cwd=machine.ROOT).returncode
        problem = "" if status == 0 else f"exit status {status}"
        results.append(row(f"compute-sanitizer {tool}", problem, {}, device, command))
    rows.save(results, folder / machine.folder_name(device))
    for result in results:
        print(f"{result['provider']}: {result['problem'] or 'passed'} {found if result is results[0] else ''}")
    return 1 if any(result["problem"] for result in results) else 0
