"""What is printed, and the README's performance section: all of it from rows."""

import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import geometric_mean

from benchmarks.harness import cpu_tables, launches, machine, rows
from benchmarks.harness.case import Case
from benchmarks.harness.cpu_tables import TABLE
from benchmarks.harness.rows import Row
from benchmarks.harness.session import Session

README = machine.ROOT / "README.md"
BEGIN, END = "<!-- benchmarks: begin (make readme-tables) -->", "<!-- benchmarks: end -->"
NOT_MEASURED = "Not yet measured on a GPU."
WIDTHS = {"mode": 6, "ms": 10, "20..80%": 16, "times": 8, "wall": 10, "graph": 10, "host us": 9, "peak MB": 10}
WIDTHS |= {"of copy": 9, "error": 9}
COLUMNS = f"  {'provider':<34}" + "".join(f"{name:>{width}}" for name, width in WIDTHS.items())


def header(session: Session) -> None:
    facts = session.facts
    print(f"{facts['gpu'] or facts['cpu']}, torch {facts['torch']}, Triton {facts['triton']}, {facts['commit'][:12]}")
    if facts["gpu"]:
        print(f"driver {facts['driver']}, CUDA {facts['cuda']}, TF32 allowed to all float32 products")
    else:
        print("No CUDA GPU here: no kernel is timed, and nothing below says anything about a GPU.")


def rates(session: Session) -> None:
    for threads, found in session.rates.items():
        own = ", ".join(f"{name} matmul {rate:.3g} TFLOP/s" for name, rate in found.items() if name != "copy")
        where = "" if threads is None else f" with {threads} threads"
        print(f"copy {found['copy']:.0f} GB/s, {own}{where} (measured)", flush=True)


def _number(value: float | None, form: str = ".4g") -> str:
    return "-" if value is None else format(value, form)


def name_of(row: Row) -> str:
    return f"{row['op']} {row['shape']} {row['dtype']} {row['mode']}"


def line(row: Row) -> str:
    """Of a row, under COLUMNS; a problem and the time of a part last."""
    spread = f"{row['ms_p20']:.3g}..{row['ms_p80']:.3g}" if row["ms_p50"] else "-"
    cells = [row["mode"], _number(row["ms_p50"]), spread, _number(row["times_baseline"], ".2f")]
    cells += [_number(row.get("wall_ms_p50")), _number(row.get("graph_ms_p50")), _number(row.get("host_us"), ".3g")]
    cells += [_number(row["peak_mb"]), _number(row.get("copy_fraction"), ".0%"), _number(row["error"], ".1e")]
    about = [row["problem"], f"in {row['died_in']}" if row.get("died_in") else "", _share(row)]
    joined = "".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS.values(), strict=True))
    return f"  {row['provider']:<34}{joined}  {'  '.join(filter(None, about))}".rstrip()


def _share(row: Row) -> str:
    share = row.get("share") or 1
    return f"extrapolated from 1/{1 / share:.0f} of it" if share < 1 else f"one of {share:.0f}" if share > 1 else ""


def footer(measured: list[Row], kept: int, late: list[Case], folder: Path | None) -> None:
    problems = sum(bool(row["problem"]) for row in measured)
    print(f"\n{len(measured)} rows, {problems} with a problem" + (f", in {folder}" if folder else ""))
    if folder is None:
        print("dry run: compared with float64, not timed, not saved")
    if kept:
        print(f"{kept} rows of an earlier run are still true and were not measured again")
    if late:
        names = ", ".join(f"{count} of {name}" for name, count in Counter(case.op for case in late).items())
        print(f"no time was left for {len(late)} cases ({names}): the same command with --resume goes on")
    print("ms: median of single calls; times: over the first provider, in the same run; error: against float64")


def changes(old: list[Row], new: list[Row]) -> None:
    found, failing = rows.changes(old, new)
    print(f"\n{len(found)} changes beyond noise")
    for ratio, before, row in found:
        how = f"{max(ratio, 1 / ratio):.2f} times {'slower' if ratio > 1 else 'faster'}"
        print(
            f"  {name_of(row)} {row['provider']} {row['mode']}: {before['ms_p50']:.4g} -> {row['ms_p50']:.4g} ms, {how}"
        )
    for row in failing:
        print(f"  {name_of(row)} {row['provider']} {row['mode']}: had a time, and now: {row['problem']}")


