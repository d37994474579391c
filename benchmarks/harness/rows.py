"""Saved rows: one JSON object a line, complete in itself. Fresh, stale or missing."""

import datetime
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness import machine
from benchmarks.harness.case import Case, name_of

RESULTS = machine.ROOT / "benchmarks" / "results"
FILE = "rows.jsonl"
Row = dict[str, Any]
KEY = ("gpu", "cpu", "op", "shape", "dtype", "provider", "mode", "threads")
TESTS = "tests"  # the operation of rows that say how the tests went
VERSIONS = ("torch", "triton", "cuda", "driver")


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def key(row: Row) -> tuple:
    """What a row measures, and on what. The CPU counts where no GPU was used."""
    return tuple(row.get(name) if name != "cpu" or row.get("gpu") is None else None for name in KEY)


def read(file: Path) -> list[Row]:
    """All rows of a file. A last line without its end, which a killed run may leave, is no row.

    Raises:
        ValueError: a line is no row; names file and line.
    """
    rows = []
    for number, line in enumerate(file.read_text().split("\n")[:-1], 1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file}:{number}: not a row: a JSON object a line") from error
    return rows


def load(path: Path) -> list[Row]:
    """Rows of a file, or of all .jsonl files below a folder; of several of one key the last.

    Raises:
        ValueError: the path is not there, or a line is no row; names file and line.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    latest = {}
    for file in sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]:
        for number, row in enumerate(read(file), 1):
            if not {"op", "mode", "provider"} <= row.keys():
                raise ValueError(f"{file}:{number}: not a row of benchmark results")
            latest[key(row)] = row
    return list(latest.values())


def save(rows: Iterable[Row], file: Path) -> None:
    """Appends the rows, each in one piece: a killed run leaves whole rows."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists() and not (text := file.read_bytes()).endswith(b"\n"):
        file.write_bytes(text[: text.rfind(b"\n") + 1])
    with file.open("ab", buffering=0) as target:
        for row in rows:
            target.write(json.dumps(row, allow_nan=False).encode() + b"\n")


def adopt(rows: Iterable[Row], folder: Path) -> None:
    """Saves rows that a copy of this checkout brought back, each in the folder of its machine. A copy without history
    does not know its commit: where its source is today's, the commit is."""
    source, commit = machine.source_sha256(), machine.commit()
    for row in rows:
        if row.get("commit") == "unknown" and row.get("source_sha256") == source:
            row = {**row, "commit": commit}
        save([row], folder / machine.folder_name(row) / FILE)


def still_true(case: Case, provider: str, facts: Row, saved: Mapping[tuple, Row], *, timed: bool = True) -> list[Row]:
    """The saved rows (by key) of a provider, failures among them; [] where one is missing or outdated: the versions
    must be today's, and so must the kernels that the row ran, or the whole source where it ran none. A rival in plain
    PyTorch does not depend on the source. With `timed`, a row that only says that a result is right does not do."""
    rows = []
    for mode in case.timed_modes(provider):
        wanted = {"op": case.op, "shape": case.shape, "mode": mode, "dtype": name_of(case.dtype)}
        row = saved.get(key({**facts, **wanted, "provider": provider, "threads": case.threads}))
        if row is None or any(row.get(name) != facts[name] for name in VERSIONS):
            return []
        rival = facts["gpu"] and not case.exact and not provider.startswith("fastgen")
        same = state(row) == "fresh" if row["kernels"] else row.get("source_sha256") == facts["source_sha256"]
        if not (rival or same) or (timed and case.timed and not row["ms_p50"] and not row["problem"]):
            return []
        rows.append(row)
    return rows


def left(candidates: Iterable[Case], facts: Row, saved: Mapping[tuple, Row], *, timed: bool = True) -> list[Case]:
    """The cases with those providers whose rows are not `still_true`, and beside them the baseline, if it lives."""
    cases = []
    for case in candidates:
        true_rows = {name: still_true(case, name, facts, saved, timed=timed) for name in case.providers}
        lacking = {name for name, rows in true_rows.items() if not rows}
        dead = {name for name, rows in true_rows.items() if rows and rows[0]["verdict"] == "dead"}
        if lacking:
            cases.append(case.only(lacking | ({case.baseline} - dead)))
    return cases


def state(row: Row) -> str:
    """ "fresh" where the kernels' source is what it was when the row was measured, else "stale"."""
    current = machine.kernel_sha256(row.get("kernels") or [])
    return "fresh" if current is not None and current == row.get("kernel_sha256") else "stale"
