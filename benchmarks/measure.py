"""`python -m benchmarks [NAME ...]`: cases in turns, within a time, and only what is still to be measured."""

import argparse
import functools
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import cases
from benchmarks.harness import machine, processes, report, rows, runner, timing
from benchmarks.harness.case import Case
from benchmarks.harness.pieces import Piece
from benchmarks.harness.rows import Row
from benchmarks.harness.session import Session

BUDGET = 420.0  # seconds of a run without NAME and --full, so that it ends within ten minutes
LAST_CASE = 90.0  # seconds after them in which the last case may still compile
PATIENCE = 120.0, 600.0  # seconds of one step of one provider, without and with --full


def begin(kind: str | None, command: str, budget: float = 0.1, threads: tuple[int, ...] = ()) -> Session:
    """A session with the device's own rates; on a CPU for each of these numbers of threads.

    Raises:
        ValueError: there is no such device.
    """
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking for a GPU then initializes nothing
    session = Session(processes.in_a_process(lambda: machine.facts(kind)), command, budget)
    report.header(session)

    def rates(count: int | None) -> dict[str, float]:
        torch.set_num_threads(count or torch.get_num_threads())
        machine.allow_tf32()
        return timing.rates(session.device)

    for count in (None,) if session.facts["gpu"] else threads:
        try:
            session.rates[count] = processes.in_a_process(functools.partial(rates, count))
        except ValueError as problem:
            print(f"the device's own rates were not measured: {problem}")
    report.rates(session)
    return session


class Results:
    """What has been measured: saved and printed as it comes, only what has a problem while `brief`. `known` are rows by
    key, the `earlier` ones as well."""

    brief = False

    def __init__(self, folder: Path | None, earlier: Iterable[Row] = ()) -> None:
        self.folder = folder
        self.known = {rows.key(row): row for row in earlier}
        self.rows: list[Row] = []
        self._title = ""
        self._said: set[str] = set()  # providers of the case; what has no times is said once for all modes

    def save(self, case: Case, row: Row) -> None:
        if self.folder is not None:
            rows.save([row], self.folder / rows.FILE)
        self.rows.append(row)
        self.known[rows.key(row)] = row
        if self.brief and not row["problem"]:
            return
        title = case.title + ("" if row["threads"] is None else f", {row['threads']} threads")
        if title != self._title:
            self._title, self._said = title, set()
            print(f"\n{title}\n{report.COLUMNS}")
        if row["ms_p50"] or row["provider"] not in self._said:
            print(report.line(row), flush=True)
        self._said.add(row["provider"])


def run(arguments: argparse.Namespace, folder: Path, command: str) -> int:
    if arguments.dry_run:
        return _dry_run(arguments.names or cases.NAMES, arguments.device, command)
    old = rows.load(arguments.compare) if arguments.compare else []
    # A CPU is measured with one thread and with all.
    most = torch.get_num_threads()
    threads = tuple(sorted({1, most}))
    session = begin(arguments.device, command, 0.5 if arguments.full else 0.1, threads)
    session.patience = PATIENCE[arguments.full]
    cuda = session.facts["gpu"] is not None
    folder = folder / machine.folder_name(session.facts)
    results = Results(folder, rows.load(folder) if arguments.resume and folder.exists() else ())
    size = session.device.type.replace("cuda", "gpu") + ("-full" if arguments.full else "")
    every = []
    for case in cases.in_turns(arguments.names or (cases.ON_A_GPU if cuda else cases.ON_A_CPU), size, session.device):
        for count in (None,) if cuda else threads:
            # One thread of a CPU is compiled for only where all is asked for.
            variant = case.without("compiled") if size == "cpu" and count != most else case
            every.append(replace(variant, threads=count))
    true = (rows.still_true(case, name, session.facts, results.known) for case in every for name in case.providers)
    kept = {rows.key(row): row for found_rows in true for row in found_rows}
    todo = [Piece([case], session, results.save) for case in rows.left(every, session.facts, results.known)]
    budget = BUDGET if arguments.budget is None and not (arguments.names or arguments.full) else arguments.budget
    until = time.monotonic() + (float("inf") if budget is None else budget)
    late = processes.run(todo, start_until=until, end=until + LAST_CASE)
    if arguments.compare:
        changes = report.changes(old, results.rows)
        print("\n  ".join([f"\n{len(changes)} changes beyond noise", *changes]))
    for row in results.rows:  # a baseline is measured again beside what had no rows
        kept.pop(rows.key(row), None)
    report.footer(results.rows, len(kept), [case for piece in late for case in piece.cases], folder)
    return 1 if any(runner.went_wrong(row) for row in (*results.rows, *kept.values())) else 0


def _dry_run(names: Sequence[str], kind: str | None, command: str) -> int:
    """In this process, for it is where a debugger and a sanitizer look."""
    session = Session(machine.facts(kind), command, timing=False)
    report.header(session)
    results = Results(None)
    for case in cases.in_turns(names, "toy", session.device):
        for row in runner.measure(case, session):
            results.save(case, row)
    report.footer(results.rows, 0, [], None)
    return 1 if any(runner.went_wrong(row) for row in results.rows) else 0