def speed_ups(saved: Iterable[Row]) -> str:
    """A line a case and mode in which fastgen was timed: its time, the best rival's, and how many times faster."""
    lines = []
    for group in _groups(saved):
        rival = _best_rival(group)
        for row in group:
            if row["provider"].startswith("fastgen") and row["ms_p50"]:
                against = f"{_speed_up(row, group):.2f}x {rival['provider']}" if rival else "no rival"
                host = f", host {row['host_us']:.0f} us" if row["host_us"] else ""
                part = f", {_share(row)}" if row["share"] else ""
                what = name_of(row) + row["provider"].removeprefix("fastgen")
                lines.append(f"{what:<72} {row['ms_p50']:8.4g} ms  {against}{host}{part}")
    return "\n".join(lines)


def verdicts(saved: list[Row]) -> str:
    """A line a kernel of the catalogue, by the rows that launched it: correct, wrong, dead, or not launched. A wrong
    result is that of every kernel of its call; a kernel is dead where it was the last that a call launched."""
    lines = []
    for name in launches.catalogue():
        launched = [row for row in saved if name in row.get("launched", ()) and row.get("verdict")]
        by = {"dead": [row for row in launched if row["died_in"] == name]}
        by |= {word: [row for row in launched if row["verdict"] == word] for word in ("wrong", "correct")}
        word = next((word for word, found in by.items() if found), "not launched")
        about = f"{len(by['correct'])} correct, {len(by['wrong'])} wrong, {len(by['dead'])} dead"
        if word in ("dead", "wrong"):
            about += f"; {name_of(by[word][0])}: {by[word][0]['problem']}"
        errors = [row["error"] for row in launched if row["error"] is not None]
        lines.append(f"{word:<12} {name:<44} largest error {_number(max(errors, default=None), '.1e'):>8}  {about}")
    return "\n".join(lines)


def status(folder: Path) -> int:
    saved = rows.load(folder) if folder.exists() else []
    gpus = sorted({row["gpu"] for row in saved if row.get("gpu")} | {here for here in (machine.gpu(),) if here})
    table = rows.status(saved, list(launches.catalogue()), gpus or ["(no GPU yet)"])
    width = max(len(row[1]) for row in table)
    for gpu, kernel, word, count, tested in table:
        print(f"{gpu}  {kernel:<{width}}  {word:<8} {count:>4} rows   tests {tested}")
    counts = Counter(row[2] for row in table)
    print(", ".join(f"{counts[word]} {word}" for word in ("fresh", "stale", "missing")))
    return 0


def _best_rival(group: list[Row], figure: str = "ms_p50") -> Row | None:
    """The fastest of the others that computes the same thing."""
    rivals = [row for row in group if not row["provider"].startswith("fastgen")]
    timed = [r for r in rivals if r.get(figure) and not r.get("landmark", r["error"] is None)]
    return min(timed, key=lambda r: r[figure], default=None)


def _groups(selected: Iterable[Row]) -> list[list[Row]]:
    """The rows of all providers of a case and mode."""
    groups: dict[str, list[Row]] = {}
    for row in selected:
        groups.setdefault(str([row[name] for name in ("op", "shape", "dtype", "mode", "threads")]), []).append(row)
    return list(groups.values())


def _sorted_groups(selected: Iterable[Row]) -> list[list[Row]]:
    return sorted(_groups(selected), key=lambda group: (name_of(group[0]), str(group[0]["threads"])))


def _speed_up(row: Row, group: list[Row], figure: str = "ms_p50") -> float | None:
    rival = _best_rival(group, figure)
    return rival[figure] / row[figure] if rival and row.get(figure) else None


def _table(head: str, body: Iterable[Iterable[str]]) -> list[str]:
    return [f"| {head} |", "|---" * len(head.split(" | ")) + "|", *(f"| {' | '.join(cells)} |" for cells in body), ""]


