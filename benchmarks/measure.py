"""`python -m benchmarks [NAME ...]`: measures cases within a time limit; with --resume only those without valid
rows."""

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

BUDGET = 420.0  # seconds for a run without NAME and --full, so that it ends within ten minutes
LAST_CASE = 90.0  # seconds after the budget in which the last case may finish
PATIENCE = 120.0, 600.0  # seconds for one step of one provider, without and with --full


def begin(kind: str | None, command: str, budget: float = 0.1, threads: tuple[int, ...] = ()) -> Session:
    """Starts a session and measures the device's own rates; on a CPU once for each number of threads.

    Args:
        kind: "cpu", "cuda", or None for the GPU if there is one.
        command: the command line, for the rows.
        budget: seconds of samples for one provider in one mode.
        threads: numbers of threads to measure a CPU's rates with.

    Raises:
        ValueError: there is no such device.
    """
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # torch then looks for a GPU without initializing CUDA
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
    """Saves and prints rows as they come.

    Args:
        folder: the folder to save to; None saves nothing.
        earlier: rows of earlier runs.

    Attributes:
        rows: the rows of this run.
        known: all rows, including earlier ones, by their key.
        brief: True prints only rows with a problem.
    """

    brief = False

    def __init__(self, folder: Path | None, earlier: Iterable[Row] = ()) -> None:
        self.folder = folder
        self.known = {rows.key(row): row for row in earlier}
        self.rows: list[Row] = []
        self._title = ""
        self._printed: set[str] = set()  # providers of the current case; one without times is printed for one mode only

    def save(self, case: Case, row: Row) -> None:
        if self.folder is not None:
            rows.save([row], self.folder / rows.FILE)
        self.rows.append(row)
        self.known[rows.key(row)] = row
        if self.brief and not row["problem"]:
            return
        title = case.title + ("" if row["threads"] is None else f", {row['threads']} threads")
        if title != self._title:
            self._title, self._printed = title, set()
            print(f"\n{title}\n{report.COLUMNS}")
        if row["ms_p50"] or row["provider"] not in self._printed:
            print(report.line(row), flush=True)
        self._printed.add(row["provider"])


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
            # torch.compile takes long: with one thread of a CPU it is measured only with --full.
            variant = case.without("compiled") if size == "cpu" and count != most else case
            every.append(replace(variant, threads=count))
    valid = (rows.still_valid(case, name, session.facts, results.known) for case in every for name in case.providers)
    kept = {rows.key(row): row for valid_rows in valid for row in valid_rows}
    todo = [Piece([case], session, results.save) for case in rows.left(every, session.facts, results.known)]
    budget = BUDGET if arguments.budget is None and not (arguments.names or arguments.full) else arguments.budget
    until = time.monotonic() + (float("inf") if budget is None else budget)
    late = processes.run(todo, start_until=until, end=until + LAST_CASE)
    if arguments.compare:
        changes = report.changes(old, results.rows)
        print("\n  ".join([f"\n{len(changes)} changes beyond noise", *changes]))
    for row in results.rows:  # baselines with valid rows are measured again beside the providers without
        kept.pop(rows.key(row), None)
    report.footer(results.rows, len(kept), [case for piece in late for case in piece.cases], folder)
    return 1 if any(runner.went_wrong(row) for row in (*results.rows, *kept.values())) else 0


def _dry_run(names: Sequence[str], kind: str | None, command: str) -> int:
    """Compares at toy size, in this process, so that a debugger or a sanitizer can be used."""
    session = Session(machine.facts(kind), command, timing=False)
    report.header(session)
    results = Results(None)
    for case in cases.in_turns(names, "toy", session.device):
        for row in runner.measure(case, session):
            results.save(case, row)
    report.footer(results.rows, 0, [], None)
    return 1 if any(runner.went_wrong(row) for row in results.rows) else 0
