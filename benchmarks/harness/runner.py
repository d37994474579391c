"""Runs a case: compares every provider with float64, then times all of them in alternation.

Progress is reported through `session.tell`, so that the parent process knows what this one was doing if it dies.
"""

import functools
import gc
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config as functorch_config

from benchmarks.harness import launches, machine
from benchmarks.harness.case import INTERPRETED, Case, as_tuple, cotangents, gradients, leaves, name_of, replays_graphs
from benchmarks.harness.compare import Checked, compare
from benchmarks.harness.rows import Row, now
from benchmarks.harness.session import OUT_OF_MEMORY, Session
from benchmarks.harness.timing import Samples

# Otherwise torch.compile frees buffers that the mode "bwd", which repeats the backward over one forward, reads again.
functorch_config.donated_buffer = False

TURNS = 5  # the samples of a provider are spread over this many turns, so that a disturbance affects all providers
UNKNOWN = (  # fields of a row that stay None without times
    *("ms_p20", "ms_p50", "ms_p80", "host_us", "peak_mb", "warmup_s", "graph_problem", "times_baseline"),
    *("copy_fraction", "matmul_fraction"),
)


def verdict(error: float | None, problem: str) -> str | None:
    """ "correct", "wrong", "dead" (no result), or None if nothing was compared."""
    if problem:
        return "wrong" if problem.startswith("wrong") else "dead"
    return None if error is None else "correct"


def went_wrong(row: Row) -> bool:
    """Whether a run with this row fails: the result of any provider is wrong, or fastgen itself has no result for a
    reason other than memory."""
    is_fastgen = row["provider"] in ("fastgen", f"fastgen, {INTERPRETED}")
    died = row["verdict"] == "dead" and OUT_OF_MEMORY not in row["problem"]
    return row["verdict"] == "wrong" or (is_fastgen and died)


def prepare(case: Case, call: Callable, mode: str, inputs: dict[str, Any]) -> Callable[[], Any]:
    """The function that is timed. For "bwd", `prepare` runs the forward and keeps its graph."""
    if mode == "fwd":
        return torch.no_grad()(functools.partial(call, **inputs))
    variables = leaves(inputs)
    outputs = as_tuple(call(**inputs))
    seeds = cotangents(outputs)
    if mode == "bwd":
        return lambda: gradients(outputs, variables, seeds, retain=True)
    return lambda: gradients(as_tuple(call(**inputs)), variables, seeds)


def measure(case: Case, session: Session) -> list[Row]:
    """Measures all providers and modes of a case. Returns the rows, and tells each as soon as it is complete.

    Raises:
        DeviceLost: this process can no longer use the GPU.
    """
    if "torch._inductor.compile_fx" in sys.modules:  # otherwise nothing was compiled, and reset would import it
        torch._dynamo.reset()
    gc.collect()
    torch.manual_seed(0)
    if case.threads:
        torch.set_num_threads(case.threads)
    if session.device.type == "cuda":
        machine.allow_tf32(case.tf32)
    with session.doing(case, None) as problems:
        inputs = case.inputs(session.device)
    gate = {name: Checked(problems[0]) for name in case.providers} if problems else compare(case, inputs, session)
    rows = []
    for mode in case.modes:
        names = [name for name in case.providers if mode in case.timed_modes(name)]
        rows_of_mode = {name: empty_row(case, session, name, mode, gate[name]) for name in names}
        timed = {n: row for n, row in rows_of_mode.items() if not row["problem"] and INTERPRETED not in n}
        if session.timing and case.timed:
            _time(case, session, mode, inputs if timed else {}, timed)
        power = machine.power_state(session.device) if session.timing else {}  # read right after the work
        base = rows_of_mode[case.baseline]["ms_p50"] if case.baseline in rows_of_mode else None
        for row in rows_of_mode.values():
            row["times_baseline"] = row["ms_p50"] / base if base and row["ms_p50"] else None
            row |= {"power": power, "verdict": verdict(row["error"], row["problem"])}
            session.tell("row", row)
        rows += list(rows_of_mode.values())
    return rows