def _gpu_summary(gpu: str, selected: list[Row]) -> Iterator[str]:
    """A line for each operation and mode: how much faster than the best rival of each size, none left out."""
    versions = sorted({f"torch {row['torch']}, Triton {row['triton']}, driver {row['driver']}" for row in selected})
    folder = machine.folder_name({"gpu": gpu})
    yield f"### {gpu}\n"
    yield f"{'; '.join(versions)}; TF32 allowed to all float32 products. Speed-up over the fastest"
    yield "rival in plain PyTorch at each size, eager or compiled: single calls, L2 cache cleared, and replays of a"
    yield f"CUDA graph, which launch nothing. Every size: [{folder}](benchmarks/results/{folder}/{TABLE}).\n"
    measured: dict[tuple[str, str], list[tuple[float, float | None]]] = {}
    for group in _sorted_groups(selected):
        for row in group:
            if row["provider"] == "fastgen" and (faster := _speed_up(row, group)):
                in_graphs = _speed_up(row, group, "graph_ms_p50")
                measured.setdefault((row["op"], row["mode"]), []).append((faster, in_graphs))
    body = []
    for (op, mode), found in measured.items():
        direct, graphs = [one for one, _ in found], [graph for _, graph in found if graph]
        figures = [f"{value:.2f}" for value in (geometric_mean(direct), min(direct), max(direct))]
        body.append([op, mode, str(len(found)), *figures, f"{geometric_mean(graphs):.2f}" if graphs else "-"])
    yield from _table("operation | mode | sizes | geometric mean | least | greatest | in CUDA graphs", body)


def gpu_table(gpu: str, saved: list[Row]) -> str:
    """Every size of every operation that was measured on a GPU, slower ones and failures among them."""
    body = []
    for group in _sorted_groups(row for row in saved if row["gpu"] == gpu and row["op"] != rows.TESTS):
        rival = _best_rival(group)
        for row in group:
            if row["provider"].startswith("fastgen"):
                graph = f" ({row['graph_ms_p50']:.4g})" if row.get("graph_ms_p50") else ""
                cells = [row[name] for name in ("op", "shape", "dtype", "mode", "provider")]
                cells += [row["problem"] or _number(row["ms_p50"]) + graph]
                cells += [f"{rival['provider']}: {rival['ms_p50']:.4g}" if rival else "-"]
                cells += [_number(_speed_up(row, group), ".2f"), _number(row.get("copy_fraction"), ".0%")]
                cells += [_number(row.get("matmul_fraction"), ".0%"), _number(row["peak_mb"])]
                body.append([*cells, _number(row["error"], ".1e")])
    head = "operation | size | dtype | mode | provider | ms | best rival | speed-up | of copy | of matmul | MB | error"
    about = "Medians of single calls in ms, L2 cache cleared; (in brackets) of a replay as a CUDA graph."
    return "\n".join([f"# {gpu}", "", about, "", *_table(head, body)])


def performance_section(saved: list[Row]) -> str:
    """The README's performance section, markers included."""
    on_gpu = [row for row in saved if row["gpu"] and row["op"] != rows.TESTS]
    lines = [BEGIN, ""]
    if not on_gpu:
        latest = max((row["time"] for row in saved), default="")[:10]
        lines += [
            f"{NOT_MEASURED} (Latest row: {latest or 'none'}. On a machine with one, `make bench` saves rows.)",
            "",
        ]
    for gpu in sorted({row["gpu"] for row in on_gpu}):
        lines += _gpu_summary(gpu, [row for row in on_gpu if row["gpu"] == gpu])
    for cpu in cpu_tables.cpus(saved):
        lines += cpu_tables.summary(cpu, saved)
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
        wanted[folder / machine.folder_name({"gpu": gpu}) / TABLE] = gpu_table(gpu, saved)
    for cpu in cpu_tables.cpus(saved):
        wanted[folder / cpu_tables.folder_of(cpu) / TABLE] = cpu_tables.table(cpu, saved)
    stale = [file for file, new in wanted.items() if not file.exists() or file.read_text() != new]
    for file in stale:
        if check:
            print(f"{file}: is not what the saved rows say: make readme-tables", file=sys.stderr)
        else:
            file.write_text(wanted[file])
    return 1 if check and stale else 0
