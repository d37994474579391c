"""How time and memory are taken, on a CPU and on a CUDA GPU. Both timers offer the same methods to the runner."""

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness.case import name_of

Call = Callable[[], Any]


def quantile(values: list[float], q: float) -> float:
    return torch.tensor(values, dtype=torch.float64).quantile(q).item()


class Samples(dict[str, list[float]]):
    """Field of a row -> its values of several turns: `ms` of single calls, and what a timer adds to it."""

    def add(self, name: str, values: list[float]) -> None:
        self.setdefault(name, []).extend(values)

    def figures(self, share: float = 1) -> dict[str, float | int]:
        """Fields of a row: the quantiles of `ms` and the medians of the rest, over the `share` of a call."""
        fields = {f"ms_p{int(100 * q)}": quantile(self["ms"], q) / share for q in (0.2, 0.5, 0.8)}
        fields |= {name: quantile(values, 0.5) / share for name, values in self.items() if name != "ms"}
        return {**fields, "samples": len(self["ms"])}


class CpuTimer:
    """Wall time, and the processor's. `ms` is the processor's where one thread computes, for other work on the machine
    hardly changes that, and else the wall time."""

    LONG = 20.0  # seconds: a call of this length is sampled once

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def once(self, call: Call) -> tuple[float, float | None]:
        """Seconds of one call; no memory: torch does not count that of a CPU."""
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
        """There are no CUDA graphs here."""
        return ""


class CudaTimer:
    """CUDA events around single calls after the L2 cache was overwritten; the warm, wall and graph times beside it.

    - ms: one call between two events, inputs not in the L2 cache;
    - warm_ms: the same without clearing the cache;
    - wall_ms: wall time of a call in a row of calls with one synchronization. Clearing the cache gives the host a head
      start, so that `ms` hides about 70 us of its work, and this does not;
    - host_us: what the host takes to launch a call of that row;
    - graph_ms: one replay of the call as a CUDA graph, cache cleared: no launch cost of single kernels.

    A call that is sampled once a turn, because it is long, has only the first: caches and launches say nothing of it.
    """

    LONG = 5.0
    REPLAYS = 20
    FLUSH = 2**26  # bytes that are overwritten to clear the L2 cache, at least

    def __init__(self, device: torch.device) -> None:
        self.device = device
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.empty(max(4 * cache, self.FLUSH), dtype=torch.uint8, device=device)

    def once(self, call: Call) -> tuple[float, float | None]:
        """Seconds of one call, and its memory beyond what stood before it, in 10^6 bytes."""
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
        """The graph time, where the call can be captured; else why not. `make` makes the call, on the stream that is
        captured, so that a backward alone runs there too."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        try:
            # What waits for the GPU is found before the capture, which it would break.
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
        except Exception as error:  # a rival may fail here in any way: it only has no graph time then
            return str(error).strip().partition("\n")[0][:200] or type(error).__name__
        finally:
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize(self.device)
        samples.add("graph_ms_p50", self._events(graph.replay, self.REPLAYS, cold=True))
        return ""


def timer(device: torch.device) -> CpuTimer | CudaTimer:
    return CudaTimer(device) if device.type == "cuda" else CpuTimer(device)


def _seconds(clock: CpuTimer | CudaTimer, call: Call) -> float:
    """The median of a few calls."""
    call()
    samples = Samples()
    clock.turn(call, 7, samples)
    return quantile(samples["ms"], 0.5) / 1e3


def copy_rate(clock: CpuTimer | CudaTimer) -> float:
    """Measured copy bandwidth in 10^9 bytes a second, reads and writes counted."""
    size = 2**30 if clock.device.type == "cuda" else 2**27
    source = torch.randint(256, (size,), dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    return 2 * size / _seconds(clock, lambda: target.copy_(source)) / 1e9


def matmul_rate(clock: CpuTimer | CudaTimer, dtype: torch.dtype) -> float:
    """Measured rate of a large matrix product in 10^12 operations a second, under the settings of the run."""
    n = 8192 if clock.device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=clock.device).to(dtype) for _ in range(2))
    return 2 * n**3 / _seconds(clock, lambda: a @ b) / 1e12


def rates(device: torch.device) -> dict[str, float]:
    """The device's own rates, those that the fields copy_gb_s and matmul_tflop_s of a row come from."""
    clock = timer(device)
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if device.type == "cuda" else (torch.float32,)
    return {"copy": copy_rate(clock), **{name_of(dtype): matmul_rate(clock, dtype) for dtype in dtypes}}
