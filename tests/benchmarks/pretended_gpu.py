"""A GPU that is not there: everything that asks for one gets the CPU, so that code for GPUs can at least be run.

What is computed, timed and said about the machine under it means nothing.
"""

import sys
import time
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode

from benchmarks import references, runner
from benchmarks.timing import CudaTimer

NAME = "Pretended GPU"


class Stub:
    """Stands in for an event (its time is that of the recording), a stream, a graph, their contexts, a device."""

    L2_cache_size = 2**10

    def __init__(self, *args, **options):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)

    def wait_stream(self, stream):
        pass

    def replay(self):
        time.sleep(1e-4)


class OnTheCpu(TorchFunctionMode):
    """Puts on the CPU what is asked for on the GPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def moved(value):
            return torch.device("cpu") if str(value).partition(":")[0] == "cuda" else value

        if function is torch.device:
            return function(*args, **(kwargs or {}))
        kinds = (torch.device, str)
        args = tuple(moved(value) if isinstance(value, kinds) else value for value in args)
        options = {name: moved(v) if isinstance(v, kinds) else v for name, v in (kwargs or {}).items()}
        return function(*args, **options)


def pretend(monkeypatch, tables=()):
    """Until the test ends. `tables` are benchmarks, whose sizes for a GPU become those of a dry run."""
    properties = SimpleNamespace(L2_cache_size=2**10, uuid="0", multi_processor_count=1, major=9, minor=0)
    for name in ("Event", "Stream", "CUDAGraph", "graph", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Stub)
    answers = {"is_available": True, "get_device_name": NAME, "get_device_properties": properties}
    answers |= {"memory_allocated": 1_000_000, "max_memory_allocated": 3_500_000, "is_bf16_supported": True}
    answers |= {"memory_reserved": 0}
    answers |= dict.fromkeys(("synchronize", "reset_peak_memory_stats", "set_sync_debug_mode", "empty_cache"))
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, answer=answer, **options: answer)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda call, example: call)
    monkeypatch.setattr(CudaTimer, "REPLAYS", 2)
    monkeypatch.setattr(CudaTimer, "FLUSH", 2**10)
    monkeypatch.setattr(references, "compiled", lambda call, mode=None: lambda *args, **options: call(*args, **options))
    monkeypatch.setattr(runner, "copy_rate", lambda clock: 10.0)
    monkeypatch.setattr(runner, "matmul_rate", lambda clock, dtype: 1.0)
    monkeypatch.setattr(runner, "plan", lambda once, budget, long: (1, 2))
    for name in tables:
        __import__(f"benchmarks.{name}")
        for table in vars(sys.modules[f"benchmarks.{name}"]).values():
            if isinstance(table, dict) and {"toy", "gpu"} <= table.keys():
                monkeypatch.setitem(table, "gpu", table["toy"][:2])
                monkeypatch.setitem(table, "gpu-full", table["toy"][:2])
    return OnTheCpu()
