"""What a row says: the comparison before any timing, failures as rows, timing on a CPU and (stood in for) a GPU."""

import json
import time
from dataclasses import replace

import pytest
import torch
from pretended_gpu import Stub

from benchmarks import machine, runner
from benchmarks.case import Case, leaves
from benchmarks.runner import Session, compare, measure, plan, relative_error
from benchmarks.timing import CpuTimer, CudaTimer, Samples, quantile

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
FIELDS |= {"driver", "cuda", "torch", "triton", "commit", "kernel_sha256", "time", "command"}


def square(x):
    return x * x


def out_of_memory(x):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")


def case(providers, **options):
    return Case(
        op="square",
        shape="8",
        dtype=torch.float32,
        inputs=lambda device: {"x": torch.linspace(1, 2, 8, device=device).requires_grad_()},
        providers={"eager": square, **providers},
        truth=square,
        bytes={"fwd": 64},
        batch=8,
        **options,
    )


@pytest.fixture
def session(monkeypatch):
    monkeypatch.setattr(runner, "copy_rate", lambda clock: 10.0)
    monkeypatch.setattr(runner, "matmul_rate", lambda clock, dtype: 1.0)
    return Session(torch.device("cpu"), "python -m benchmarks square", budget=0.002)


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


def test_interrupted_calls_of_one_thread_are_left_out():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    calls = iter([0, 1, 0, 1])

    def sometimes_waiting():
        end = time.process_time() + 0.002
        while time.process_time() < end:
            pass
        time.sleep(0.05 * next(calls))

    samples = Samples()
    try:
        CpuTimer(torch.device("cpu")).turn(sometimes_waiting, 4, samples)
    finally:
        torch.set_num_threads(threads)
    assert samples.ms and max(samples.ms) < 50
    assert samples.figures()["disturbed_p50"] >= 0.5


@pytest.fixture
def cuda_timer(monkeypatch):
    for name in ("Event", "Stream", "CUDAGraph", "graph", "stream"):
        monkeypatch.setattr(torch.cuda, name, Stub)
    for name in ("get_device_properties", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Stub)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1_000_000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3_500_000)
    return CudaTimer(torch.device("cpu"))


def test_the_timer_of_a_gpu(cuda_timer):
    samples, flushes = Samples(), []
    cuda_timer.flush = type("Flush", (), {"zero_": lambda self: flushes.append(1)})()
    cuda_timer.turn(lambda: time.sleep(1e-3), 3, samples)
    assert len(flushes) == 3
    assert cuda_timer.graph(lambda: lambda: None, samples) == ""
    figures = samples.figures()
    assert figures["samples"] == 3 and figures["ms_p50"] >= 1
    assert figures["warm_ms_p50"] >= 1 and figures["wall_ms_p50"] >= 1 and 0 < figures["graph_ms_p50"] < 1
    seconds, memory = cuda_timer.once_with_memory(lambda: None)
    assert seconds < 1 and memory == 2.5
    assert cuda_timer.once(lambda: None) < 1


def test_what_cannot_be_captured_has_no_graph_time(cuda_timer, monkeypatch):
    def refused(*args, **options):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refused)
    samples = Samples()
    assert "when stream is capturing" in cuda_timer.graph(lambda: lambda: None, samples)
    assert "graph_ms" not in samples.extra


def test_a_long_call_of_a_gpu_is_only_timed_alone(cuda_timer):
    samples = Samples()
    cuda_timer.turn(lambda: None, 1, samples)
    assert len(samples.ms) == 1 and not samples.extra


def test_the_backward_alone_is_not_timed_in_graphs_of_the_compiler(session):
    rows = measure(case({"compiled reduce-overhead": square}), session)
    assert [row["mode"] for row in rows if row["provider"] != "eager"] == ["fwd", "full"]


def test_a_gradient_that_loses_much_is_held_to_what_the_baseline_loses_there(session):
    def cases(rival):
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
        case = cases(rival)
        checked = compare(case, case.inputs(torch.device("cpu")), session)
        assert not checked["eager"].problem and (checked["rival"].problem == "") is right


def test_what_compiles_for_too_long_is_ended(session):
    def endless(x):
        while True:
            time.sleep(1e-3)

    impatient = replace(session, patience=0.1)
    rows = measure(case({"endless": endless, "power": lambda x: x**2}), impatient)
    assert {row["problem"] for row in rows if row["provider"] == "endless"} == {"no result within 0 s"}
    assert all(row["ms_p50"] for row in rows if row["provider"] == "power")
    over = replace(session, end=time.perf_counter() - 1)
    assert {row["problem"] for row in measure(case({}), over)} == {runner.NO_TIME}


def test_kernels_are_seen_when_they_are_launched(session):
    pytest.importorskip("triton")
    from benchmarks.agenda import load_cases

    (first, *_) = load_cases("reparameterize_kl", "toy", torch.device("cpu"))
    found = {row["provider"]: row["launched"] for row in measure(first, replace(session, timing=False))}
    assert found["eager"] == []
    assert found["fastgen, interpreted"] == ["reparameterize_kl_backward_kernel", "reparameterize_kl_forward_kernel"]


def test_the_hash_is_of_the_kernels_source():
    import hashlib

    file = machine.KERNELS / "vae/reparameterize_kl.py"
    assert machine.kernel_sha256(["vae/reparameterize_kl"]) == hashlib.sha256(file.read_bytes()).hexdigest()
    assert machine.sources(("likelihood/mixture",))[:2] == ["likelihood/mixture", "common"]
    assert machine.kernel_sha256(["no_such_kernel"]) is None


def test_imports_of_a_kernel_count_as_its_source(tmp_path, monkeypatch):
    (tmp_path / "scan.py").write_text(
        "from fastgen.kernels.cell import step\nfrom fastgen.kernels.catalogue_entry import Entry\n"
    )
    (tmp_path / "cell.py").write_text("from fastgen.kernels import launch\nfrom fastgen.kernels.scan import x\n")
    (tmp_path / "launch.py").write_text("import torch\n")
    monkeypatch.setattr(machine, "KERNELS", tmp_path)
    assert machine.sources(("scan",)) == ["scan", "cell", "launch"]
    before = machine.kernel_sha256(["scan", "cell", "launch"])
    (tmp_path / "launch.py").write_text("import torch  # changed\n")
    assert machine.kernel_sha256(["scan", "cell", "launch"]) != before
