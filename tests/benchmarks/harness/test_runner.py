"""Rows of a case: comparison before timing, failures as rows, timing on a CPU and on a pretended GPU."""

import json
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import cases
from benchmarks.harness import machine, report, runner, timing
from benchmarks.harness.case import Case, leaves
from benchmarks.harness.compare import compare, relative_error
from benchmarks.harness.runner import measure, plan
from benchmarks.harness.session import DeviceLost, Session
from benchmarks.harness.timing import CpuTimer, Samples, quantile
from tests.benchmarks.square import case, out_of_memory, square

FIELDS = {
    "op",
    "kernels",
    "shape",
    "dtype",
    "provider",
    "mode",
    "ms_p20",
    "ms_p50",
    "ms_p80",
    "peak_mb",
    "error",
    "gpu",
}
FIELDS |= {"driver", "cuda", "torch", "triton", "commit", "kernel_sha256", "time", "command", "host_us", "verdict"}


@pytest.fixture
def session():
    rates = {torch.get_num_threads(): {"copy": 10.0, "float32": 1.0}}
    return Session(machine.facts("cpu"), "python -m benchmarks square", budget=0.002, rates=rates)


def test_a_row_is_complete_in_itself(session):
    rows = measure(case({"power": lambda x: x**2}), session)
    assert [(row["provider"], row["mode"]) for row in rows] == [
        (provider, mode) for mode in ("fwd", "bwd", "full") for provider in ("eager", "power")
    ]
    for row in rows:
        assert set(row) >= FIELDS
        assert not row["problem"] and row["error"] < 1e-6
        assert 0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
        assert row["gpu"] is None and row["kernels"] == [] and row["kernel_sha256"] is None
        json.dumps(row, allow_nan=False)
    assert rows[0]["times_baseline"] == 1
    assert rows[0]["copy_fraction"] == pytest.approx(64 / (rows[0]["ms_p50"] / 1e3) / 10e9)


def test_a_wrong_result_is_not_timed(session):
    def wrong_gradient(x):
        return x * x.detach()

    for provider in (lambda x: x * x * 1.001, wrong_gradient, lambda x: x[:4] ** 2, lambda x: x * float("nan")):
        row = next(row for row in measure(case({"rival": provider}), session) if row["provider"] == "rival")
        assert row["problem"].startswith("wrong") and row["ms_p50"] is None


def test_a_failure_is_a_row_and_the_run_goes_on(session):
    rows = {row["provider"]: row for row in measure(case({"large": out_of_memory, "power": lambda x: x**2}), session)}
    assert rows["large"]["problem"] == "out of memory" and rows["large"]["ms_p50"] is None
    assert not rows["power"]["problem"] and rows["power"]["ms_p50"] > 0


def test_out_of_memory_while_timed_is_a_row_too(session):
    calls = []

    def growing(x):
        calls.append(x)
        return square(x) if len(calls) == 1 else out_of_memory(x)

    rows = [row for row in measure(case({"growing": growing}), session) if row["provider"] == "growing"]
    assert [row["problem"] for row in rows] == ["out of memory"] * 3
    assert all(row["error"] is not None and row["ms_p50"] is None for row in rows)


def test_exact_cases_allow_no_difference(session):
    exact = case({"close": lambda x: x * x * (1 + 1e-7)}, exact=True, modes=("fwd",))
    checked = compare(exact, exact.inputs(torch.device("cpu")), session)
    assert not checked["eager"].problem and checked["close"].problem.startswith("wrong")


def test_half_precision_is_allowed_what_the_baseline_loses(session):
    half = Case(
        op="sum",
        shape="",
        dtype=torch.bfloat16,
        inputs=lambda device: {"x": torch.randn(1000).bfloat16().requires_grad_()},
        providers={"eager": lambda x: x.float().cumsum(0), "bad": lambda x: x.cumsum(0) * 1.1},
        truth=lambda x: x.cumsum(0),
    )
    checked = compare(half, half.inputs(torch.device("cpu")), session)
    assert not checked["eager"].problem and checked["bad"].problem.startswith("wrong")


def test_missing_gradients_count_as_zeros():
    assert relative_error(None, torch.zeros(3)) == 0
    assert relative_error(None, torch.ones(3)) == 1
    assert relative_error(torch.ones(3), None) == float("inf")


def test_parameters_of_modules_are_differentiated_once():
    layer = torch.nn.Linear(2, 2)
    twin = torch.nn.Linear(2, 2)
    twin.weight = layer.weight
    assert len(leaves({"a": layer, "b": twin, "x": torch.ones(2)})) == 3


def test_quantiles_and_plans():
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2 and quantile([1.0, 2.0], 0.2) == pytest.approx(1.2)
    turns, count = plan(1e-3, 1.0, 20.0)
    assert turns == runner.TURNS and turns * count == 200
    assert plan(1.0, 0.25, 20.0) == (3, 1) and plan(60.0, 1.0, 20.0) == (1, 1)


