"""What is printed, and the README's performance section: all of it from rows."""

import re
import sys
from collections import Counter
from pathlib import Path
from statistics import geometric_mean

import torch

from benchmarks import machine, rows
from benchmarks.agenda import Item
from benchmarks.case import Case
from benchmarks.rows import Row
from benchmarks.runner import Session

README = machine.ROOT / "README.md"
BEGIN, END = "<!-- benchmarks: begin (make readme-tables) -->", "<!-- benchmarks: end -->"
TABLE = "table.md"  # of a GPU, beside its rows
NOT_MEASURED = "Not yet measured on a GPU."


def header(session: Session) -> None:
    facts = machine.environment(session.device)
    print(f"{facts['gpu'] or facts['cpu']}, torch {facts['torch']}, Triton {facts['triton']}, {facts['commit'][:12]}")
    if session.device.type == "cuda":
        state = ", ".join(f"{name} {value}" for name, value in machine.power_state(session.device).items())
        print(f"driver {facts['driver']}, CUDA {facts['cuda']}, TF32 {'on' if facts['tf32'] else 'off'}, {state}")
    else:
        print("No CUDA GPU here: no kernel is timed, and nothing below says anything about a GPU.")
    if session.timing:
        rates = session.rates(torch.float32, torch.get_num_threads())
        print(f"copy {rates['copy_gb_s']:.0f} GB/s, float32 matmul {rates['matmul_tflop_s']:.3g} TFLOP/s (measured)")


def _number(value: float | None, form: str = ".4g") -> str:
    return "-" if value is None else format(value, form)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}%"


def case_table(case: Case, measured: list[Row]) -> None:
    threads = measured[0]["threads"]
    where = "" if threads is None else f", {threads} thread" + "s" * (threads > 1)
    print(f"\n{case.op} {case.shape} {str(case.dtype).removeprefix('torch.')}{where}")
    columns = ("mode", "ms", "20..80%", "times", "graph", "peak MB", "of copy", "error")
    widths = (6, 10, 16, 8, 10, 10, 9, 9)
    print(f"  {'provider':<34}" + "".join(f"{name:>{w}}" for name, w in zip(columns, widths, strict=True)))
    # Where nothing was timed, one line tells it for all modes.
    shown = measured if any(row["ms_p50"] for row in measured) else measured[: len(case.providers)]
    for row in shown:
        cells = (
            row["mode"] if shown is measured else "all",
            _number(row["ms_p50"]),
            f"{_number(row['ms_p20'], '.3g')}..{_number(row['ms_p80'], '.3g')}" if row["ms_p50"] else "-",
            _number(row["times_baseline"], ".2f"),
            _number(row.get("graph_ms_p50")),
            _number(row["peak_mb"]),
            _percent(row.get("copy_fraction")),
            _number(row["error"], ".1e"),
        )
        line = "".join(f"{cell:>{w}}" for cell, w in zip(cells, widths, strict=True))
        print(f"  {row['provider']:<34}{line}  {row['problem']}".rstrip())


def footer(session: Session, measured: list[Row], kept: list[Row], late: list[Item], folder: Path) -> None:
    problems = sum(bool(row["problem"]) for row in measured)
    print(f"\n{len(measured)} rows, {problems} with a problem" + (f", in {folder}" if session.timing else ""))
    if not session.timing:
        print("dry run: compared with float64, not timed, not saved")
    if kept:
        print(f"{len(kept)} rows of an earlier run are still true and were not measured again")
    if late:
        names = ", ".join(f"{count} of {name}" for name, count in Counter(item.name for item in late).items())
        print(f"no time was left for {len(late)} cases ({names}): the same command with --resume goes on")
    if session.device.type == "cpu" and session.timing:
        print("counts of operations and bytes need no GPU: python -m benchmarks.masked_conv2d")
    print("ms: median of single calls; times: over the first provider, in the same run; error: against float64")


def changes(old: list[Row], new: list[Row]) -> None:
    found = rows.changes(old, new)
    print(f"\n{len(found)} changes beyond noise")
    for ratio, before, after in found:
        what = f"{after['op']} {after['shape']} {after['dtype']} {after['provider']} {after['mode']}"
        word = "slower" if ratio > 1 else "faster"
        print(f"  {what}: {before['ms_p50']:.4g} -> {after['ms_p50']:.4g} ms, {max(ratio, 1 / ratio):.2f} times {word}")
    for row in rows.newly_failing(old, new):
        what = f"{row['op']} {row['shape']} {row['dtype']} {row['provider']} {row['mode']}"
        print(f"  {what}: had a time, and now: {row['problem']}")


