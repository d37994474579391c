"""Runs a case: every provider is first compared with float64, then timed in turns with the others."""

import contextlib
import functools
import gc
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import Tensor

from benchmarks import launches, machine
from benchmarks.case import INTERPRETED, Case, as_tuple, cotangents, gradients, in_float64, leaves, replays_graphs
from benchmarks.rows import Row, now
from benchmarks.timing import CpuTimer, CudaTimer, Samples, copy_rate, matmul_rate, timer

# Otherwise torch.compile frees what the backward alone, run many times over one forward, reads again.
functorch_config.donated_buffer = False

TURNS = 5  # a provider's samples are spread over as many turns, so that a disturbance meets all of them
OUT_OF_MEMORY = "out of memory"
NO_TIME = "no time was left"  # such rows are not saved
# The largest error of one output or gradient that can pass. In half precision, a gradient that nearly cancels loses
# much of itself: up to 0.2 was seen in plain PyTorch.
LIMIT = {torch.float64: 0.1, torch.float32: 0.1, torch.bfloat16: 0.5, torch.float16: 0.5}


@dataclass
class Session:
    """One run on one device: the timer, how long to measure, and the rates measured for it.

    On a GPU all float32 products, of convolutions and of matrices, of rivals and of fastgen, are allowed TF32: one
    setting, as the rows say.
    """

    device: torch.device
    command: str
    budget: float  # seconds of samples for one provider in one mode
    timing: bool = True  # False: only compare, take no time
    patience: float = 600.0  # seconds that a call may compile and search for configurations
    end: float = math.inf  # of time.perf_counter(): nothing compiles after it

    def __post_init__(self) -> None:
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
            torch.backends.cudnn.allow_tf32 = True
        self.clock: CpuTimer | CudaTimer = timer(self.device)
        self._rates: dict[Any, float] = {}

    def rates(self, dtype: torch.dtype, threads: int) -> dict[str, float | None]:
        """Copy bandwidth and matmul rate, measured once a run for each dtype and number of threads."""
        if not self.timing:
            return {"copy_gb_s": None, "matmul_tflop_s": None}
        if threads not in self._rates:
            self._rates[threads] = copy_rate(self.clock)
        if (dtype, threads) not in self._rates:
            self._rates[dtype, threads] = matmul_rate(self.clock, dtype)
        return {"copy_gb_s": self._rates[threads], "matmul_tflop_s": self._rates[dtype, threads]}

    @contextlib.contextmanager
    def patiently(self) -> Iterator[None]:
        """A call that may compile for long: ends it after some time (where the system has such signals).

        Raises:
            TimeoutError: the time is over. Its text says which: this call's, or that of the whole run.
        """
        left = self.end - time.perf_counter()
        seconds, problem = self.patience, f"no result within {self.patience:.0f} s"
        if left < seconds:
            seconds, problem = left, NO_TIME
        if seconds <= 0:
            raise TimeoutError(problem)

        def over(*signal_and_frame: Any) -> None:
            raise TimeoutError(problem)

        if not hasattr(signal, "SIGALRM"):
            yield
            return
        before = signal.signal(signal.SIGALRM, over)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


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
    for late in (NO_TIME, "no result within"):
        if late in text:  # the compiler wraps what ends it
            return text[text.index(late) :].partition("\n")[0]
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}"[:300]


def went_wrong(row: Row) -> bool:
    """Whether a run with this row must fail: a wrong result, of whatever provider, or fastgen itself did not run."""
    problem = row["problem"]
    own = row["provider"] in ("fastgen", f"fastgen, {INTERPRETED}")
    return problem.startswith("wrong") or (
        own and bool(problem) and OUT_OF_MEMORY not in problem and problem != NO_TIME
    )


@dataclass
class Checked:
    """What came of a provider's comparison with float64; first_call_s contains its compilation and autotuning."""

    problem: str = ""
    error: float | None = None
    first_call_s: float | None = None
    launched: list[str] = field(default_factory=list)  # kernels of fastgen, by name


