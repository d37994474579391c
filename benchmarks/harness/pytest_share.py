"""A plugin of pytest: runs one of several shares of the tests, and writes down each before and after it runs.

    pytest -p benchmarks.harness.pytest_share --share 3/16 --outcomes FILE ...

What FILE already has an outcome of is not run again, so that a new process goes on where one has died.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

ALONE = "offsets_beyond"  # tests that take tens of gigabytes: one after the other, in the first share


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--share", default="0/1", help="I/N: every N-th test from the I-th on")
    parser.addoption("--outcomes", type=Path, required=True, help="a line of JSON for each test, before and after it")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Share(config))


class Share:
    def __init__(self, config: pytest.Config) -> None:
        self.index, self.count = map(int, config.getoption("share").split("/"))
        self.file: Path = config.getoption("outcomes")
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.done = {line["test"] for line in map(json.loads, lines) if line.get("outcome", "started") != "started"}

    def write(self, **line: Any) -> None:
        with self.file.open("ab", buffering=0) as file:
            file.write(json.dumps(line).encode() + b"\n")

    @pytest.hookimpl(trylast=True)  # what `-m` leaves, in the order of conftest.py
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        alone = [item for item in items if ALONE in item.name] if self.index == 0 else []
        others = [item for item in items if ALONE not in item.name]
        own = [*others[self.index :: self.count], *alone]
        self.write(share=self.index, collected=len(own))
        items[:] = [item for item in own if item.nodeid not in self.done]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.write(test=nodeid, outcome="started", process=os.getpid())

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            crash = getattr(report.longrepr, "reprcrash", None)
            text = getattr(crash, "message", report.longreprtext)[:500] if report.failed else ""
            self.write(test=report.nodeid, outcome=report.outcome, text=text, seconds=report.duration)
