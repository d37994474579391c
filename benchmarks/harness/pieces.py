"""Pieces of a run, each in a process of its own, so that a kernel that crashes, hangs or breaks the GPU's context takes
nothing but its own row with it.

Processes are forks: everything is imported once, here, and no process waits for it. A fork of a process that has used
CUDA cannot use it, so that this one never does: what is to be known of the GPU, a child finds out. Only this process
writes, and each row as soon as it is whole.
"""

import contextlib
import dataclasses
import faulthandler
import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch._inductor.config

from benchmarks.harness.case import Case
from benchmarks.harness.compare import Checked
from benchmarks.harness.rows import Row
from benchmarks.harness.runner import empty_row, measure
from benchmarks.harness.session import DeviceLost, Session

FORK = multiprocessing.get_context("fork")
Save = Callable[[Case, list[Row]], Any]


@dataclasses.dataclass
class Piece:
    """Cases that one process runs, one after the other.

    Attributes:
        timing: whether to take times. What only compares runs beside other such pieces, and compiles by itself.
        blocking: whether each launch waits for its end, so that a failure shows at the launch that it is of; nothing
            can be captured in a CUDA graph then.
        patience: seconds that one step of one provider (its comparison, its samples) may take, compilation included.
        threads: of the CPU; None: as many as there are.
    """

    cases: list[Case]
    timing: bool = True
    blocking: bool = False
    patience: float = 60.0
    threads: int | None = None


def _end_with(parent: int) -> None:
    """Ends this process soon after its parent has ended, however that came."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


class Child:
    """A process that calls `work` with a function that tells this one (kind, value)."""

    def __init__(self, work: Callable[[Callable[[str, Any], None]], None], log: int | None = None) -> None:
        self.news, theirs = FORK.Pipe(duplex=False)
        self.process = FORK.Process(target=self._run, args=(work, theirs, log, os.getpid()))
        self.process.start()
        theirs.close()

    @staticmethod
    def _run(work: Callable[..., None], news: Connection, log: int | None, parent: int) -> None:
        os.setpgid(0, 0)  # with what it starts, as compilers
        gc.freeze()  # to look through all that was imported takes a second, each time
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its children
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
        if log is not None:
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.stdout = sys.stderr = os.fdopen(log, "w", buffering=1, closefd=False)  # whatever they were here
            faulthandler.enable(log)
        try:
            work(lambda kind, value: news.send((kind, value)))
        except BaseException as error:
            news.send(("failed", f"{type(error).__name__}: {error}"))
        os._exit(0)  # without what else this process inherited to do at its end

    @property
    def ends(self) -> list[Any]:
        """What is ready when there is news, or the process has ended."""
        return [self.news, self.process.sentinel]

    def heard(self) -> list[tuple[str, Any]]:
        """All news so far; ("end", how) is the last where the process has ended."""
        found = []
        with contextlib.suppress(EOFError, OSError):
            while self.news.poll():
                found.append(self.news.recv())
            if self.process.is_alive():
                return found
        self.process.join()
        code = self.process.exitcode or 0
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"the process ended with status {code}"
        return [*found, ("end", how)]

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid or 0, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.news.close()


def in_a_process(work: Callable[[], Any], patience: float = 120.0) -> Any:
    """What `work` returns in a process of its own.

    Raises:
        ValueError: it failed or took too long; the text says how.
    """
    child = Child(lambda tell: tell("result", work()))
    end, how = time.monotonic() + patience, f"no answer within {patience:.0f} s"
    try:
        while time.monotonic() < end:
            wait(child.ends, timeout=1.0)
            for kind, value in child.heard():
                if kind == "result":
                    return value
                how = str(value).removeprefix("ValueError: ")
                if kind in ("failed", "end"):
                    raise ValueError(how)
        raise ValueError(how)
    finally:
        child.kill()


class _Running:
    """A piece in its process: what it is doing, and which rows are still to come."""

    def __init__(self, piece: Piece, session: Session, save: Save, log: int | None) -> None:
        self.piece, self.save, self.log = piece, save, log
        self.session = dataclasses.replace(session, timing=piece.timing, threads=piece.threads or session.threads)
        self._begin(0)
        self.until = time.monotonic() + piece.patience
        self.child = Child(self._work, log)

    def _begin(self, index: int) -> None:
        self.index, self.case = index, self.piece.cases[index]
        self.provider: str | None = None
        self.kernels: list[str] = []  # launched by the provider, one a launch
        self.done: set[tuple[str, str]] = set()  # providers and modes of the case that have their rows

    def _work(self, tell: Callable[[str, Any], None]) -> None:
        torch.set_num_threads(self.session.threads)
        if self.piece.blocking:
            os.environ["CUDA_LAUNCH_BLOCKING"] = "1"
        if not self.piece.timing:
            torch._inductor.config.compile_threads = 1
        session = dataclasses.replace(self.session, tell=tell)
        for index, case in enumerate(self.piece.cases):
            tell("case", index)
            try:
                measure(case, session)
            except DeviceLost as problem:
                tell("failed", str(problem))
                return
        tell("done", None)

    def listen(self) -> str | None:
        """Takes in what the process has told. How it died; "" if it is done, None if it goes on."""
        ended = None
        for kind, value in self.child.heard():
            self.until = time.monotonic() + self.piece.patience
            if kind == "done":
                ended = ""
            elif kind in ("failed", "end"):
                ended = value if ended is None else ended
            elif kind == "log":
                out = sys.stderr.fileno() if self.log is None else self.log
                os.write(out, f"{self.case.title}\n{value}\n".encode())
            elif kind == "case":
                self._begin(value)
            elif kind == "doing":
                self.provider, self.kernels = value, []
            elif kind == "kernel":
                self.kernels.append(value)
            elif kind == "row":
                self.done.add((value["provider"], value["mode"]))
                self.save(self.case, [value])
        if ended is None and time.monotonic() > self.until:
            ended = f"no result within {self.piece.patience:.0f} s"
        if ended is not None:
            self.child.kill()
        return ended

    def failed(self, problem: str) -> None:
        """Saves the rows of what it was doing when it died, or of all providers, where it was none's."""
        checked = Checked(problem, launched=self.kernels)
        for name in self.case.providers if self.provider is None else [self.provider]:
            for mode in self.case.timed_modes(name):
                if (name, mode) not in self.done:
                    self.save(self.case, [empty_row(self.case, self.session, name, mode, checked)])

    def rest(self) -> Piece | None:
        """What is left to do without the provider that died: the providers that lack a row (of a mode, all or none)."""
        later = self.piece.cases[self.index + 1 :]
        others = [name for name in self.case.providers if self.provider not in (None, name)]
        lacking = [name for name in others if {(name, mode) for mode in self.case.timed_modes(name)} - self.done]
        if lacking:
            later = [self.case.only(lacking), *later]
        return dataclasses.replace(self.piece, cases=later) if later else None


