"""Runs a case: every provider is first compared with float64, then timed in turns with the others.

What is going on is told while it goes on: the process that waits for the results may have to say what this one died of.
"""

import contextlib
import functools
import gc
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import Tensor

from benchmarks.harness import launches, machine
from benchmarks.harness.case import (
    INTERPRETED,
    Case,
    as_tuple,
    cotangents,
    gradients,
    in_float64,
    leaves,
    name_of,
    replays_graphs,
)
from benchmarks.harness.rows import Row, now
from benchmarks.harness.timing import CpuTimer, CudaTimer, Samples, timer

# Otherwise torch.compile frees what the backward alone, run many times over one forward, reads again.
functorch_config.donated_buffer = False

TURNS = 5  # a provider's samples are spread over as many turns, so that a disturbance meets all of them
OUT_OF_MEMORY = "out of memory"
# The largest error of one output or gradient that can pass. In half precision, a gradient that nearly cancels loses
# much of itself: up to 0.2 was seen in plain PyTorch.
LIMIT = {torch.float64: 0.1, torch.float32: 0.1, torch.bfloat16: 0.5, torch.float16: 0.5}


class DeviceLost(Exception):
    """The GPU answers nothing more in this process; the text is the failure after which it did not."""


@dataclass
class Session:
    """One run on one device.

    Attributes:
        facts: what every row says of the machine, `machine.facts`.
        command: that was given.
        budget: seconds of samples for one provider in one mode.
        timing: False: only compare, take no time.
        threads: of the CPU.
        rates: of `timing.rates`, by number of threads (None on a GPU); empty where they were not measured.
        tell: is told ("doing", provider), ("kernel", name) before a launch, ("log", text), and ("row", row).
    """

    facts: dict[str, Any]
    command: str
    budget: float = 0.1
    timing: bool = True
    threads: int = field(default_factory=torch.get_num_threads)
    rates: dict[int | None, dict[str, float]] = field(default_factory=dict)
    tell: Callable[[str, Any], Any] = lambda kind, value: None

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.facts["gpu"] else "cpu")

    @functools.cached_property
    def clock(self) -> CpuTimer | CudaTimer:
        return timer(self.device)

    @contextlib.contextmanager
    def doing(self, provider: str | None) -> Iterator[list[str]]:
        """Whatever goes wrong inside is the provider's (None: of the whole case) problem; the list gets its text.

        Raises:
            DeviceLost: nothing more can be done in this process.
        """
        problems: list[str] = []
        self.tell("doing", provider)
        try:
            yield problems
        except Exception as error:  # a rival may fail in any way: that is a row, not the end of the run
            problems.append(failure(error))
            self.tell("log", traceback.format_exc())
            del error
            gc.collect()  # what the frames of the failure held
            if machine.lost(self.device):
                raise DeviceLost(problems[0]) from None


def relative_error(found: Tensor | None, expected: Tensor | None) -> float:
    """Largest difference over the largest expected size; a missing gradient counts as zeros."""
    if expected is None:
        return 0.0 if found is None else math.inf
    expected = expected.detach().double()
    found = torch.zeros_like(expected) if found is None else found.detach().double()
    if found.shape != expected.shape:
        return math.inf
    if expected.numel() == 0:
        return 0.0
    error = ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
    return error if math.isfinite(error) else math.inf


def evaluate(case: Case, call: Callable, inputs: dict[str, Any]) -> list[Tensor | None]:
    """Outputs of the call and, where gradients are timed, the gradients of all leaves."""
    variables = leaves(inputs) if case.modes != ("fwd",) else []
    with torch.set_grad_enabled(bool(variables)):
        outputs = as_tuple(call(**inputs))
    if not variables:
        return list(outputs)
    return [*outputs, *gradients(outputs, variables, cotangents(outputs))]


def failure(error: BaseException) -> str:
    """A line for the row; running out of memory is a result of its own."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "not enough memory" in text:
        return OUT_OF_MEMORY
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}"[:300]


def verdict(error: float | None, problem: str) -> str | None:
    """ "correct", "wrong", "dead" (no result), or None where nothing was compared."""
    if problem:
        return "wrong" if problem.startswith("wrong") else "dead"
    return None if error is None else "correct"


def went_wrong(row: Row) -> bool:
    """Whether a run with this row must fail: a wrong result, of whatever provider, or fastgen itself did not run."""
    own = row["provider"] in ("fastgen", f"fastgen, {INTERPRETED}")
    return row["verdict"] == "wrong" or (own and row["verdict"] == "dead" and OUT_OF_MEMORY not in row["problem"])


@dataclass
class Checked:
    """What came of a provider's comparison with float64; first_call_s contains its compilation and autotuning."""

    problem: str = ""
    error: float | None = None
    first_call_s: float | None = None
    launched: list[str] = field(default_factory=list)  # kernels of fastgen, by name, one a launch


def compare(case: Case, inputs: dict[str, Any], session: Session) -> dict[str, Checked]:
    """The gate: provider -> what came of it. A provider with a problem is not timed.

    The error is the largest over outputs and gradients, relative to the largest value of each. Allowed in each are
    four times what the baseline loses there in this dtype, and at least eight roundings; nothing where the case is
    exact. More than LIMIT is wrong whatever the baseline loses.
    """
    results = {name: Checked() for name in case.providers}
    if case.truth is None:
        return results
    inputs = {**inputs, **case.given(inputs)}
    with session.doing(None) as problems:
        expected = evaluate(case, case.truth, inputs if case.exact else in_float64(inputs))
    if problems:
        return {name: Checked(f"no truth to compare with: {problems[0]}") for name in case.providers}
    rounding = 0.0 if case.exact else 8 * torch.finfo(case.dtype).eps
    lossy = case.baseline in case.providers or case.exact
    allowed = [rounding if lossy else LIMIT[case.dtype]] * len(expected)
    for name, call in case.providers.items():
        if name in case.not_compared | case.inexact:
            continue
        start = time.perf_counter()
        with session.doing(name) as problems, launches.recorded(functools.partial(session.tell, "kernel")) as launched:
            found = evaluate(case, call, inputs)
            errors = [relative_error(a, b) for a, b in zip(found, expected, strict=True)]
            del found
        if problems:
            results[name] = Checked(problems[0], launched=launched)
            continue
        seconds = time.perf_counter() - start
        if name == case.baseline and not case.exact:
            allowed = [min(LIMIT[case.dtype], max(rounding, 4 * error)) for error in errors]
        beyond = [(error, most) for error, most in zip(errors, allowed, strict=True) if not error <= most]
        wrong = "wrong: error {:.2g}, allowed {:.2g}".format(*max(beyond)) if beyond else ""
        error = max(errors)
        results[name] = Checked(wrong, error if math.isfinite(error) else None, seconds, launched)
    return results


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
