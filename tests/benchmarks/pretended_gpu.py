"""A GPU that is not there: everything that asks for one gets the CPU, so that code for GPUs can at least be run.

What is computed, timed and said about the machine under it means nothing. `python -m tests.benchmarks.pretended_gpu
first-contact --minutes 1` runs a command of the benchmarks on it, at toy size.
"""

import os
import sys
import time
from types import SimpleNamespace

os.environ.setdefault("TRITON_INTERPRET", "1")  # before kernels are defined

import pytest
import torch
from torch.overrides import TorchFunctionMode

from benchmarks import cases, first_contact
from benchmarks.cases import references
from benchmarks.harness import runner, timing
from benchmarks.harness.timing import CudaTimer

NAME = "Pretended GPU"


class Stub:
    """Replaces an event (with the time of its recording), a stream, a graph, their contexts and a device."""

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
    """Creates tensors on the CPU that were asked for on the GPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def moved(value):
            return torch.device("cpu") if str(value).partition(":")[0] == "cuda" else value

        if function is torch.device:
            return function(*args, **(kwargs or {}))
        kinds = (torch.device, str)
        args = tuple(moved(value) if isinstance(value, kinds) else value for value in args)
        options = {name: moved(v) if isinstance(v, kinds) else v for name, v in (kwargs or {}).items()}
        return function(*args, **options)


def _answer(what):
    """For functions of torch.cuda. A process that asks them, but NVML, cannot be forked for a GPU any more."""
    home = os.getpid()

    def answer(*args, **options):
        by_nvml = what is True and os.environ.get("PYTORCH_NVML_BASED_CUDA_CHECK") == "1"
        assert by_nvml or os.getpid() != home, "the process that waits for the others has asked for the GPU"
        return what

    return answer


def pretend(monkeypatch):
    """Until the test ends. The sizes of all benchmarks for a GPU become those of a dry run; what launches kernels on
    any device is left out, but for the operations themselves, which run their definitions here."""
    properties = SimpleNamespace(L2_cache_size=2**10, uuid="0", multi_processor_count=1, major=9, minor=0)
    for name in ("Event", "Stream", "CUDAGraph", "graph", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Stub)
    answers = {"is_available": True, "get_device_name": NAME, "get_device_properties": properties}
    answers |= {"memory_allocated": 1_000_000, "max_memory_allocated": 3_500_000, "is_bf16_supported": True}
    answers |= dict.fromkeys(("synchronize", "reset_peak_memory_stats", "set_sync_debug_mode", "empty_cache", "init"))
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, _answer(answer))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *args: 0)  # asked by tests/conftest.py
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 0)  # a build for CUDA would look for a GPU
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda call, example: call)
    monkeypatch.setattr(CudaTimer, "REPLAYS", 2)
    monkeypatch.setattr(CudaTimer, "FLUSH", 2**10)
    monkeypatch.setattr(references, "compiled", lambda call, mode=None: lambda *args, **options: call(*args, **options))
    monkeypatch.setattr(timing, "copy_rate", lambda clock: 10.0)
    monkeypatch.setattr(timing, "matmul_rate", lambda clock, dtype: 1.0)
    monkeypatch.setattr(runner, "plan", lambda once, budget, long: (1, 2))
    load = cases.load

    def small(name, size, device):
        """Those of a dry run, with the providers that a GPU has."""
        for case in load(name, "toy", device)[: None if name == "launches" else 2]:
            own = (name for name in case.providers if name.startswith("fastgen, "))
            yield case.without(*(name for name in own if not name.endswith("persistent")))

    monkeypatch.setattr(cases, "load", lambda *arguments: list(small(*arguments)))
    names = dict.fromkeys(name for name, _, _ in first_contact.HEADLINES)
    monkeypatch.setattr(first_contact, "HEADLINES", [(name, None, None) for name in names])
    return OnTheCpu()


def main():
    with pytest.MonkeyPatch.context() as monkeypatch, pretend(monkeypatch):
        from benchmarks.__main__ import main

        return main()


if __name__ == "__main__":
    sys.exit(main())
