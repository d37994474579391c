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

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


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
        _end_with(parent)
        if log is not None:
            os.dup2(log, 1)
            os.dup2(log, 2)
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

    def __init__(self, piece: Piece, session: Session, log: int | None) -> None:
        self.piece = piece
        self.session = dataclasses.replace(session, timing=piece.timing, threads=piece.threads or session.threads)
        self.index, self.provider = 0, None
        self.kernels: list[str] = []  # launched by the provider, one a launch
        self.rows: list[Row] = []  # of the case
        self.until = time.monotonic() + piece.patience
        self.child = Child(self._work, log)

    @property
    def case(self) -> Case:
        return self.piece.cases[self.index]

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

    def hear(self, kind: str, value: Any) -> None:
        if kind == "case":
            self.index, self.provider, self.kernels, self.rows = value, None, [], []
        elif kind == "doing":
            self.provider, self.kernels = value, []
        elif kind == "kernel":
            self.kernels.append(value)
        elif kind == "row":
            self.rows.append(value)
        self.until = time.monotonic() + self.piece.patience

    def failed(self, problem: str) -> list[Row]:
        """The rows of what it was doing when it died (of all providers, where it was none's), without those before."""
        done = {(row["provider"], row["mode"]) for row in self.rows}
        case, session = self.case, self.session
        checked = Checked(problem, launched=self.kernels)
        names = list(case.providers) if self.provider is None else [self.provider]
        missing = [(n, mode) for n in names for mode in case.timed_modes(n) if (n, mode) not in done]
        return [empty_row(case, session, name, mode, checked) for name, mode in missing]

    def rest(self) -> Piece | None:
        """What is left to do without the provider that died: the providers that lack a row (of a mode, all or none)."""
        case, later = self.case, self.piece.cases[self.index + 1 :]
        done = {(row["provider"], row["mode"]) for row in self.rows}
        others = [name for name in case.providers if self.provider not in (None, name)]
        lacking = [name for name in others if any((name, mode) not in done for mode in case.timed_modes(name))]
        if lacking:
            later = [case.only(lacking), *later]
        return dataclasses.replace(self.piece, cases=later) if later else None


def run(
    pieces: Iterable[Piece],
    session: Session,
    save: Callable[[Case, list[Row]], Any],
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
    waiting, running, late = deque(pieces), set[_Running](), []
    try:
        while waiting or running:
            while waiting and len(running) < lanes and time.monotonic() < min(start_until, end):
                running.add(_Running(waiting.popleft(), session, log))
            if not running:
                break
            now = time.monotonic()
            soonest = min(min(one.until for one in running), end)
            wait([ready for one in running for ready in one.child.ends], timeout=min(max(soonest - now, 0.0), 1.0))
            for one in list(running):
                ended = _listen(one, save, log)
                if ended is None and time.monotonic() > min(one.until, end):
                    one.child.kill()
                    if time.monotonic() > end:
                        late.append(dataclasses.replace(one.piece, cases=one.piece.cases[one.index :]))
                        running.remove(one)
                        continue
                    ended = f"no result within {one.piece.patience:.0f} s"
                if ended is not None:
                    running.remove(one)
                    if ended:
                        save(one.case, one.failed(ended))
                        if rest := one.rest():
                            waiting.appendleft(rest)
        return [*late, *waiting]
    finally:
        for one in running:
            one.child.kill()


def _listen(one: _Running, save: Callable[[Case, list[Row]], Any], log: int | None) -> str | None:
    """Takes in what the process has told. How it died; "" if it is done, None if it goes on."""
    ended = None
    for kind, value in one.child.heard():
        if kind in ("done", "failed"):
            ended = "" if kind == "done" else value
        elif kind == "end":
            ended = value if ended is None else ended
        elif kind == "log":
            os.write(sys.stderr.fileno() if log is None else log, f"{one.case.title}\n{value}\n".encode())
        else:
            one.hear(kind, value)
            if kind == "row":
                save(one.case, [value])
    if ended is not None:
        one.child.kill()
    return ended
