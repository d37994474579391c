"""`python -m benchmarks gpu-tests`: the tests that a GPU is needed for, in several processes; how they went is a row.

Each process is a pytest that runs its share (harness/pytest_share.py) and writes down each test before and after it
runs. Where one dies or hangs, the test it was at has failed, and another goes on behind it.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import launches, machine, pieces, rows
from benchmarks.harness.case import Case
from benchmarks.harness.compare import Checked
from benchmarks.harness.runner import empty_row
from benchmarks.harness.session import Session

PROCESSES = 16  # each compiles its kernels, and holds some gigabytes of the GPU
PATIENCE = 180.0  # seconds that one test may take
ENDED = (0, 1, 5)  # pytest's exit status: all passed, some failed, none there


class Share:
    """One of the processes, and what it has written."""

    def __init__(self, index: int, count: int, arguments: list[str], folder: Path) -> None:
        self.file = folder / f"{index}.jsonl"
        self.log = folder / f"{index}.log"
        self.command = [sys.executable, "-m", "pytest", *arguments, "-p", "no:cacheprovider", "-p", "no:xdist"]
        self.command += ["-p", "benchmarks.harness.pytest_share", f"--share={index}/{count}", f"--outcomes={self.file}"]
        self.start()

    def start(self) -> None:
        self.since, self._seen, self._before = time.monotonic(), 0, len(self.outcomes())
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self.command, cwd=machine.ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
            )

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []

    def outcomes(self) -> dict[str, dict[str, Any]]:
        """By test; "started" is the outcome of one that has not ended."""
        return {line["test"]: line for line in self.lines() if "test" in line}

    def goes_on(self) -> bool:
        """Whether to wait for it once more. Where it died or hangs, the test it was at fails, and it starts anew."""
        status = self.process.poll()
        if status in ENDED:
            return False
        if (seen := len(self.lines())) > self._seen:
            self._seen, self.since = seen, time.monotonic()
        hangs = time.monotonic() - self.since > PATIENCE
        if status is None and not hangs:
            return True
        self.stop()
        at = [name for name, one in self.outcomes().items() if one["outcome"] == "started"]
        if not at and len(self.outcomes()) == self._before:
            return False  # not even one test: it would be the same once more
        why = f"no result within {PATIENCE:.0f} s" if hangs else f"the process ended with status {status}"
        with self.file.open("a") as file:
            file.writelines(json.dumps({"test": name, "outcome": "failed", "text": why}) + "\n" for name in at)
        self.start()
        return True

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def run(folder: Path, paths: Sequence[str], budget: float | None, command: str, *, full: bool) -> int:
    """The tests in `paths`: those that take long only with `full`. Exit status 1: some failed.

    Raises:
        ValueError: there is no GPU.
    """
    session = Session(pieces.in_a_process(lambda: machine.facts("cuda")), command)
    chosen = "gpu" if full else "gpu and not slow"
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        count = min(PROCESSES, os.cpu_count() or 1)
        shares = [Share(i, count, ["-m", chosen, *(paths or ["tests"])], Path(place)) for i in range(count)]
        going = shares
        while going := [share for share in going if share.goes_on()]:
            if budget is not None and time.monotonic() - start > budget:
                for share in going:
                    share.stop()
                break
            time.sleep(0.2)
        seconds = time.monotonic() - start
        found = counts([line for share in shares for line in share.lines()])
        broken = [share for share in shares if not share.lines()]
        logs = "\n".join(share.log.read_text() for share in broken or shares)
    folder = folder if os.environ.get("OUT") else folder / machine.folder_name(session.facts)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tests.txt").write_text(logs)
    problem = f"{len(broken)} processes ran no test" if broken else f"{found['failed']} failed" * bool(found["failed"])
    case = Case(rows.TESTS, " ".join([chosen, *paths]), torch.float32, lambda device: {}, {"pytest": tuple}, None)
    row = empty_row(case, session, "pytest", "full", Checked(problem, launched=list(launches.catalogue())))
    # Of the kernels it keeps the source, and claims of no single one that it was launched.
    row |= {"dtype": "all", "launched": [], "died_in": None, "verdict": None, **found, "seconds": seconds}
    rows.save([row | {"sanitizer": shutil.which("compute-sanitizer") is not None}], folder)
    print("\n".join(found["failures"]) if not broken else logs[-3000:])
    print(", ".join(f"{found[word]} {word}" for word in ("passed", "failed", "skipped", "not_run")), f"{seconds:.0f} s")
    return 1 if problem else 0


def counts(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """passed, failed, skipped, not_run of what the processes wrote; and the first failures, each with its last line."""
    outcomes = {line["test"]: line for line in lines if "test" in line}
    words = [one["outcome"] for one in outcomes.values()]
    collected = sum({line["share"]: line["collected"] for line in lines if "collected" in line}.values())
    found = {word: words.count(word) for word in ("passed", "failed", "skipped")}
    failures = [f"{name}: {one['text']}" for name, one in outcomes.items() if one["outcome"] == "failed"]
    return {**found, "not_run": collected - sum(found.values()), "failures": failures[:50]}