def catalogue_kernels() -> dict[str, list[str]]:
    """Module -> names of the kernels in its catalogue.

    Raises:
        ValueError: Triton is not installed.
    """
    try:
        from fastgen.kernels.catalogue import kernel_modules

        modules = kernel_modules()
    except ImportError as error:
        raise ValueError("status lists the kernels of the catalogue, which needs Triton (Linux only)") from error
    return {
        module.__name__.removeprefix("fastgen.kernels.").replace(".", "/"): sorted(
            {entry.kernel.__name__ for entry in module.CATALOGUE}
        )
        for module in modules
        if getattr(module, "CATALOGUE", None)
    }


def status(folder: Path) -> int:
    saved = rows.load(folder) if folder.exists() else []
    gpus = sorted({row["gpu"] for row in saved if row.get("gpu")})
    if torch.cuda.is_available() and torch.cuda.get_device_name() not in gpus:
        gpus.append(torch.cuda.get_device_name())
    table = rows.status(saved, catalogue_kernels(), gpus or ["(no GPU yet)"])
    width = max(len(row[1]) for row in table)
    for gpu, kernel, word, count, tested in table:
        print(f"{gpu}  {kernel:<{width}}  {word:<8} {count:>4} rows   tests {tested}")
    counts = {word: sum(row[2] == word for row in table) for word in ("fresh", "stale", "missing")}
    print(", ".join(f"{count} {word}" for word, count in counts.items()))
    return 0


def _best_rival(group: list[Row], figure: str = "ms_p50") -> Row | None:
    """The fastest of the others that computes the same thing."""
    rivals = [row for row in group if not row["provider"].startswith("fastgen")]
    timed = [r for r in rivals if r.get(figure) and not r.get("landmark", r["error"] is None)]
    return min(timed, key=lambda r: r[figure], default=None)