def run(
    pieces: Iterable[Piece],
    session: Session,
    save: Save,
    *,
    lanes: int = 1,
    start_until: float = float("inf"),
    end: float = float("inf"),
    log: int | None = None,
) -> list[Piece]:
    """Runs the pieces in order, `lanes` at the same time, and returns those that no time was left for.

    Args:
        save: called with the rows of a case as they come.
        start_until, end: of `time.monotonic()`: no piece starts after the first, and none runs after the second.
        log: file descriptor that what the processes print goes to.
    """
    waiting, running, late = deque(pieces), set[_Running](), list[Piece]()
    try:
        while True:
            while waiting and len(running) < lanes and time.monotonic() < min(start_until, end):
                running.add(_Running(waiting.popleft(), session, save, log))
            if not running:
                return [*late, *waiting]
            soonest = min(end, *(one.until for one in running)) - time.monotonic()
            wait([ready for one in running for ready in one.child.ends], timeout=min(max(soonest, 0.0), 1.0))
            for one in list(running):
                ended = one.listen()
                if ended is None and time.monotonic() > end:
                    one.child.kill()
                    late.append(dataclasses.replace(one.piece, cases=one.piece.cases[one.index :]))
                    running.remove(one)
                elif ended is not None:
                    running.remove(one)
                    if ended:
                        one.failed(ended)
                        if rest := one.rest():
                            waiting.appendleft(rest)
    finally:
        for one in running:
            one.child.kill()