@pytest.mark.parametrize(("threads", "expected"), [(1, [2.0] * 4), (2, [2.0, 52.0] * 2)])
def test_one_thread_is_timed_by_the_processors_clock(threads, expected, monkeypatch):
    """The processor's clock does not run while another process does."""
    wall, cpu = [0.0], [0.0]
    waits = iter([0, 1, 0, 1])

    def sometimes_waiting():
        cpu[0] += 0.002
        wall[0] += 0.002 + 0.05 * next(waits)

    clock = SimpleNamespace(perf_counter=lambda: wall[0], process_time=lambda: cpu[0])
    monkeypatch.setattr(timing, "time", clock)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    samples = Samples()
    CpuTimer(torch.device("cpu")).turn(sometimes_waiting, 4, samples)
    assert samples["ms"] == pytest.approx(expected) and samples.figures()["cpu_ms_p50"] == pytest.approx(2.0)


def test_the_backward_alone_is_not_timed_in_graphs_of_the_compiler(session):
    rows = measure(case({"compiled reduce-overhead": square}), session)
    assert [row["mode"] for row in rows if row["provider"] != "eager"] == ["fwd", "full"]


def test_a_gradient_that_loses_much_is_held_to_what_the_baseline_loses_there(session):
    def of(rival):
        return Case(
            op="sums",
            shape="",
            dtype=torch.bfloat16,
            inputs=lambda device: {"x": torch.ones(4)},
            providers={"eager": lambda x: (x * 1.3, x), "rival": rival},
            truth=lambda x: (x, x),
        )

    for rival, right in (
        (lambda x: (x * 1.4, x), True),
        (lambda x: (x, x * 1.2), False),
        (lambda x: (x * 2, x), False),
    ):
        case = of(rival)
        checked = compare(case, case.inputs(torch.device("cpu")), session)
        assert not checked["eager"].problem and (checked["rival"].problem == "") is right


def test_kernels_are_seen_when_they_are_launched(session):
    pytest.importorskip("triton")
    (first, *_) = cases.load("reparameterize_kl", "toy", torch.device("cpu"))
    found = {row["provider"]: row["launched"] for row in measure(first, replace(session, timing=False))}
    assert found["eager"] == []
    assert found["fastgen, interpreted"] == ["reparameterize_kl_backward_kernel", "reparameterize_kl_forward_kernel"]


def test_a_kernel_that_raises_is_named(session):
    pytest.importorskip("triton")
    (first, *_) = cases.load("reparameterize_kl", "toy", torch.device("cpu"))
    kernel = first.providers["fastgen, interpreted"]

    def fails_after_its_launch(**inputs):
        kernel(**inputs)
        raise RuntimeError("CUDA error: misaligned address")

    broken = replace(first, providers={"eager": first.providers["eager"], "fastgen": fails_after_its_launch})
    rows = {row["provider"]: row for row in measure(broken, replace(session, timing=False))}
    assert rows["fastgen"]["died_in"] == "reparameterize_kl_forward_kernel" and rows["eager"]["died_in"] is None
    assert rows["fastgen"]["verdict"] == "dead" and rows["eager"]["verdict"] == "correct"


def busy(x):
    end = time.process_time() + 2e-3
    while time.process_time() < end:
        pass
    return square(x)


def test_a_part_of_the_work_is_scaled_to_the_whole_and_not_compared(session):
    def part(x):
        return 2 * busy(x)

    row = measure(case({"part": part}, share={"part": 0.01}, modes=("fwd",)), session)[1]
    assert row["share"] == 0.01 and row["ms_p50"] >= 200 and row["ms_p20"] >= 200
    assert row["error"] is None and not row["problem"] and "from 1/100 of it" in report.line(row)


def test_of_many_that_are_alike_the_row_has_the_time_of_one(session):
    row = measure(case({"many": busy}, share={"many": 50}, modes=("fwd",)), session)[1]
    assert 0.04 <= row["ms_p50"] < 2 and row["verdict"] == "correct" and "one of 50" in report.line(row)
    assert row["copy_fraction"] == pytest.approx(64 / (row["ms_p50"] / 1e3) / 10e9)


def test_a_case_without_its_baseline_is_held_to_the_limit(session):
    """As when the baseline has died, whose error would set the tolerance."""
    rest = case({"rough": lambda x: x * x * 1.01, "wrong": lambda x: x * 1.5}, modes=("fwd",)).only(["rough", "wrong"])
    rough, wrong = measure(rest, session)
    assert rough["verdict"] == "correct" and wrong["verdict"] == "wrong"
    assert rough["baseline"] == "eager" and rough["times_baseline"] is None


def test_a_lost_device_ends_the_process(session, monkeypatch):
    monkeypatch.setattr(machine, "lost", lambda device: True)
    told = []
    with pytest.raises(DeviceLost, match="out of memory"):
        measure(case({"large": out_of_memory}), replace(session, tell=lambda *news: told.append(news)))
    assert [value for kind, value in told if kind == "doing"] == [None, None, "eager", "large"]


@pytest.mark.parametrize("setting", ["ieee", "tf32"])
def test_precision_is_set_whatever_was_set_before_and_however(setting, session):
    """After a newer setter was used, torch's older getters raise."""
    torch.backends.cudnn.conv.fp32_precision = setting
    torch.backends.cuda.matmul.fp32_precision = setting
    if setting == "ieee":
        with pytest.raises(RuntimeError):
            _ = torch.backends.cudnn.allow_tf32
    for allowed in (True, False):
        machine.allow_tf32(allowed)
        for one in (torch.backends.cuda.matmul, torch.backends.cudnn.conv):
            assert (one.fp32_precision == "tf32") is allowed
    torch.backends.cudnn.conv.fp32_precision = setting
    assert all(row["ms_p50"] for row in measure(case({}), session))