def empty_row(case: Case, session: Session, name: str, mode: str, checked: Checked) -> Row:
    """A row without times."""
    cuda = session.device.type == "cuda"
    threads = None if cuda else case.threads or torch.get_num_threads()
    known = launches.catalogue() if checked.launched else {}
    kernels = sorted({known[kernel] for kernel in checked.launched if kernel in known})
    rates = session.rates.get(threads, {})
    word = verdict(checked.error, checked.problem)
    return {
        "op": case.op,
        "kernels": kernels,
        "launched": sorted(set(checked.launched)),
        "died_in": checked.launched[-1] if checked.launched and word == "dead" else None,
        "shape": case.shape,
        "dtype": name_of(case.dtype),
        "provider": name,
        "mode": mode,
        **dict.fromkeys(UNKNOWN),
        "samples": 0,
        "error": checked.error,
        "verdict": word,
        "problem": checked.problem,
        "first_call_s": checked.first_call_s,
        "landmark": name in case.landmarks,
        "share": case.share.get(name),
        "baseline": case.baseline,
        "bytes": case.in_mode(case.bytes, mode),
        "flops": case.in_mode(case.flops, mode),
        "copy_gb_s": rates.get("copy"),
        "matmul_tflop_s": rates.get(name_of(case.dtype)),
        "batch": case.batch,
        "threads": threads,
        "tf32": case.tf32 if cuda else None,
        **session.facts,
        "kernel_sha256": machine.kernel_sha256(kernels),
        "time": now(),
        "command": session.command,
    }


def plan(once: float, budget: float, long: float) -> tuple[int, int]:
    """The number of turns, and of samples in a turn, for a call that takes `once` seconds: at least three samples in
    all, about `budget` seconds; a single one if the call takes more than `long` seconds."""
    if once > long:
        return 1, 1
    count = max(1, min(40, round(budget / max(once, 1e-6) / TURNS)))
    return (TURNS if count > 1 else 3), count


def _time(case: Case, session: Session, mode: str, inputs: dict[str, Any], rows: dict[str, Row]) -> None:
    """Samples the providers in turns and fills their rows in. The first turn of a provider also warms it up."""
    clock, plans = session.clock, dict[str, tuple[int, int]]()
    samples = {name: Samples() for name in rows}
    for turn in range(TURNS):
        for name, row in rows.items():
            if row["problem"] or turn >= plans.get(name, (TURNS, 0))[0]:
                continue
            make = functools.partial(prepare, case, case.providers[name], mode, inputs)
            with session.doing(case, name) as problems:
                call = make()
                if turn == 0:
                    # The first call may compile. A second call measures the memory, unless the first one took too long.
                    row["warmup_s"] = once = clock.once(call)[0]
                    if once < clock.LONG:
                        once, memory = clock.once(call)
                        row["peak_mb"] = None if replays_graphs(name) else memory
                    plans[name] = plan(once, session.budget, clock.LONG)
                count = plans[name][1]
                if count > 1:
                    clock.once(call)
                clock.turn(call, count, samples[name])
                del call  # frees the graph of the forward that "bwd" keeps
                if turn == 0 and count > 1 and not replays_graphs(name):
                    row["graph_problem"] = clock.graph(make, samples[name]) or None
            row["problem"] = "".join(problems)
    for name, row in rows.items():
        if not row["problem"]:
            row.update(samples[name].figures(case.share.get(name, 1)))
            row.update(_floor_fractions(row))
            row.update(case.about(name, inputs))


def _floor_fractions(row: Row) -> Row:
    """The least bytes and operations divided by the time, as fractions of the measured copy and matmul rates."""

    def fraction(work: int | None, rate: float | None) -> float | None:
        return work / (row["ms_p50"] / 1e3) / rate if work and rate and row["ms_p50"] else None

    copy_rate, matmul_rate = 1e9 * (row["copy_gb_s"] or 0), 1e12 * (row["matmul_tflop_s"] or 0)
    return {"copy_fraction": fraction(row["bytes"], copy_rate), "matmul_fraction": fraction(row["flops"], matmul_rate)}
