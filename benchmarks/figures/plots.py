"""Plots of saved rows: speed-up bars, a roofline, time over batch size, bandwidth over size. Nothing is drawn from
memory."""

import re
from collections.abc import Callable
from pathlib import Path

from benchmarks.figures.style import look
from benchmarks.harness.machine import folder_name
from benchmarks.harness.rows import Row


def draw(saved: list[Row], folder: Path) -> list[Path]:
    """Draws what the rows of each machine allow into `folder`/MACHINE/; returns the files.

    Raises:
        ValueError: matplotlib is not installed, or no row has a time.
    """
    timed = [row for row in saved if row["ms_p50"]]
    if not timed:
        raise ValueError("no saved row has a time to draw")
    with look():
        import matplotlib

        matplotlib.use("Agg")
        return _draw(timed, folder)


def _draw(timed: list[Row], folder: Path) -> list[Path]:
    files = []
    for name in sorted({row["gpu"] or row["cpu"] for row in timed}):
        machine_rows = [row for row in timed if (row["gpu"] or row["cpu"]) == name]
        target = folder / folder_name(machine_rows[0])
        target.mkdir(parents=True, exist_ok=True)
        for op in sorted({row["op"] for row in machine_rows}):
            own = [row for row in machine_rows if row["op"] == op]
            files.append(_bars(op, name, own, target / f"{op}.png"))
            if len({row["batch"] for row in own if row["batch"]}) > 1:
                files.append(_over_batch(op, name, own, target / f"{op}-batch.png"))
            if len({row["bytes"] for row in own if row.get("bytes")}) > 1:
                files.append(_over_size(op, name, own, target / f"{op}-size.png"))
        roofline = [row for row in machine_rows if row.get("bytes") and row.get("flops") and row.get("copy_gb_s")]
        if roofline:
            files.append(_roofline(name, roofline, target / "roofline.png"))
    return files


def _figure(width: float, height: float, title: str):
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(width, height), layout="constrained")
    axes.set_title(title)
    return figure, axes


def _save(figure, file: Path) -> Path:
    from matplotlib import pyplot

    figure.savefig(file, dpi=120)
    pyplot.close(figure)
    return file


def _label(row: Row) -> str:
    threads = "" if row["threads"] is None else f", {row['threads']} thr."
    return f"{row['shape']}\n{row['dtype']} {row['mode']}{threads}"


def _bars(op: str, machine: str, rows: list[Row], file: Path) -> Path:
    """How many times as fast as the baseline of its case; 1 is the baseline itself."""
    labels = list(dict.fromkeys(map(_label, rows)))
    providers = list(dict.fromkeys(row["provider"] for row in rows if row["provider"] != row["baseline"]))
    figure, axes = _figure(3 + 0.9 * len(labels), 4.5, f"{op} on {machine}")
    width = 0.8 / max(len(providers), 1)
    for i, provider in enumerate(providers):
        own = [row for row in rows if row["provider"] == provider and row["times_baseline"]]
        found = {_label(row): 1 / row["times_baseline"] for row in own}
        places = [k + width * (i - (len(providers) - 1) / 2) for k in range(len(labels))]
        axes.bar(places, [found.get(label, 0) for label in labels], width, label=provider)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(labels)), labels, fontsize=7, rotation=45, ha="right")
    axes.set_yscale("log")
    axes.set_ylabel(f"speed-up over {rows[0]['baseline']}")
    axes.legend(fontsize=8)
    return _save(figure, file)


def _over_batch(op: str, machine: str, rows: list[Row], file: Path) -> Path:
    """Time a call over images a call, one line a provider and size."""
    figure, axes = _figure(7, 4.5, f"{op} on {machine}")

    def size(row: Row) -> str:
        return re.sub(r"\bB=\d+ ?|(?<=\s)\d+x|^\d+x", "", row["shape"], count=1)

    batched = [row for row in rows if row["batch"]]
    _lines(axes, batched, size, lambda row: (row["batch"], row["ms_p50"]))
    axes.set_xscale("log", base=2)
    axes.set_xlabel("images a call")
    axes.set_ylabel("ms")
    return _save(figure, file)


def _over_size(op: str, machine: str, rows: list[Row], file: Path) -> Path:
    """Bytes a second over the bytes that must be moved, one line a provider; a dashed line is the measured copy."""
    figure, axes = _figure(7, 4.5, f"{op} on {machine}")
    sized = [row for row in rows if row.get("bytes")]
    _lines(axes, sized, lambda row: "", lambda row: (row["bytes"], row["bytes"] / row["ms_p50"] / 1e6))
    for rate in {row["copy_gb_s"] for row in rows if row.get("copy_gb_s")}:
        axes.axhline(rate, color="grey", linewidth=0.8, linestyle="--")
    axes.set_xscale("log")
    axes.set_xlabel("bytes that must be moved")
    axes.set_ylabel("GB/s")
    return _save(figure, file)


def _lines(axes, rows: list[Row], what: Callable[[Row], str], point: Callable[[Row], tuple[float, float]]) -> None:
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        threads = "" if row["threads"] is None else f", {row['threads']} thr."
        label = f"{row['provider']}, {what(row)} {row['dtype']} {row['mode']}{threads}".replace("  ", " ")
        lines.setdefault(label, []).append(point(row))
    for label, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    axes.set_yscale("log")
    axes.legend(fontsize=6)


def _roofline(machine: str, rows: list[Row], file: Path) -> Path:
    """Operations a second over operations a byte, both of the floor, under the measured copy and matmul rates."""
    figure, axes = _figure(7, 5, f"Roofline of {machine}, measured rates")
    intensities = [row["flops"] / row["bytes"] for row in rows]
    low, high = min(intensities) / 4, max(intensities) * 4
    ceilings = {(row["dtype"], row["threads"]): (row["copy_gb_s"] / 1e3, row["matmul_tflop_s"]) for row in rows}
    for (dtype, threads), (copy, matmul) in ceilings.items():
        steps = [low * (high / low) ** (i / 50) for i in range(51)]
        label = dtype + ("" if threads is None else f", {threads} threads")
        axes.plot(steps, [min(matmul, copy * x) for x in steps], color="grey", linewidth=0.8)
        axes.annotate(label, (steps[-1], min(matmul, copy * steps[-1])), fontsize=7)
    for provider in dict.fromkeys(row["provider"] for row in rows):
        own = [row for row in rows if row["provider"] == provider]
        x = [row["flops"] / row["bytes"] for row in own]
        y = [row["flops"] / row["ms_p50"] / 1e9 for row in own]
        axes.scatter(x, y, s=14, label=provider)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations a byte")
    axes.set_ylabel("TFLOP/s")
    axes.legend(fontsize=8)
    return _save(figure, file)
