"""Writes saved rows as text: the README's performance section, and a table beside the rows of each machine."""

import math
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import geometric_mean

from benchmarks.harness import machine, rows
from benchmarks.harness.report import number, share
from benchmarks.harness.rows import Row

README = machine.ROOT / "README.md"
BEGIN, END = "<!-- benchmarks: begin (make readme-tables) -->", "<!-- benchmarks: end -->"
TABLE = "table.md"
NOT_MEASURED = "Not yet measured on a GPU."
Group = dict[str, Row]  # the rows of one case, mode and number of threads, by provider


def groups(saved: Iterable[Row]) -> list[Group]:
    """The rows of each case, mode and number of threads, sorted. Rows of test outcomes are left out."""
    by_case: dict[tuple[str | int, ...], Group] = {}
    for row in saved:
        if row["op"] != rows.TESTS:
            key = (row["op"], row["shape"], row["dtype"], row["mode"], row["threads"] or 0)
            by_case.setdefault(key, {})[row["provider"]] = row
    return [by_case[key] for key in sorted(by_case)]


def best_rival(group: Group, figure: str = "ms_p50") -> Row | None:
    """The fastest row of the providers that are not fastgen's and compute the same; None if there is none."""
    rivals = [row for name, row in group.items() if not name.startswith("fastgen")]
    timed = [r for r in rivals if r.get(figure) and not r.get("landmark", r["error"] is None)]
    return min(timed, key=lambda r: r[figure], default=None)


def speed_up(row: Row, group: Group, figure: str = "ms_p50") -> float | None:
    """How many times as fast as the best rival a row is."""
    rival = best_rival(group, figure)
    return rival[figure] / row[figure] if rival and row.get(figure) else None


def markdown(head: str, body: Iterable[Iterable[object]]) -> list[str]:
    """The lines of a table, and an empty line."""
    columns = head.split(" | ")
    return [f"| {head} |", "|---" * len(columns) + "|", *(f"| {' | '.join(map(str, cells))} |" for cells in body), ""]


def _link(folder: str) -> str:
    return f"[{folder}](benchmarks/results/{folder}/{TABLE})"


# On a GPU


def gpu_summary(gpu: str, saved: list[Row]) -> Iterator[str]:
    """A table with a line for each operation and mode: speed-ups over the best rival, over all sizes."""
    versions = sorted({f"torch {row['torch']}, Triton {row['triton']}, driver {row['driver']}" for row in saved})
    yield f"### {gpu}\n"
    yield f"{'; '.join(versions)}; TF32 allowed to all float32 products. Speed-up over the fastest"
    yield "rival in plain PyTorch at each size, eager or compiled: single calls, L2 cache cleared, and replays of a"
    yield f"CUDA graph, which launch nothing. Every size: {_link(machine.folder_name({'gpu': gpu}))}.\n"
    measured: dict[tuple[str, str], list[tuple[float, float | None]]] = {}
    for group in groups(saved):
        if (row := group.get("fastgen")) and (faster := speed_up(row, group)):
            measured.setdefault((row["op"], row["mode"]), []).append((faster, speed_up(row, group, "graph_ms_p50")))
    body = []
    for (op, mode), speed_ups in measured.items():
        direct, graphs = [ratio for ratio, _ in speed_ups], [ratio for _, ratio in speed_ups if ratio]
        figures = [f"{value:.2f}" for value in (geometric_mean(direct), min(direct), max(direct))]
        body.append([op, mode, len(speed_ups), *figures, f"{geometric_mean(graphs):.2f}" if graphs else "-"])
    yield from markdown("operation | mode | sizes | geometric mean | least | greatest | in CUDA graphs", body)


def gpu_table(gpu: str, saved: Iterable[Row]) -> str:
    """A table of every size of every operation that was measured on a GPU, including failures."""
    body = []
    for group in groups(row for row in saved if row["gpu"] == gpu):
        rival = best_rival(group)
        for name, row in group.items():
            if name.startswith("fastgen"):
                graph = f" ({row['graph_ms_p50']:.4g})" if row.get("graph_ms_p50") else ""
                cells = [row["op"], row["shape"], row["dtype"], row["mode"], name]
                cells += [row["problem"] or f"{number(row['ms_p50'])}{graph} {share(row)}".rstrip()]
                cells += [f"{rival['provider']}: {rival['ms_p50']:.4g}" if rival else "-"]
                cells += [number(speed_up(row, group), ".2f"), number(row.get("copy_fraction"), ".0%")]
                cells += [number(row.get("matmul_fraction"), ".0%"), number(row.get("host_us"), ".0f")]
                body.append([*cells, number(row["peak_mb"]), number(row["error"], ".1e")])
    head = "operation | size | dtype | mode | provider | ms | best rival | speed-up | of copy | of matmul | host us"
    about = "Medians of single calls in ms, L2 cache cleared; (in brackets) of a replay as a CUDA graph."
    return "\n".join([f"# {gpu}", "", about, "", *markdown(f"{head} | MB | error", body)])


