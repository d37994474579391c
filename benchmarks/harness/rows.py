"""Reads, saves and selects rows: results as JSON objects, one per line, each complete in itself."""

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
TESTS = "tests"  # the `op` of rows with the outcome of the tests
VERSIONS = ("torch", "triton", "cuda", "driver")


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def key(row: Row) -> tuple:
    """Identifies what a row measures, and on which device: the GPU or, if none was used, the CPU."""
    return tuple(row.get(name) if name != "cpu" or row.get("gpu") is None else None for name in KEY)


def read(file: Path) -> list[Row]:
    """All rows of a file. A last line without a line break, which a killed run may leave, is ignored.

    Raises:
        ValueError: a line is not a JSON object; names file and line.
    """
    rows = []
    for number, line in enumerate(file.read_text().split("\n")[:-1], 1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file}:{number}: not a row: a JSON object a line") from error
    return rows


def load(path: Path) -> list[Row]:
    """The rows of a file, or of all .jsonl files below a folder. If several rows have the same key, the last counts.

    Raises:
        ValueError: the path does not exist, or a line is not a row; names file and line.
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
    """Appends the rows, each with a single write, so that a killed run leaves whole rows."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists() and not (text := file.read_bytes()).endswith(b"\n"):
        file.write_bytes(text[: text.rfind(b"\n") + 1])
    with file.open("ab", buffering=0) as target:
        for row in rows:
            target.write(json.dumps(row, allow_nan=False).encode() + b"\n")


def adopt(rows: Iterable[Row], folder: Path) -> None:
    """Saves rows that a copy of this checkout has measured elsewhere, each in the folder of its machine. Rows of a copy
    without history get the commit of this checkout if their source is the same."""
    source, commit = machine.source_sha256(), machine.commit()
    for row in rows:
        if row.get("commit") == "unknown" and row.get("source_sha256") == source:
            row = {**row, "commit": commit}
        save([row], folder / machine.folder_name(row) / FILE)


def still_valid(case: Case, provider: str, facts: Row, saved: Mapping[tuple, Row], *, timed: bool = True) -> list[Row]:
    """The saved rows of a provider, one for each mode, if all of them are valid; otherwise [].

    A row is valid if it has today's versions, and was measured with today's source of its kernels; if it launched none,
    with today's source as a whole. On a GPU, rivals in plain PyTorch do not depend on the source. Failures are valid
    rows too. With `timed`, a row without a time is not valid, unless it is a failure.

    Args:
        facts: `machine.facts` of today.
        saved: rows by their key.
    """
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
    """The cases that are still to be measured, with those providers whose rows are not `still_valid`, and with the
    baseline, to compare them with, unless it has died before."""
    cases = []
    for case in candidates:
        valid_rows = {name: still_valid(case, name, facts, saved, timed=timed) for name in case.providers}
        lacking = {name for name, rows in valid_rows.items() if not rows}
        dead = {name for name, rows in valid_rows.items() if rows and rows[0]["verdict"] == "dead"}
        if lacking:
            cases.append(case.only(lacking | ({case.baseline} - dead)))
    return cases


def state(row: Row) -> str:
    """ "fresh" if the source of the row's kernels has not changed since it was measured, otherwise "stale"."""
    current = machine.kernel_sha256(row.get("kernels") or [])
    return "fresh" if current is not None and current == row.get("kernel_sha256") else "stale"
