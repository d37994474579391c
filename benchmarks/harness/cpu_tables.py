"""What rows say of sampling on a CPU: ratios of times measured side by side, a batch of samples over one forward pass.

The README has a line for each model; `table.md` beside the rows has every backend and number of threads.
"""

import math
import re
from collections.abc import Iterator

from benchmarks.harness import machine
from benchmarks.harness.rows import Row

TABLE = "table.md"  # of a machine, beside its rows


def cpus(saved: list[Row]) -> list[str]:
    return sorted({row["cpu"] for row in saved if _counts(row)})


def folder_of(cpu: str) -> str:
    return machine.folder_name({"gpu": None, "cpu": cpu})


def table(cpu: str, saved: list[Row]) -> str:
    """Every model, number of threads and backend."""
    groups = dict(_groups(cpu, saved))
    names = dict.fromkeys(name for group in groups.values() for name, row in group.items() if name != row["baseline"])
    lines = [f"# Sampling on a CPU ({cpu})", ""]
    lines += ["Time of a whole batch of images, in units of one forward pass of the same batch in the same run.", ""]
    lines += _row("model", "threads", *names, "measured") + ["|" + "---|" * (len(names) + 3)]
    for (model, threads), group in groups.items():
        times = [f"{group[name]['times_baseline']:.3g}" if name in group else "-" for name in names]
        lines += _row(model, threads, *times, _date(group))
    return "\n".join([*lines, ""])


def summary(cpu: str, saved: list[Row]) -> list[str]:
    """A line for each model, with the most threads that it was sampled with: the naive loop beside fastgen."""
    link = f"[{folder_of(cpu)}](benchmarks/results/{folder_of(cpu)}/{TABLE})"
    lines = [
        f"Sampling a batch on a CPU ({cpu}), in units of one forward pass of the batch in the same run. The loop's"
    ]
    lines += [
        rf"time is that of one draw for all; \* where none was timed, a pass for each draw. All backends: {link}.",
        "",
    ]
    lines += _row("model", "threads", "loop", "fastgen", "times as fast", "measured") + ["|" + "---|" * 6]
    most = {model: (threads, group) for (model, threads), group in _groups(cpu, saved) if "fastgen" in group}
    for model, (threads, group) in most.items():
        draws = math.prod(int(side) for side in re.findall(r"\d+(?=x)|(?<=x)\d+", model))
        naive = group["naive"]["times_baseline"] if "naive" in group else draws
        mark, fast = "" if "naive" in group else r"\*", group["fastgen"]["times_baseline"]
        lines += _row(model, threads, f"{naive:.0f}{mark}", f"{fast:.3g}", f"{naive / fast:.0f}", _date(group))
    return [*lines, ""]


def _counts(row: Row) -> bool:
    return row["op"] == "sampling" and not row["gpu"] and bool(row["times_baseline"])


def _groups(cpu: str, saved: list[Row]) -> Iterator[tuple[tuple[str, int], dict[str, Row]]]:
    """The rows of each model and number of threads, by provider."""
    own = [row for row in saved if _counts(row) and row["cpu"] == cpu]
    for key in sorted({(row["shape"], row["threads"]) for row in own}):
        yield key, {row["provider"]: row for row in own if (row["shape"], row["threads"]) == key}


def _date(group: dict[str, Row]) -> str:
    return max(row["time"] for row in group.values())[:10]


def _row(*cells: object) -> list[str]:
    return ["| " + " | ".join(map(str, cells)) + " |"]
