"""Measures time and memory on a CPU and on a CUDA GPU. Both timers have the same methods."""

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness.case import name_of

Call = Callable[[], Any]


def quantile(values: list[float], q: float) -> float:
    return torch.tensor(values, dtype=torch.float64).quantile(q).item()


class Samples(dict[str, list[float]]):
    """The samples of several turns, by field of a row: "ms" of single calls, and further fields that a timer adds."""

    def add(self, name: str, values: list[float]) -> None:
        self.setdefault(name, []).extend(values)

    def figures(self, share: float = 1) -> dict[str, float | int]:
        """The fields of a row: quantiles of "ms" and medians of the other fields, divided by the `share` of a call."""
        fields = {f"ms_p{int(100 * q)}": quantile(self["ms"], q) / share for q in (0.2, 0.5, 0.8)}
        fields |= {name: quantile(values, 0.5) / share for name, values in self.items() if name != "ms"}
        return {**fields, "samples": len(self["ms"])}


class CpuTimer:
    """Measures wall time and processor time. With one thread, "ms" is the processor time, which other work on the
    machine hardly changes; otherwise it is the wall time."""

    LONG = 20.0  # seconds; a longer call is sampled once

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def once(self, call: Call) -> tuple[float, float | None]:
        """The seconds of one call, and None: torch does not measure memory on a CPU."""
        start = time.perf_counter()
        call()
        return time.perf_counter() - start, None

    def turn(self, call: Call, count: int, samples: Samples) -> None:
        wall, cpu = [], []
        for _ in range(count):
            start = time.process_time()
            wall.append(1e3 * self.once(call)[0])
            cpu.append(1e3 * (time.process_time() - start))
        samples.add("ms", cpu if torch.get_num_threads() == 1 else wall)
        samples.add("wall_ms_p50", wall)
        samples.add("cpu_ms_p50", cpu)

    def graph(self, make: Callable[[], Call], samples: Samples) -> str:
        """A CPU has no CUDA graphs: does nothing."""
        return ""


class CudaTimer:
    """Measures the times of a call in several ways:

    - ms: between two CUDA events around one call, after the L2 cache was cleared;
    - warm_ms: the same without clearing the cache;
    - wall_ms: wall time per call of several calls with one synchronization at the end. Clearing the cache lets the host
      run ahead, so that "ms" hides about 70 us of its work; this does not;
    - host_us: time that the host takes to launch one of these calls;
    - graph_ms: one replay of the call as a CUDA graph, cache cleared, without the launch costs of single kernels.

    A call that is sampled once per turn, because it is long, has only "ms": caches and launches hardly matter.
    """

    LONG = 5.0  # seconds; a longer call is sampled once
    REPLAYS = 20
    FLUSH = 2**26  # least number of bytes that are overwritten to clear the L2 cache

    def __init__(self, device: torch.device) -> None:
        self.device = device
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.empty(max(4 * cache, self.FLUSH), dtype=torch.uint8, device=device)

    def once(self, call: Call) -> tuple[float, float | None]:
        """The seconds of one call, and the peak memory that it allocates, in 10^6 bytes."""
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        call()
        torch.cuda.synchronize(self.device)
        return time.perf_counter() - start, (torch.cuda.max_memory_allocated(self.device) - before) / 1e6

    def _events(self, call: Call, count: int, cold: bool) -> list[float]:
        pairs = []
        for _ in range(count):
            if cold:
                self.flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) for start, end in pairs]

    def turn(self, call: Call, count: int, samples: Samples) -> None:
        samples.add("ms", self._events(call, count, cold=True))
        if count == 1:
            return
        samples.add("warm_ms_p50", self._events(call, count, cold=False))
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        for _ in range(count):
            call()
        enqueued = time.perf_counter() - start
        torch.cuda.synchronize(self.device)
        samples.add("wall_ms_p50", [1e3 * (time.perf_counter() - start) / count])
        samples.add("host_us", [1e6 * enqueued / count])

    def graph(self, make: Callable[[], Call], samples: Samples) -> str:
        """Samples replays of the call as a CUDA graph. Returns the reason if it cannot be captured, otherwise "".

        Args:
            make: makes the call. It runs on the stream that is captured, where the backward of "bwd" must run too.
        """
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        try:
            # Raises for operations that wait for the GPU, which cannot be captured.
            torch.cuda.set_sync_debug_mode("error")
            with torch.cuda.stream(stream):
                call = make()
                for _ in range(3):
                    call()
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.current_stream(self.device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                call()
        except Exception as error:  # whatever fails here: the provider just has no graph time
            return str(error).strip().partition("\n")[0][:200] or type(error).__name__
        finally:
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize(self.device)
        samples.add("graph_ms_p50", self._events(graph.replay, self.REPLAYS, cold=True))
        return ""


def timer(device: torch.device) -> CpuTimer | CudaTimer:
    return CudaTimer(device) if device.type == "cuda" else CpuTimer(device)


def _seconds(clock: CpuTimer | CudaTimer, call: Call) -> float:
    """The median time of a few calls in seconds."""
    call()
    samples = Samples()
    clock.turn(call, 7, samples)
    return quantile(samples["ms"], 0.5) / 1e3


def copy_rate(clock: CpuTimer | CudaTimer) -> float:
    """The measured copy bandwidth in 10^9 bytes per second, counting reads and writes."""
    size = 2**30 if clock.device.type == "cuda" else 2**27
    source = torch.randint(256, (size,), dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    return 2 * size / _seconds(clock, lambda: target.copy_(source)) / 1e9


def matmul_rate(clock: CpuTimer | CudaTimer, dtype: torch.dtype) -> float:
    """The measured rate of a large matrix product in 10^12 operations per second, with the run's TF32 setting."""
    n = 8192 if clock.device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=clock.device).to(dtype) for _ in range(2))
    return 2 * n**3 / _seconds(clock, lambda: a @ b) / 1e12


def rates(device: torch.device) -> dict[str, float]:
    """The device's own rates: "copy" in GB/s and, by dtype, matrix products in TFLOP/s. Rows contain them as copy_gb_s
    and matmul_tflop_s."""
    clock = timer(device)
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if device.type == "cuda" else (torch.float32,)
    return {"copy": copy_rate(clock), **{name_of(dtype): matmul_rate(clock, dtype) for dtype in dtypes}}
