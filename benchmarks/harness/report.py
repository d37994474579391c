"""Prints rows. figures/tables.py writes them to files (the README's section and the tables)."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from benchmarks.harness import launches, machine, rows
from benchmarks.harness.case import Case
from benchmarks.harness.rows import Row
from benchmarks.harness.session import Session

WIDTHS = {"mode": 6, "ms": 10, "20..80%": 16, "times": 8, "wall": 10, "graph": 10, "host us": 9, "peak MB": 10}
WIDTHS |= {"of copy": 9, "error": 9}
COLUMNS = f"  {'provider':<34}" + "".join(f"{name:>{width}}" for name, width in WIDTHS.items())
NOISE = 0.03  # relative changes below this are not reported, even if the quantiles are narrow


def header(session: Session) -> None:
    facts = session.facts
    print(f"{facts['gpu'] or facts['cpu']}, torch {facts['torch']}, Triton {facts['triton']}, {facts['commit'][:12]}")
    if facts["gpu"]:
        print(f"driver {facts['driver']}, CUDA {facts['cuda']}, TF32 allowed to all float32 products")
    else:
        print("No CUDA GPU here: no kernel is timed, and nothing below says anything about a GPU.")


def rates(session: Session) -> None:
    for threads, measured in session.rates.items():
        matmuls = ", ".join(f"{name} matmul {rate:.3g} TFLOP/s" for name, rate in measured.items() if name != "copy")
        where = "" if threads is None else f" with {threads} threads"
        print(f"copy {measured['copy']:.0f} GB/s, {matmuls}{where} (measured)", flush=True)


def number(value: float | None, form: str = ".4g") -> str:
    return "-" if value is None else format(value, form)


def share(row: Row) -> str:
    """A note on the row's share: that the time is extrapolated, or is one of several in a call; "" for a share of 1."""
    part = row.get("share") or 1
    return f"extrapolated from 1/{1 / part:.0f} of it" if part < 1 else f"one of {part:.0f}" if part > 1 else ""


def line(row: Row) -> str:
    """A row as a line under COLUMNS, with its problem at the end."""
    spread = f"{row['ms_p20']:.3g}..{row['ms_p80']:.3g}" if row["ms_p50"] else "-"
    cells = [row["mode"], number(row["ms_p50"]), spread, number(row["times_baseline"], ".2f")]
    cells += [number(row.get("wall_ms_p50")), number(row.get("graph_ms_p50")), number(row.get("host_us"), ".3g")]
    cells += [number(row["peak_mb"]), number(row.get("copy_fraction"), ".0%"), number(row["error"], ".1e")]
    about = [row["problem"], f"in {row['died_in']}" if row.get("died_in") else "", share(row)]
    joined = "".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS.values(), strict=True))
    return f"  {row['provider']:<34}{joined}  {'  '.join(filter(None, about))}".rstrip()


def footer(measured: list[Row], kept: int, late: list[Case], folder: Path | None) -> None:
    problems = sum(bool(row["problem"]) for row in measured)
    print(f"\n{len(measured)} rows, {problems} with a problem" + (f", in {folder}" if folder else ""))
    if folder is None:
        print("dry run: compared with float64, not timed, not saved")
    if kept:
        print(f"{kept} rows of an earlier run are still valid and were not measured again")
    if late:
        names = ", ".join(f"{count} of {name}" for name, count in Counter(case.op for case in late).items())
        print(f"no time was left for {len(late)} cases ({names}): the same command with --resume goes on")
    print("ms: median of single calls; times: over the first provider, in the same run; error: against float64")


def changes(old: list[Row], new: list[Row]) -> list[str]:
    """A line for each median that changed by more than noise, the slowest first: the ranges from the 20th to the 80th
    percentile do not overlap, and the medians differ by more than NOISE. Then a line for each row that had a time and
    now has a problem."""
    old_rows = {rows.key(row): row for row in old if row.get("ms_p50")}
    changed, failing = list[tuple[float, str]](), list[str]()
    for row in new:
        before = old_rows.get(rows.key(row))
        name = f"{row['op']} {row['shape']} {row['dtype']} {row['provider']} {row['mode']}"
        if before is None:
            continue
        if not row.get("ms_p50"):
            failing += [f"{name}: had a time, and now: {row['problem']}"] if row.get("problem") else []
            continue
        ratio = row["ms_p50"] / before["ms_p50"]
        apart = row["ms_p20"] > before["ms_p80"] or row["ms_p80"] < before["ms_p20"]
        if apart and abs(ratio - 1) > NOISE:
            how = f"{max(ratio, 1 / ratio):.2f} times {'slower' if ratio > 1 else 'faster'}"
            changed.append((ratio, f"{name}: {before['ms_p50']:.4g} -> {row['ms_p50']:.4g} ms, {how}"))
    return [text for _, text in sorted(changed, reverse=True)] + failing


def kernels(saved: list[Row], names: Iterable[str]) -> list[str]:
    """One line for each kernel, from the rows of one GPU that launched it.

    The first word is "dead" (a call failed, and this was the last kernel it launched), "wrong" (the result of a call
    that launched it was wrong), "correct" or "not launched". Then follow the age and the number of the rows that timed
    it, the age of the test results, and the largest error. "stale" rows were measured with older source.
    """

    def age(dated: list[Row]) -> str:
        states = {rows.state(row) for row in dated}
        return "stale" if "stale" in states else "fresh" if states else "missing"

    tests = [row for row in saved if row["op"] == rows.TESTS]
    tested = "failed" if any(row["problem"] for row in tests) else age(tests)
    lines = []
    for name in names:
        launched = [row for row in saved if name in row.get("launched", ())]
        timed = [row for row in launched if row.get("ms_p50")]
        by_verdict = {"dead": [row for row in launched if row.get("died_in") == name]}
        by_verdict |= {word: [row for row in launched if row.get("verdict") == word] for word in ("wrong", "correct")}
        word = next((word for word, its_rows in by_verdict.items() if its_rows), "not launched")
        times = f"times {age(timed)} ({len(timed)} rows)"
        errors = [row["error"] for row in launched if row["error"] is not None]
        largest = f"largest error {max(errors):.1e}" if errors else ""
        failed = word in ("dead", "wrong")
        problem = "{op} {shape} {dtype} {mode}: {problem}".format(**by_verdict[word][0]) if failed else ""
        lines.append(f"{word:<12} {name:<42} {times:<24} tests {tested:<8} {largest:<22} {problem}".rstrip())
    return lines


def status(folder: Path) -> int:
    """Prints `kernels` for every GPU that has rows in a folder, and for the GPU of this machine. Returns 0."""
    saved = rows.load(folder) if folder.exists() else []
    gpus = sorted({row["gpu"] for row in saved if row.get("gpu")} | {here for here in (machine.gpu(),) if here})
    for gpu in gpus or ["(no GPU yet)"]:
        print("\n".join([gpu, *kernels([row for row in saved if row.get("gpu") == gpu], launches.catalogue())]))
    return 0