def compare(case: Case, inputs: dict[str, Any], session: Session) -> dict[str, Checked]:
    """The gate: provider -> what came of it. A provider with a problem is not timed.

    The error is the largest over outputs and gradients, relative to the largest value of each. Allowed in each are
    four times what the baseline loses there in this dtype, and at least eight roundings; nothing where the case is
    exact. More than LIMIT is wrong whatever the baseline loses.
    """
    results: dict[str, Checked] = {}
    inputs = {**inputs, **case.given(inputs)}
    try:
        expected = evaluate(case, case.truth, inputs if case.exact else in_float64(inputs)) if case.truth else None
    except RuntimeError as problem:
        return {name: Checked(f"no truth to compare with: {failure(problem)}") for name in case.providers}
    rounding = 0.0 if case.exact else 8 * torch.finfo(case.dtype).eps
    allowed = [rounding] * len(expected or [])
    for name, call in case.providers.items():
        if expected is None or name in case.not_compared | case.inexact:
            results[name] = Checked()
            continue
        start = time.perf_counter()
        try:
            with session.patiently(), launches.recorded() as launched:
                found = evaluate(case, call, inputs)
            errors = [relative_error(a, b) for a, b in zip(found, expected, strict=True)]
        except Exception as problem:  # a rival may fail in any way: that is a row, not the end of the run
            results[name] = Checked(failure(problem))
            continue
        seconds = time.perf_counter() - start
        if name == case.baseline and not case.exact:
            allowed = [min(LIMIT[case.dtype], max(rounding, 4 * error)) for error in errors]
        beyond = [(error, most) for error, most in zip(errors, allowed, strict=True) if not error <= most]
        wrong = "wrong: error {:.2g}, allowed {:.2g}".format(*max(beyond)) if beyond else ""
        error = max(errors)
        results[name] = Checked(wrong, error if math.isfinite(error) else None, seconds, sorted(launched))
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
    """Rows of all providers and modes of a case."""
    torch._dynamo.reset()
    gc.collect()
    torch.manual_seed(0)
    try:
        inputs = case.inputs(session.device)
        gate = compare(case, inputs, session)
    except Exception as error:
        gate = {name: Checked(failure(error)) for name in case.providers}
    rows = []
    for mode in case.modes:
        names = [name for name in case.providers if mode in case.timed_modes(name)]
        mode_rows = {name: _row(case, session, name, mode, gate[name]) for name in names}
        timed = [
            name for name, row in mode_rows.items() if session.timing and not row["problem"] and INTERPRETED not in name
        ]
        _time(case, session, mode, inputs if timed else {}, {name: mode_rows[name] for name in timed})
        base = mode_rows[case.baseline]["ms_p50"]
        power = machine.power_state(session.device) if session.timing else {}  # right after the work, not idle
        for row in mode_rows.values():
            row["times_baseline"] = row["ms_p50"] / base if base and row["ms_p50"] else None
            row["power"] = power
        rows += list(mode_rows.values())
    return rows


def _row(case: Case, session: Session, name: str, mode: str, checked: Checked) -> Row:
    threads = torch.get_num_threads()
    cuda = session.device.type == "cuda"
    runs_kernel = name.startswith("fastgen") and (cuda or INTERPRETED in name)
    kernels = machine.sources(case.kernels) if runs_kernel else []
    return {
        "op": case.op,
        "kernels": kernels,
        "launched": checked.launched,
        "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
        "provider": name,
        "mode": mode,
        **Samples().figures(),
        "peak_mb": None,
        "error": checked.error,
        "problem": checked.problem,
        "first_call_s": checked.first_call_s,
        "warmup_s": None,
        "graph_problem": None,
        "landmark": name in case.not_compared,
        "baseline": case.baseline,
        "times_baseline": None,
        "bytes": case.bytes.get(mode),
        "flops": case.flops.get(mode),
        "copy_fraction": None,
        "matmul_fraction": None,
        **session.rates(case.dtype, threads),
        "batch": case.batch,
        "threads": None if cuda else threads,
        **machine.environment(session.device),
        "kernel_sha256": machine.kernel_sha256(kernels),
        "source_sha256": machine.source_sha256(),
        "power": {},
        "time": now(),
        "command": session.command,
    }


@contextlib.contextmanager
def _reported(row: Row) -> Iterator[None]:
    """What goes wrong inside is the row's problem, and the run goes on."""
    try:
        yield
    except Exception as error:
        row["problem"] = failure(error)
        del error
        gc.collect()  # what the frames of the failure held


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
        with _reported(row):
            with session.patiently():
                once = _warm_up(session, prepare(case, case.providers[name], mode, inputs), row)
            plans[name] = plan(once, session.budget, session.clock.LONG)
    for turn in range(TURNS):
        for name, (turns, count) in plans.items():
            if turn >= turns or rows[name]["problem"]:
                continue
            with _reported(rows[name]):
                _sample(session, prepare(case, case.providers[name], mode, inputs), count, samples[name])
                if turn == 0 and count > 1 and not replays_graphs(name):
                    make = functools.partial(prepare, case, case.providers[name], mode, inputs)
                    rows[name]["graph_problem"] = session.clock.graph(make, samples[name]) or None
    for name in plans:
        if not rows[name]["problem"]:
            rows[name].update(samples[name].figures())
            _fractions(rows[name])


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


def _fractions(row: Row) -> None:
    """Which part of the measured copy bandwidth and matmul rate the floor's bytes and operations in this time are."""
    seconds = (row["ms_p50"] or 0) / 1e3
    for name, work, rate, unit in (
        ("copy_fraction", "bytes", "copy_gb_s", 1e9),
        ("matmul_fraction", "flops", "matmul_tflop_s", 1e12),
    ):
        row[name] = row[work] / seconds / (row[rate] * unit) if row[work] and row[rate] and seconds else None
