"""`Piece`: some cases that are measured in one process. A provider that crashes loses only its own rows."""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch._inductor.config

from benchmarks.harness.case import Case
from benchmarks.harness.compare import Checked
from benchmarks.harness.processes import Task, Tell
from benchmarks.harness.rows import Row
from benchmarks.harness.runner import empty_row, measure
from benchmarks.harness.session import DeviceLost, Session

Save = Callable[[Case, Row], Any]


class Piece(Task):
    """Cases that a child process measures one after the other. The parent process saves each row when it arrives.

    Attributes:
        cases: the cases that are not finished.
        provider: the provider that is being compared or timed; None while inputs or truth are computed.
        kernels: names of the kernels that this provider has launched, one for each launch.
        done: (provider, mode) of the rows of the current case that have arrived.
    """

    def __init__(self, cases: list[Case], session: Session, save: Save) -> None:
        self.cases, self.session, self.save, self.patience = cases, session, save, session.patience
        self._begin()

    def _begin(self) -> None:
        self.provider: str | None = None
        self.kernels: list[str] = []
        self.done: set[tuple[str, str]] = set()

    def work(self, tell: Tell) -> None:
        if all(case.blocking for case in self.cases):
            os.environ["CUDA_LAUNCH_BLOCKING"] = "1"
        if not self.session.timing:
            torch._inductor.config.compile_threads = 1  # other pieces compile at the same time
        for case in self.cases:
            try:
                measure(case, replace(self.session, tell=tell))
            except DeviceLost as problem:
                tell("end", str(problem))
                return
            tell("case", None)

    def hear(self, kind: str, news: Any) -> None:
        if kind == "case":
            self.cases = self.cases[1:]
            self._begin()
        elif kind == "doing":
            self.provider, self.kernels = news, []
        elif kind == "kernel":
            self.kernels.append(news)
        elif kind == "row":
            self.done.add((news["provider"], news["mode"]))
            self.save(self.cases[0], news)

    def died(self, how: str) -> "Piece | None":
        """Saves rows for the provider that died, or for all providers if it was none's fault. Returns a piece of what
        remains."""
        if not self.cases:
            return None
        case, *later = self.cases
        checked = Checked(how, launched=self.kernels)
        dead = list(case.providers) if self.provider is None else [self.provider]
        for name in case.providers:
            lacking = [mode for mode in case.timed_modes(name) if (name, mode) not in self.done]
            if name in dead:
                for mode in lacking:
                    self.save(case, empty_row(case, self.session, name, mode, checked))
            elif not lacking:
                dead.append(name)  # it has all its rows: rows of a mode arrive for all providers together
        if alive := set(case.providers) - set(dead):
            later = [case.only(alive), *later]
        return Piece(later, self.session, self.save) if later else None
