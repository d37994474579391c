"""Runs a case: every provider is first compared with float64, then timed in turns with the others.

What is going on is told while it goes on: the process that waits for the results may have to say what this one died of.
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
from benchmarks.harness.compare import Checked, compare, verdict
from benchmarks.harness.rows import Row, now
from benchmarks.harness.session import OUT_OF_MEMORY, Session
from benchmarks.harness.timing import Samples

# Otherwise torch.compile frees what the backward alone, run many times over one forward, reads again.
functorch_config.donated_buffer = False

TURNS = 5  # a provider's samples are spread over as many turns, so that a disturbance meets all of them


def went_wrong(row: Row) -> bool:
    """Whether a run with this row must fail: a wrong result, of whatever provider, or fastgen itself did not run."""
    own = row["provider"] in ("fastgen", f"fastgen, {INTERPRETED}")
    return row["verdict"] == "wrong" or (own and row["verdict"] == "dead" and OUT_OF_MEMORY not in row["problem"])


def prepare(case: Case, call: Callable, mode: str, inputs: dict[str, Any]) -> Callable[[], Any]:
    """The call that is timed. For "bwd" it runs the forward now and keeps its graph."""
    if mode == "fwd":

        def evaluation() -> Any:
            with torch.no_grad():
                return call(**inputs)

        return evaluation
    variables = leaves(inputs)
    outputs = as_tuple(call(**inputs))
    seeds = cotangents(outputs)
    if mode == "bwd":
        return lambda: gradients(outputs, variables, seeds, retain=True)
    return lambda: gradients(as_tuple(call(**inputs)), variables, seeds)


def measure(case: Case, session: Session) -> list[Row]:
    """Rows of all providers and modes of a case, each told as soon as it is whole.

    Raises:
        DeviceLost: the GPU answers nothing more in this process.
    """
    if "torch._inductor.compile_fx" in sys.modules:  # else nothing was compiled, and this would import it
        torch._dynamo.reset()
    gc.collect()
    torch.manual_seed(0)
    if session.device.type == "cuda":
        machine.allow_tf32(case.tf32)
    with session.doing(None) as problems:
        inputs = case.inputs(session.device)
    gate = {name: Checked(problems[0]) for name in case.providers} if problems else compare(case, inputs, session)
    rows = []
    for mode in case.modes:
        names = [name for name in case.providers if mode in case.timed_modes(name)]
        mode_rows = {name: empty_row(case, session, name, mode, gate[name]) for name in names}
        if session.timing:
            timed = {n: row for n, row in mode_rows.items() if not row["problem"] and INTERPRETED not in n}
            _time(case, session, mode, inputs if timed else {}, timed)
            power = machine.power_state(session.device)  # right after the work, not idle
        base = mode_rows[case.baseline]["ms_p50"] if case.baseline in mode_rows else None
        for row in mode_rows.values():
            row["times_baseline"] = row["ms_p50"] / base if base and row["ms_p50"] else None
            row["power"] = power if session.timing else {}
            row["verdict"] = verdict(row["error"], row["problem"])
            session.tell("row", row)
        rows += list(mode_rows.values())
    return rows


def empty_row(case: Case, session: Session, name: str, mode: str, checked: Checked) -> Row:
    cuda = session.device.type == "cuda"
    threads = None if cuda else session.threads
    modules = [launches.catalogue().get(kernel) for kernel in checked.launched]
    kernels = machine.sources(dict.fromkeys(module for module in modules if module))
    rates = session.rates.get(threads, {})
    return {
        "op": case.op,
        "kernels": kernels,
        "launched": sorted(set(checked.launched)),
        "died_in": checked.launched[-1] if checked.launched and verdict(None, checked.problem) == "dead" else None,
        "shape": case.shape,
        "dtype": name_of(case.dtype),
        "provider": name,
        "mode": mode,
        **Samples().figures(),
        "host_us": None,
        "peak_mb": None,
        "error": checked.error,
        "verdict": verdict(checked.error, checked.problem),
        "problem": checked.problem,
        "first_call_s": checked.first_call_s,
        "warmup_s": None,
        "graph_problem": None,
        "landmark": name in case.not_compared,
        "share": case.share.get(name),
        "us_a_part": None,
        "baseline": case.baseline,
        "times_baseline": None,
        "bytes": case.bytes.get(mode),
        "flops": case.flops.get(mode),
        "copy_fraction": None,
        "matmul_fraction": None,
        "copy_gb_s": rates.get("copy"),
        "matmul_tflop_s": rates.get(name_of(case.dtype)),
        "batch": case.batch,
        "threads": threads,
        "tf32": case.tf32 if cuda else None,
        **session.facts,
        "kernel_sha256": machine.kernel_sha256(kernels),
        "power": {},
        "time": now(),
        "command": session.command,
    }


def plan(once: float, budget: float, long: float) -> tuple[int, int]:
    """Turns, and samples a turn, for a call of `once` seconds: at least three samples, one where it takes `long`."""
    if once > long:
        return 1, 1
    count = max(1, min(40, round(budget / max(once, 1e-6) / TURNS)))
    return (TURNS if count > 1 else 3), count


def _time(case: Case, session: Session, mode: str, inputs: dict[str, Any], rows: dict[str, Row]) -> None:
    """Warms every provider up, then samples them in turns; fills their rows in."""
    plans: dict[str, tuple[int, int]] = {}
    samples = {name: Samples() for name in rows}
    for name, row in rows.items():
        with session.doing(name) as problems:
            once = _warm_up(session, prepare(case, case.providers[name], mode, inputs), row)
            plans[name] = plan(once, session.budget, session.clock.LONG)
        row["problem"] = "".join(problems)
    for turn in range(TURNS):
        for name, (turns, count) in plans.items():
            if turn >= turns or rows[name]["problem"]:
                continue
            with session.doing(name) as problems:
                _sample(session, prepare(case, case.providers[name], mode, inputs), count, samples[name])
                if turn == 0 and count > 1 and not replays_graphs(name):
                    make = functools.partial(prepare, case, case.providers[name], mode, inputs)
                    rows[name]["graph_problem"] = session.clock.graph(make, samples[name]) or None
            rows[name]["problem"] = "".join(problems)
    for name in plans:
        if not rows[name]["problem"]:
            rows[name].update(samples[name].figures())
            _derive(rows[name], case.parts)
            rows[name].update(case.about(name, inputs))


def _warm_up(session: Session, call: Callable[[], Any], row: Row) -> float:
    """Seconds of a call after the first, which may compile. What is slow even so is not run once more for it."""
    row["warmup_s"] = once = session.clock.once(call)
    if once < session.clock.LONG:
        once, memory = session.clock.once_with_memory(call)
        row["peak_mb"] = None if replays_graphs(row["provider"]) else memory
    return once


def _sample(session: Session, call: Callable[[], Any], count: int, samples: Samples) -> None:
    if count > 1:
        session.clock.once(call)
    session.clock.turn(call, count, samples)


def _derive(row: Row, parts: int | None) -> None:
    """What follows from the times: those of the whole work, of one part, and which part of the measured copy bandwidth
    and matmul rate the floor's bytes and operations in this time are."""
    if row["share"]:
        for name in [name for name in row if "ms_p" in name and row[name] is not None]:
            row[name] /= row["share"]
    best = row.get("graph_ms_p50") or row["ms_p50"]
    row["us_a_part"] = 1e3 * best / parts if parts else None
    seconds = row["ms_p50"] / 1e3
    for name, work, rate, unit in (
        ("copy_fraction", "bytes", "copy_gb_s", 1e9),
        ("matmul_fraction", "flops", "matmul_tflop_s", 1e12),
    ):
        row[name] = row[work] / seconds / (row[rate] * unit) if row[work] and row[rate] and seconds else None
