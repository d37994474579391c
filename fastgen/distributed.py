"""One job in several processes, started by `torchrun` on one machine or several. The functions also work, trivially, in
a single process.

Results must not depend on the number of processes. Work is therefore cut into parts that are the same for any number of
processes; each process computes some of the parts, and `merged` gives all results to all processes. The random numbers
of a part come from a seed that belongs to the part (`mix`).

To use several machines, run this command on each, where HOST is the address of one of them:

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 --rdzv-id 1 \\
        -m fastgen train --model pixelcnnpp --data cifar10 --out RUN

RUN and the data must be on a file system that all machines share. After a failure, start the command again with
--resume; the number of machines may be another.
"""

import gc
import hashlib
import importlib
import os
import re
import signal
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

LOST = re.compile(r"gloo/transport|connection (closed|reset) by peer|broken pipe", re.IGNORECASE)  # in torch's errors
_store: Any = None  # torchrun's key-value store, which outlives a process that dies


def started_by_torchrun() -> bool:
    """Whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def active() -> bool:
    """Whether this process has joined a job: inside `processes`."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """0 .. world_size() - 1; the process of rank 0 prints and writes."""
    return dist.get_rank() if active() else 0


def world_size() -> int:
    """The number of processes of the job."""
    return dist.get_world_size() if active() else 1


def local_rank() -> int:
    """The rank of this process on its machine, which is also the number of the GPU that it takes."""
    return int(os.environ.get("LOCAL_RANK", "0")) if started_by_torchrun() else 0


@contextmanager
def processes() -> Iterator[None]:
    """Joins the processes that torchrun started. Inside, only rank 0 prints to stdout.

    Raises:
        ConnectionError: another process has died, or torchrun sent SIGTERM to this one, as it does when another has
            died. Further SIGTERMs are ignored, so that the error can be reported.
    """
    global _store
    if not started_by_torchrun() or active():
        yield
        return
    importlib.import_module("torch.distributed.nn")  # if imported later, its default arguments would hold the group
    _store, number, count = next(dist.rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=_store, rank=number, world_size=count)
    lost = f"another of the {count} processes has ended, or all were told to; what was saved stays"

    def told_to_end(signal_number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise ConnectionError(lost)

    before = signal.signal(signal.SIGTERM, told_to_end)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if number else sys.stdout):
        try:
            yield
        except BaseException as error:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and LOST.search(str(error))):
                raise ConnectionError(lost) from error
            raise
    signal.signal(signal.SIGTERM, before)
    _leave()


def _leave() -> None:
    """Destroys the process group. Its last reference keeps gloo's threads alive, and a thread that frees a tensor while
    the interpreter exits would abort the process."""
    group = weakref.ref(dist.group.WORLD)
    dist.destroy_process_group()
    gc.collect()  # a DistributedDataParallel in a reference cycle holds the group
    if group() is not None:  # FSDP's caches hold it: give its threads the time to finish their work
        time.sleep(0.3)


def first_to_report() -> bool:
    """Whether this process is the first to ask, so that only one process reports an error."""
    if not started_by_torchrun():
        return True
    if _store is None:
        return os.environ["RANK"] == "0"
    try:
        return _store.add("fastgen/reported", 1) == 1
    except RuntimeError:  # the process that hosts the store has died
        return True


def shard(count: int) -> slice:
    """This process's part of 0 .. count - 1. Parts are contiguous, in the order of ranks, and differ by at most one in
    size."""
    return slice(count * rank() // world_size(), count * (rank() + 1) // world_size())


def merged(part: Tensor) -> Tensor:
    """The sum of a tensor over all processes, on its device. If each process fills in its own part of a tensor of
    zeros, this is exactly the whole tensor."""
    if active():
        part = part.contiguous().clone()
        dist.all_reduce(part)
    return part


def mix(*numbers: int) -> int:
    """A seed from several numbers."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest(), "big")


@contextmanager
def seeded(device: torch.device, *numbers: int) -> Iterator[None]:
    """Inside, torch's default generators start from a seed made of these numbers; afterwards their state is what it was
    before."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(mix(*numbers))
        yield


def any_of_us(flag: bool) -> bool:
    """Whether the flag is set in any process. All processes must call it at the same point."""
    return bool(merged(torch.tensor(int(flag))))
