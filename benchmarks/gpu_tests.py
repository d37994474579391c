"""`python -m benchmarks gpu-tests`: the tests that a GPU is needed for, in several processes; how they went is a row.

Each process is a pytest that runs its share and tells of each test before and after it runs. Where one dies or hangs,
the test it was at has failed, and another goes on behind it.
"""

import os
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness import launches, machine, processes, rows
from benchmarks.harness.case import Case
from benchmarks.harness.compare import Checked
from benchmarks.harness.processes import Task, Tell
from benchmarks.harness.runner import empty_row
from benchmarks.harness.session import Session

PROCESSES = 16  # each compiles its kernels, and holds some gigabytes of the GPU
PATIENCE = 180.0  # seconds that one test may take, or the collection of all
ALONE = "offsets_beyond"  # tests that take tens of gigabytes: one after the other, in the first share
ENDED = (0, 1, 5)  # pytest's exit status: all passed, some failed, none there
OUTCOMES = ("passed", "failed", "skipped", "not_run")


class Share(Task):
    """Every `count`-th test from number `index` on, in a pytest whose plugin this is.

    Attributes:
        outcomes: (word, text) of each test that has ended.
        collected: how many tests there are; None before the first process has found them.
        at: the test that runs, or ran last; None before the first of a process.
    """

    patience = PATIENCE

    def __init__(self, index: int, count: int, arguments: list[str]) -> None:
        self.index, self.count = index, count
        self.arguments = [*arguments, "-p", "no:cacheprovider", "-p", "no:xdist"]
        self.outcomes: dict[str, tuple[str, str]] = {}
        self.collected: int | None = None
        self.at: str | None = None

    def work(self, tell: Tell) -> None:
        torch.set_num_threads(1)
        self.tell = tell
        status = int(pytest.main(self.arguments, plugins=[self]))
        if status not in ENDED:
            raise RuntimeError(f"pytest ended with status {status}")

    @pytest.hookimpl(trylast=True)  # what `-m` leaves, in the order of conftest.py
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        alone = [item for item in items if ALONE in item.name] if self.index == 0 else []
        others = [item for item in items if ALONE not in item.name]
        share = [*others[self.index :: self.count], *alone]
        self.tell("collected", len(share))
        items[:] = [item for item in share if item.nodeid not in self.outcomes]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.tell("started", nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or not report.passed:
            crash = getattr(report.longrepr, "reprcrash", None)
            text = getattr(crash, "message", report.longreprtext)[:500] if report.failed else ""
            self.tell("outcome", (report.nodeid, report.outcome, text))

    def hear(self, kind: str, news: Any) -> None:
        if kind == "collected":
            self.collected = news
        elif kind == "started":
            self.at = news
        else:
            name, *outcome = news
            self.outcomes[name] = tuple(outcome)

    def died(self, how: str) -> "Share | None":
        """The test that it was at has failed, and it goes on behind it."""
        if self.at is None:
            return None  # not even one test: it would be the same once more
        self.outcomes.setdefault(self.at, ("failed", how))
        self.at = None
        return self


def run(folder: Path, paths: Sequence[str], budget: float | None, command: str, *, full: bool) -> int:
    """The tests in `paths`: those that take long only with `full`. Exit status 1: some failed.

    Raises:
        ValueError: there is no GPU.
    """
    session = Session(processes.in_a_process(lambda: machine.facts("cuda")), command)
    folder = folder if os.environ.get("OUT") else folder / machine.folder_name(session.facts)
    folder.mkdir(parents=True, exist_ok=True)
    chosen = "gpu" if full else "gpu and not slow"
    start, count = time.monotonic(), min(PROCESSES, os.cpu_count() or 1)
    shares = [Share(i, count, ["-m", chosen, *(paths or ["tests"])]) for i in range(count)]
    log = folder / "tests.txt"
    with log.open("wb", buffering=0) as file:
        end = float("inf") if budget is None else start + budget
        processes.run(shares, lanes=count, end=end, log=file.fileno())
    seconds = time.monotonic() - start
    tally = counts(shares)
    broken = sum(share.collected is None for share in shares)
    problem = f"{broken} processes found no test" if broken else f"{tally['failed']} failed" * bool(tally["failed"])
    case = Case(rows.TESTS, " ".join([chosen, *paths]), torch.float32, lambda device: {}, {"pytest": tuple}, None)
    row = empty_row(case, session, "pytest", "full", Checked(problem, launched=list(launches.catalogue())))
    # Of the kernels it keeps the source, and claims of no single one that it was launched.
    row |= {"dtype": "all", "launched": [], "died_in": None, "verdict": None, **tally, "seconds": seconds}
    rows.save([row | {"sanitizer": shutil.which("compute-sanitizer") is not None}], folder / rows.FILE)
    print("\n".join(tally["failures"]) if not broken else log.read_text()[-3000:])
    print(", ".join(f"{tally[word]} {word}" for word in OUTCOMES), f"{seconds:.0f} s")
    return 1 if problem else 0


def counts(shares: Sequence[Share]) -> dict[str, Any]:
    """passed, failed, skipped, not_run; and the first failures, each with its last line."""
    outcomes = {name: outcome for share in shares for name, outcome in share.outcomes.items()}
    words = Counter(word for word, _ in outcomes.values())
    failures = [f"{name}: {text}" for name, (word, text) in outcomes.items() if word == "failed"]
    collected = sum(share.collected or 0 for share in shares)
    numbers = {word: words[word] for word in OUTCOMES[:3]}
    return {**numbers, "not_run": collected - len(outcomes), "failures": failures[:50]}