# Sampling on a CPU: ratios of times measured side by side, a batch of samples over one forward pass


def cpu_samples(saved: Iterable[Row]) -> dict[str, list[Group]]:
    """The groups of rows of sampling by CPU, one group for each model and number of threads."""
    by_cpu: dict[str, list[Group]] = {}
    sampled = [row for row in saved if row["op"] == "sampling" and not row["gpu"]]
    ratios = [row for row in sampled if row["times_baseline"] or row["problem"]]
    for cpu in sorted({row["cpu"] for row in ratios}):
        by_cpu[cpu] = groups(row for row in ratios if row["cpu"] == cpu)
    return by_cpu


def _model_threads_date(group: Group) -> tuple[str, int, str]:
    """The model, the number of threads, and the date of the latest row."""
    row = next(iter(group.values()))
    return row["shape"], row["threads"], max(row["time"] for row in group.values())[:10]


def cpu_table(cpu: str, sampled: list[Group]) -> str:
    """A table of every model, number of threads and backend."""
    names = dict.fromkeys(name for group in sampled for name, row in group.items() if name != row["baseline"])
    body = []
    for group in sampled:
        model, threads, date = _model_threads_date(group)
        cells = [group.get(name, {"problem": None, "times_baseline": None}) for name in names]
        times = [row["problem"] or number(row["times_baseline"], ".3g") for row in cells]
        body.append([model, threads, *times, date])
    lines = [f"# Sampling on a CPU ({cpu})", ""]
    lines += ["Time of a whole batch of images, in units of one forward pass of the same batch in the same run.", ""]
    return "\n".join([*lines, *markdown(" | ".join(["model", "threads", *names, "measured"]), body)])


def cpu_summary(cpu: str, sampled: list[Group]) -> list[str]:
    """A table with a line for each model, with the most threads that were measured: the naive loop and fastgen."""
    link = _link(machine.folder_name({"gpu": None, "cpu": cpu}))
    lines = [
        f"Sampling a batch on a CPU ({cpu}), in units of one forward pass of the batch in the same run. The loop's",
        rf"time is that of one draw for all; \* where none was timed, a pass for each draw. All backends: {link}.",
        "",
    ]
    lines_by_model: dict[str, list[object]] = {}  # the group with the most threads comes last
    for group in (group for group in sampled if "fastgen" in group and group["fastgen"]["times_baseline"]):
        model, threads, date = _model_threads_date(group)
        draws = math.prod(int(side) for side in re.findall(r"\d+(?=x)|(?<=x)\d+", model))
        timed = "naive" in group and group["naive"]["times_baseline"]
        naive = timed or draws
        mark, fast = "" if timed else r"\*", group["fastgen"]["times_baseline"]
        cells = [model, threads, f"{naive:.0f}{mark}", f"{fast:.3g}", f"{naive / fast:.0f}", date]
        lines_by_model[model] = cells
    return [*lines, *markdown("model | threads | loop | fastgen | times as fast | measured", lines_by_model.values())]


# All


def performance_section(saved: list[Row]) -> str:
    """The README's performance section, markers included."""
    on_gpu = [row for row in saved if row["gpu"] and row["op"] != rows.TESTS]
    lines = [BEGIN, ""]
    if not on_gpu:
        latest = max((row["time"] for row in saved), default="none")[:10]
        lines += [f"{NOT_MEASURED} (Latest row: {latest}. On a machine with one, `make bench` saves rows.)", ""]
    for gpu in sorted({row["gpu"] for row in on_gpu}):
        lines += gpu_summary(gpu, [row for row in on_gpu if row["gpu"] == gpu])
    for cpu, sampled in cpu_samples(saved).items():
        lines += cpu_summary(cpu, sampled)
    return "\n".join([*lines, END])


def write(folder: Path, *, check: bool, readme: Path = README) -> int:
    """Writes the section between the markers of the README and the table of every machine; with `check` only compares
    them. Returns the exit status: 1 if `check` finds a difference.

    Raises:
        ValueError: the README does not have exactly one pair of markers.
    """
    text = readme.read_text()
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"{readme}: expected one pair of the lines {BEGIN} and {END}")
    saved = rows.load(folder) if folder.exists() else []
    section = performance_section(saved)
    wanted = {readme: pattern.sub(lambda _: section, text)}
    for gpu in {row["gpu"] for row in saved if row["gpu"]}:
        wanted[folder / machine.folder_name({"gpu": gpu}) / TABLE] = gpu_table(gpu, saved)
    for cpu, sampled in cpu_samples(saved).items():
        wanted[folder / machine.folder_name({"gpu": None, "cpu": cpu}) / TABLE] = cpu_table(cpu, sampled)
    stale = [file for file, new in wanted.items() if not file.exists() or file.read_text() != new]
    for file in stale:
        if check:
            print(f"{file}: does not agree with the saved rows: run make readme-tables", file=sys.stderr)
        else:
            file.write_text(wanted[file])
    return 1 if check and stale else 0
