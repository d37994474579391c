"""Saved rows: one JSON object a line, complete in itself. Fresh, stale or missing; and what has changed."""

import datetime
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import machine

RESULTS = Path(__file__).resolve().parent / "results"
Row = dict[str, Any]
KEY = ("gpu", "cpu", "op", "shape", "dtype", "provider", "mode", "threads")
TESTS = "tests"  # the operation of rows that say how the tests went
NOISE = 0.03  # changes below this are not reported, however narrow the quantiles are


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def key(row: Row) -> tuple:
    """What a row measures, and on what. The CPU counts where no GPU was used."""
    return tuple(row.get(name) if name != "cpu" or row.get("gpu") is None else None for name in KEY)


def load(path: Path) -> list[Row]:
    """Rows of a file, or of all .jsonl files below a folder.

    Raises:
        ValueError: the path is not there, or a line is no row; names file and line.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    rows = []
    for file in sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]:
        for number, line in enumerate(file.read_text().splitlines(), 1):
            try:
                row = json.loads(line)
                key(row)
                row["op"], row["mode"], row["provider"]
            except (ValueError, AttributeError, KeyError, TypeError) as error:
                raise ValueError(f"{file}:{number}: not a row of benchmark results") from error
            rows.append(row)
    return rows


def save(rows: Iterable[Row], folder: Path) -> None:
    """Writes each row into `folder`/OP.jsonl; one of the same key is replaced. A file is written whole or not."""
    by_op: dict[str, list[Row]] = {}
    for row in rows:
        by_op.setdefault(row["op"], []).append(row)
    folder.mkdir(parents=True, exist_ok=True)
    for op, new in by_op.items():
        file = folder / f"{op}.jsonl"
        merged = {key(row): row for row in (load(file) if file.exists() else [])}
        merged.update((key(row), row) for row in new)
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp", delete=False) as temporary:
            temporary.writelines(json.dumps(row, allow_nan=False) + "\n" for row in merged.values())
        os.replace(temporary.name, file)


def state(row: Row) -> str:
    """ "fresh" where the kernels' source is what it was when the row was measured, else "stale"."""
    current = machine.kernel_sha256(row.get("kernels") or [])
    return "fresh" if current is not None and current == row.get("kernel_sha256") else "stale"


def _word(about: list[Row]) -> str:
    states = {state(row) for row in about}
    return "stale" if "stale" in states else "fresh" if states else "missing"


def status(rows: list[Row], kernels: dict[str, list[str]], gpus: list[str]) -> list[tuple[str, str, str, int, str]]:
    """(GPU, kernel, "fresh" | "stale" | "missing", rows, the same word of its tests, or "failed") for every kernel of
    `kernels` (module -> names) and GPU. The rows of a kernel are those that timed it."""
    table = []
    for gpu in gpus:
        for module, names in sorted(kernels.items()):
            about = [row for row in rows if row.get("gpu") == gpu and module in (row.get("kernels") or [])]
            tests = [row for row in about if row["op"] == TESTS]
            tested = "failed" if any(row["problem"] for row in tests) else _word(tests)
            for name in names:
                measured = [row for row in about if row.get("ms_p50") and name in row.get("launched", names)]
                table.append((gpu, name, _word(measured), len(measured), tested))
    return table


def changes(old: list[Row], new: list[Row]) -> list[tuple[float, Row, Row]]:
    """(new / old median, old row, new row), slowest first, of what changed by more than noise: the ranges from the
    20th to the 80th percentile are apart, and the medians differ by more than 3 %."""
    before = {key(row): row for row in old if row.get("ms_p50")}
    found = []
    for row in new:
        past = before.get(key(row))
        if past is None or not row.get("ms_p50"):
            continue
        ratio = row["ms_p50"] / past["ms_p50"]
        apart = row["ms_p20"] > past["ms_p80"] or row["ms_p80"] < past["ms_p20"]
        if apart and abs(ratio - 1) > NOISE:
            found.append((ratio, past, row))
    return sorted(found, key=lambda change: -change[0])


def newly_failing(old: list[Row], new: list[Row]) -> list[Row]:
    """What had a time in the old rows and has a problem now."""
    before = {key(row) for row in old if row.get("ms_p50")}
    return [row for row in new if key(row) in before and not row.get("ms_p50") and row.get("problem")]