def _folder(gpu: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", gpu).strip("-")


def _groups(selected: list[Row]) -> dict[tuple, list[Row]]:
    groups: dict[tuple, list[Row]] = {}
    for row in selected:
        groups.setdefault((row["op"], row["shape"], row["dtype"], row["mode"], row["threads"]), []).append(row)
    return groups


def _speed_up(row: Row, group: list[Row], figure: str = "ms_p50") -> float | None:
    rival = _best_rival(group, figure)
    return rival[figure] / row[figure] if rival and row.get(figure) else None


def _gpu_summary(gpu: str, selected: list[Row]) -> list[str]:
    """A line for each operation and mode: how much faster than the best rival of each size, none left out."""
    versions = sorted({f"torch {row['torch']}, Triton {row['triton']}, driver {row['driver']}" for row in selected})
    lines = [
        f"### {gpu}",
        "",
        f"{'; '.join(versions)}; TF32 allowed to all float32 products. Speed-up over the fastest",
    ]
    lines += [
        "rival in plain PyTorch at each size, eager or compiled: single calls, L2 cache cleared, and replays of a"
    ]
    lines += [
        f"CUDA graph, which launch nothing. Every size: [{_folder(gpu)}](benchmarks/results/{_folder(gpu)}/{TABLE}).",
        "",
    ]
    lines += [
        "| operation | mode | sizes | geometric mean | least | greatest | in CUDA graphs |",
        "|---|---|---|---|---|---|---|",
    ]
    measured: dict[tuple[str, str], list[tuple[float, float | None]]] = {}
    for (op, _, _, mode, _), group in sorted(_groups(selected).items(), key=str):
        for row in group:
            if row["provider"] == "fastgen" and (faster := _speed_up(row, group)):
                measured.setdefault((op, mode), []).append((faster, _speed_up(row, group, "graph_ms_p50")))
    for (op, mode), found in measured.items():
        direct, graphs = [one for one, _ in found], [graph for _, graph in found if graph]
        cells = [op, mode, str(len(found)), f"{geometric_mean(direct):.2f}", f"{min(direct):.2f}", f"{max(direct):.2f}"]
        lines.append("| " + " | ".join([*cells, f"{geometric_mean(graphs):.2f}" if graphs else "-"]) + " |")
    return [*lines, ""]


def gpu_table(gpu: str, saved: list[Row]) -> str:
    """Every size of every operation that was measured on a GPU, slower ones and failures among them."""
    lines = [
        f"# {gpu}",
        "",
        "Medians of single calls in ms, L2 cache cleared; (in brackets) of a replay as a CUDA graph.",
        "",
    ]
    lines += [
        "| operation | size | dtype | mode | provider | ms | best rival | speed-up | of copy | of matmul | MB | error |"
    ]
    lines += ["|" + "---|" * 12]
    selected = [row for row in saved if row["gpu"] == gpu and row["op"] != rows.TESTS]
    for (op, shape, dtype, mode, _), group in sorted(_groups(selected).items(), key=str):
        rival = _best_rival(group)
        for row in group:
            if not row["provider"].startswith("fastgen"):
                continue
            graph = f" ({row['graph_ms_p50']:.4g})" if row.get("graph_ms_p50") else ""
            cells = [op, shape, dtype, mode, row["provider"], row["problem"] or _number(row["ms_p50"]) + graph]
            cells += [f"{rival['provider']}: {rival['ms_p50']:.4g}" if rival else "-"]
            cells += [_number(_speed_up(row, group), ".2f"), _percent(row.get("copy_fraction"))]
            cells += [_percent(row.get("matmul_fraction")), _number(row["peak_mb"]), _number(row["error"], ".1e")]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def _sampling_table(cpu: str, selected: list[Row]) -> list[str]:
    """A CPU's figures are ratios measured side by side: a batch of samples over one forward pass of it."""
    providers = list(dict.fromkeys(row["provider"] for row in selected))
    rivals = [name for name in providers if name != selected[0]["baseline"]]
    lines = [f"### Sampling on a CPU ({cpu})", ""]
    lines += ["Time of a whole batch of images, in units of one forward pass of the same batch in the same run.", ""]
    lines += ["| model | threads | " + " | ".join(rivals) + " |", "|---|---|" + "---|" * len(rivals)]
    for (_, shape, _, _, threads), group in sorted(_groups(selected).items(), key=str):
        times = {row["provider"]: _number(row["times_baseline"], ".3g") for row in group}
        lines.append(f"| {shape} | {threads} | " + " | ".join(times.get(name, "-") for name in rivals) + " |")
    return [*lines, ""]


def performance_section(saved: list[Row]) -> str:
    """The README's performance section, markers included."""
    on_gpu = [row for row in saved if row["gpu"] and row["op"] != rows.TESTS]
    sampling = [row for row in saved if not row["gpu"] and row["op"] == "sampling" and row["times_baseline"]]
    lines = [BEGIN, ""]
    if not on_gpu:
        lines += [
            f"{NOT_MEASURED} On a machine with one, `make bench` measures for less than ten minutes and saves the"
        ]
        lines += [
            "rows, `python -m benchmarks --full --resume` goes on, and `pytest -m gpu` tests every kernel there.",
            "",
        ]
    for gpu in sorted({row["gpu"] for row in on_gpu}):
        lines += _gpu_summary(gpu, [row for row in on_gpu if row["gpu"] == gpu])
    for cpu in sorted({row["cpu"] for row in sampling}):
        lines += _sampling_table(cpu, [row for row in sampling if row["cpu"] == cpu])
    return "\n".join([*lines, END])


def readme_tables(folder: Path, *, check: bool, readme: Path = README) -> int:
    """Writes the section between the markers of the README and the table of every GPU, or only checks them.

    Raises:
        ValueError: the README has no markers, or not one pair of them.
    """
    text = readme.read_text()
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"{readme}: expected one pair of the lines {BEGIN} and {END}")
    saved = rows.load(folder) if folder.exists() else []
    section = performance_section(saved)
    wanted = {readme: pattern.sub(lambda _: section, text)}
    for gpu in {row["gpu"] for row in saved if row["gpu"]}:
        wanted[folder / _folder(gpu) / TABLE] = gpu_table(gpu, saved)
    stale = [file for file, new in wanted.items() if not file.exists() or file.read_text() != new]
    for file in stale:
        if check:
            print(f"{file}: is not what the saved rows say: make readme-tables", file=sys.stderr)
        else:
            file.write_text(wanted[file])
    return 1 if check and stale else 0


def plots(folder: Path) -> int:
    from benchmarks import plots as drawing

    if not folder.exists():
        raise ValueError(f"{folder}: no saved rows to draw; run python -m benchmarks first")
    for file in drawing.draw(rows.load(folder), machine.ROOT / "runs" / "benchmarks"):
        print(file)
    return 0
