"""Compares the results of providers with float64, before any time is measured."""

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import launches
from benchmarks.harness.case import Case, as_tuple, cotangents, gradients, in_float64, leaves
from benchmarks.harness.session import Session

# The largest relative error of an output or gradient that can pass. In half precision, sums that nearly cancel have
# large relative errors: up to 0.2 was seen in gradients of plain PyTorch.
LIMIT = {torch.float64: 0.1, torch.float32: 0.1, torch.bfloat16: 0.5, torch.float16: 0.5}


def relative_error(actual: Tensor | None, expected: Tensor | None) -> float:
    """The largest absolute difference divided by the largest absolute expected value. A missing gradient counts as
    zeros."""
    if expected is None:
        return 0.0 if actual is None else math.inf
    expected = expected.detach().double()
    actual = torch.zeros_like(expected) if actual is None else actual.detach().double()
    if actual.shape != expected.shape:
        return math.inf
    if expected.numel() == 0:
        return 0.0
    error = ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
    return error if math.isfinite(error) else math.inf


def evaluate(case: Case, call: Callable, inputs: dict[str, Any]) -> list[Tensor | None]:
    """The outputs of the call and, if the case has a mode with a backward, the gradients of all leaves."""
    variables = leaves(inputs) if case.modes != ("fwd",) else []
    with torch.set_grad_enabled(bool(variables)):
        outputs = as_tuple(call(**inputs))
    return [*outputs, *(gradients(outputs, variables, cotangents(outputs)) if variables else ())]


@dataclass
class Checked:
    """The result of comparing a provider with float64.

    Attributes:
        problem: why there is no right result; "" if there is one.
        error: the largest relative error over outputs and gradients; None if nothing was compared.
        first_call_s: seconds of the first call, including compilation and autotuning.
        launched: names of the kernels of fastgen, one for each launch.
    """

    problem: str = ""
    error: float | None = None
    first_call_s: float | None = None
    launched: list[str] = field(default_factory=list)


def compare(case: Case, inputs: dict[str, Any], session: Session) -> dict[str, Checked]:
    """Compares each provider with float64 and returns the results by name. A provider with a problem is not timed.

    Each output and each gradient may have four times the error of the baseline in this dtype, and at least eight
    roundings, but at most LIMIT. An exact case allows no error.
    """
    results = {name: Checked() for name in case.providers}
    if case.truth is None:
        return results
    inputs = {**inputs, **case.given(inputs)}
    with session.doing(case, None) as problems:
        expected = evaluate(case, case.truth, inputs if case.exact else in_float64(inputs))
    if problems:
        return {name: Checked(f"no truth to compare with: {problems[0]}") for name in case.providers}
    rounding = 0.0 if case.exact else 8 * torch.finfo(case.dtype).eps
    known = case.baseline in case.providers or case.exact
    allowed = [rounding if known else LIMIT[case.dtype]] * len(expected)
    for name, call in case.providers.items():
        if name in case.landmarks or case.share.get(name, 1) < 1:
            continue
        start = time.perf_counter()
        with (
            session.doing(case, name) as problems,
            launches.recorded(functools.partial(session.tell, "kernel")) as launched,
        ):
            actual = evaluate(case, call, inputs)
            errors = [relative_error(a, b) for a, b in zip(actual, expected, strict=True)]
            del actual
        if problems:
            results[name] = Checked(problems[0], launched=launched)
            continue
        seconds = time.perf_counter() - start
        if name == case.baseline and not case.exact:
            allowed = [min(LIMIT[case.dtype], max(rounding, 4 * error)) for error in errors]
        too_large = [(error, limit) for error, limit in zip(errors, allowed, strict=True) if not error <= limit]
        wrong = "wrong: error {:.2g}, allowed {:.2g}".format(*max(too_large)) if too_large else ""
        error = max(errors)
        results[name] = Checked(wrong, error if math.isfinite(error) else None, seconds, launched)
    return results
