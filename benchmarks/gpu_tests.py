"""`python -m benchmarks gpu-tests`: runs the tests that need a GPU in several processes, and saves a row of the
outcome.

Each process is a pytest that runs its share of the tests and reports each test before and after it runs. If the process
dies or hangs, the test it was running counts as failed, and a new process continues after it.
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

PROCESSES = 16  # at most; each holds some gigabytes of the GPU's memory
PATIENCE = 180.0  # seconds that one test, or the collection of all tests, may take
ALONE = "offsets_beyond"  # tests with this in their name take tens of gigabytes: they all run in the first share
ENDED = (0, 1, 5)  # exit statuses of pytest: all tests passed, some failed, there were none
OUTCOMES = ("passed", "failed", "skipped", "not_run")


class Share(Task):
    """Every `count`-th test, starting with test `index`. The object is also the plugin of the pytest that runs them.

    Attributes:
        outcomes: (outcome, text) of each test that has ended, by its name.
        collected: number of tests in the share; None until the process has collected them.
        current: the name of the test that runs, or ran last; None before the first test of a process.
    """

    patience = PATIENCE

    def __init__(self, index: int, count: int, arguments: list[str]) -> None:
        self.index, self.count = index, count
        self.arguments = [*arguments, "-p", "no:cacheprovider", "-p", "no:xdist"]
        self.outcomes: dict[str, tuple[str, str]] = {}
        self.collected: int | None = None
        self.current: str | None = None

    def work(self, tell: Tell) -> None:
        torch.set_num_threads(1)
        self.tell = tell
        status = int(pytest.main(self.arguments, plugins=[self]))
        if status not in ENDED:
            raise RuntimeError(f"pytest ended with status {status}")

    @pytest.hookimpl(trylast=True)  # after `-m` has deselected tests and conftest.py has sorted them
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
            self.current = news
        else:
            name, *outcome = news
            self.outcomes[name] = tuple(outcome)

    def died(self, how: str) -> "Share | None":
        """Counts the current test as failed; a new process continues with the tests after it."""
        if self.current is None:
            return None  # the process died before its first test, and would die again
        self.outcomes.setdefault(self.current, ("failed", how))
        self.current = None
        return self


def run(folder: Path, paths: Sequence[str], budget: float | None, command: str, *, full: bool) -> int:
    """Runs the tests in `paths`, slow ones only with `full`. Returns the exit status: 1 if a test failed.

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
    # The row depends on the source of all kernels, but does not claim that any of them was launched.
    row |= {"dtype": "all", "launched": [], "died_in": None, "verdict": None, **tally, "seconds": seconds}
    rows.save([row | {"sanitizer": shutil.which("compute-sanitizer") is not None}], folder / rows.FILE)
    print("\n".join(tally["failures"]) if not broken else log.read_text()[-3000:])
    print(", ".join(f"{tally[word]} {word}" for word in OUTCOMES), f"{seconds:.0f} s")
    return 1 if problem else 0


def counts(shares: Sequence[Share]) -> dict[str, Any]:
    """The numbers of tests that "passed", "failed", were "skipped" and "not_run"; and "failures", the first 50 with
    their messages."""
    outcomes = {name: outcome for share in shares for name, outcome in share.outcomes.items()}
    words = Counter(word for word, _ in outcomes.values())
    failures = [f"{name}: {text}" for name, (word, text) in outcomes.items() if word == "failed"]
    collected = sum(share.collected or 0 for share in shares)
    numbers = {word: words[word] for word in OUTCOMES[:3]}
    return {**numbers, "not_run": collected - len(outcomes), "failures": failures[:50]}
