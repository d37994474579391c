"""The timer of a GPU, with pretended events and graphs."""

import time

import pytest
import torch
from pretended_gpu import Stub

from benchmarks.harness.timing import CudaTimer, Samples


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
    assert (
        figures["warm_ms_p50"] >= 1
        and figures["wall_ms_p50"] >= 1
        and figures["host_us"] >= 1000
        and 0 < figures["graph_ms_p50"] < 1
    )
    seconds, memory = cuda_timer.once(lambda: None)
    assert seconds < 1 and memory == 2.5


def test_what_cannot_be_captured_has_no_graph_time(cuda_timer, monkeypatch):
    def refused(*args, **options):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refused)
    samples = Samples()
    assert "when stream is capturing" in cuda_timer.graph(lambda: lambda: None, samples)
    assert "graph_ms_p50" not in samples


def test_a_long_call_of_a_gpu_is_only_timed_alone(cuda_timer):
    samples = Samples()
    cuda_timer.turn(lambda: None, 1, samples)
    assert samples.keys() == {"ms"} and len(samples["ms"]) == 1
