"""One job in several processes, as `torchrun` starts them (on one machine or several). In a single process every
function here is trivial.

What is computed must not depend on the number of processes: work is cut into parts that are the same for any number,
each process does its own, and `merged` brings all results to all. Random numbers come from a seed that belongs to the
part (`mix`).

On several machines the command is the same on each, with the address of one of them:

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 --rdzv-id 1 \\
        -m fastgen train --model pixelcnnpp --data cifar10 --out RUN

RUN and the data must be on a file system that all of them see. Start it again with --resume after a failure, on as many
machines as there are.
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
_store: Any = None  # of torchrun: outlives a process that dies


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
    """Joins the processes that torchrun started; those of a rank above 0 print nothing to stdout.

    Raises:
        ConnectionError: another process has ended before its time, or torchrun tells this one to end, which is how it
            treats those that are left. Further signals then wait for the error to be told.
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
    """Ends the group, and with its last reference the threads of gloo. A thread that still lets go of a tensor when the
    interpreter ends would abort the process."""
    group = weakref.ref(dist.group.WORLD)
    dist.destroy_process_group()
    gc.collect()  # a cycle that holds a model of DistributedDataParallel holds the group
    if group() is not None:  # caches of FSDP hold it: its threads stay, but not busy for so long
        time.sleep(0.3)


def first_to_report() -> bool:
    """Whether this process is the first that wants to tell of an error: one line is enough."""
    if not started_by_torchrun():
        return True
    if _store is None:
        return os.environ["RANK"] == "0"
    try:
        return _store.add("fastgen/reported", 1) == 1
    except RuntimeError:  # the process that kept the store has died
        return True


def shard(count: int) -> slice:
    """This process's part of 0 .. count - 1: contiguous, in the order of ranks, sizes that differ by one at most."""
    bounds = [count * number // world_size() for number in (rank(), rank() + 1)]
    return slice(*bounds)


def merged(part: Tensor) -> Tensor:
    """The sum of a tensor over all processes, on its device. Where each has filled in its own part of zeros, that is
    exactly the whole tensor, whatever their number."""
    if active():
        part = part.contiguous().clone()
        dist.all_reduce(part)
    return part


def mix(*numbers: int) -> int:
    """A seed from several numbers."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest(), "big")


@contextmanager
def seeded(device: torch.device, *numbers: int) -> Iterator[None]:
    """torch's default generators start from these numbers, and go on afterwards as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(mix(*numbers))
        yield


def any_of_us(flag: bool) -> bool:
    """Whether the flag is set in any process; all must ask at the same point."""
    return bool(merged(torch.tensor(int(flag))))
