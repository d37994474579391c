"""The gate before any time is taken: is a provider's result that of float64?"""

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

# The largest error of one output or gradient that can pass. In half precision, a gradient that nearly cancels loses
# much of itself: up to 0.2 was seen in plain PyTorch.
LIMIT = {torch.float64: 0.1, torch.float32: 0.1, torch.bfloat16: 0.5, torch.float16: 0.5}


def relative_error(actual: Tensor | None, expected: Tensor | None) -> float:
    """Largest difference over the largest expected size; a missing gradient counts as zeros."""
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
    """Outputs of the call and, where gradients are timed, the gradients of all leaves."""
    variables = leaves(inputs) if case.modes != ("fwd",) else []
    with torch.set_grad_enabled(bool(variables)):
        outputs = as_tuple(call(**inputs))
    return [*outputs, *(gradients(outputs, variables, cotangents(outputs)) if variables else ())]


@dataclass
class Checked:
    """The result of a provider's comparison with float64; first_call_s contains its compilation and autotuning."""

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
        beyond = [(error, most) for error, most in zip(errors, allowed, strict=True) if not error <= most]
        wrong = "wrong: error {:.2g}, allowed {:.2g}".format(*max(beyond)) if beyond else ""
        error = max(errors)
        results[name] = Checked(wrong, error if math.isfinite(error) else None, seconds, launched)
    return results
