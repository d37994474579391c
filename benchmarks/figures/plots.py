"""Plots of saved rows: bars of speed-ups, time over batch size, bandwidth over size, a roofline."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.figures.style import figure
from benchmarks.harness.machine import folder_name
from benchmarks.harness.rows import Row


def draw(saved: list[Row], folder: Path) -> list[Path]:
    """Draws all plots for which there are rows, into FOLDER/MACHINE/; returns the files.

    Raises:
        ValueError: matplotlib is not installed, or no row has a time.
    """
    timed = [row for row in saved if row["ms_p50"]]
    if not timed:
        raise ValueError("no saved row has a time to draw")
    files = []
    for name in sorted({row["gpu"] or row["cpu"] for row in timed}):
        rows_of_machine = [row for row in timed if (row["gpu"] or row["cpu"]) == name]
        target = folder / folder_name(rows_of_machine[0])
        for op in sorted({row["op"] for row in rows_of_machine}):
            rows_of_op, title = [row for row in rows_of_machine if row["op"] == op], f"{op} on {name}"
            files.append(_bars(title, rows_of_op, target / f"{op}.png"))
            batched, sized = ([row for row in rows_of_op if row.get(field)] for field in ("batch", "bytes"))
            if len({row["batch"] for row in batched}) > 1:
                files.append(_over_batch(title, batched, target / f"{op}-batch.png"))
            if len({row["bytes"] for row in sized}) > 1:
                files.append(_over_size(title, sized, target / f"{op}-size.png"))
        bounded = [row for row in rows_of_machine if row.get("bytes") and row.get("flops") and row.get("copy_gb_s")]
        if bounded:
            files.append(_roofline(f"Roofline of {name}, measured rates", bounded, target / "roofline.png"))
    return files


@contextmanager
def _axes(file: Path, title: str, x: str, y: str, size: tuple[float, float] = (7, 4.5), **scale: Any) -> Iterator[Any]:
    """Yields the axes of a figure that is written to `file` at the end. y is logarithmic; x is logarithmic if `scale`,
    options of the scale, are given."""
    with figure(file, size) as page:
        axes = page.subplots()
        axes.set(title=title, xlabel=x, ylabel=y)
        yield axes
        axes.set_yscale("log")
        if scale:
            axes.set_xscale("log", **scale)
        axes.legend(fontsize=7)


def _threads(row: Row) -> str:
    return "" if row["threads"] is None else f", {row['threads']} threads"


def _bars(title: str, rows: list[Row], file: Path) -> Path:
    """Bars of the speed-ups over the baseline of each case."""
    speed_ups: dict[str, dict[str, float]] = {}  # by provider and case
    for row in rows:
        label = f"{row['shape']}\n{row['dtype']} {row['mode']}{_threads(row)}"
        if row["provider"] != row["baseline"] and row["times_baseline"]:
            speed_ups.setdefault(row["provider"], {})[label] = 1 / row["times_baseline"]
    labels = list(dict.fromkeys(label for by_case in speed_ups.values() for label in by_case))
    width = 0.8 / max(len(speed_ups), 1)
    with _axes(file, title, "", f"speed-up over {rows[0]['baseline']}", (3 + 0.9 * len(labels), 4.5)) as axes:
        for i, (provider, by_case) in enumerate(speed_ups.items()):
            places = [k + width * (i - (len(speed_ups) - 1) / 2) for k in range(len(labels))]
            axes.bar(places, [by_case.get(label, 0) for label in labels], width, label=provider)
        axes.axhline(1, color="black", linewidth=0.8, label=rows[0]["baseline"])
        axes.set_xticks(range(len(labels)), labels, fontsize=7, rotation=45, ha="right")
    return file


def _over_batch(title: str, rows: list[Row], file: Path) -> Path:
    """Time of a call over the number of images, with a line for each provider and size."""
    with _axes(file, title, "images a call", "ms", base=2) as axes:
        batch = r"\bB=\d+ ?|(?<=\s)\d+x|^\d+x"  # the part of a shape that is the batch size
        _lines(axes, rows, lambda row: (re.sub(batch, "", row["shape"], count=1), row["batch"], row["ms_p50"]))
    return file


def _over_size(title: str, rows: list[Row], file: Path) -> Path:
    """Bandwidth over the bytes that must be moved, with a line for each provider; dashed: the measured copy."""
    with _axes(file, title, "bytes that must be moved", "GB/s", base=10) as axes:
        _lines(axes, rows, lambda row: ("", row["bytes"], row["bytes"] / row["ms_p50"] / 1e6))
        for rate in {row["copy_gb_s"] for row in rows if row.get("copy_gb_s")}:
            axes.axhline(rate, color="grey", linewidth=0.8, linestyle="--")
    return file


def _lines(axes: Any, rows: list[Row], point: Callable[[Row], tuple[str, float, float]]) -> None:
    """Draws rows as lines. `point` returns the size, x and y of a row; each provider and size has a line."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        size, x, y = point(row)
        label = f"{row['provider']}, {size} {row['dtype']} {row['mode']}{_threads(row)}".replace("  ", " ")
        lines.setdefault(label, []).append((x, y))
    for label, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), label=label)


def _roofline(title: str, rows: list[Row], file: Path) -> Path:
    """Operations per second over operations per byte, where both are the least possible numbers of a case, below the
    measured copy and matmul rates."""
    intensities = [row["flops"] / row["bytes"] for row in rows]
    ends = min(intensities) / 4, max(intensities) * 4
    with _axes(file, title, "operations a byte", "TFLOP/s", (7, 5), base=10) as axes:
        for copy, matmul, name in {(r["copy_gb_s"] / 1e3, r["matmul_tflop_s"], r["dtype"] + _threads(r)) for r in rows}:
            x = sorted([*ends, min(max(matmul / copy, ends[0]), ends[1])])
            axes.plot(x, [min(matmul, copy * intensity) for intensity in x], color="grey", marker="", linewidth=0.8)
            axes.annotate(name, (x[-1], min(matmul, copy * x[-1])), fontsize=7)
        for provider in dict.fromkeys(row["provider"] for row in rows):
            rows_of_provider = [row for row in rows if row["provider"] == provider]
            rates = [row["flops"] / row["ms_p50"] / 1e9 for row in rows_of_provider]
            axes.scatter([row["flops"] / row["bytes"] for row in rows_of_provider], rates, s=14, label=provider)
    return file
