"""Runs tasks, each in its own process: one that crashes, hangs or breaks the GPU's context does not affect the others.

Processes are forked, so that modules are imported only once, in the parent. Forks of a process that has initialized
CUDA cannot use it; the parent therefore never does, and children answer questions about the GPU. Children send
messages; the parent keeps and writes the results.
"""

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

FORK = multiprocessing.get_context("fork")
Tell = Callable[[str, Any], Any]  # sends a message to the parent: its kind and its content


class Task:
    """The work of a child process, and what the parent does with its messages.

    Attributes:
        patience: seconds without a message after which the child is killed.
    """

    patience = 60.0

    def work(self, tell: Tell) -> None:
        """The work, in the child process."""
        raise NotImplementedError

    def hear(self, kind: str, news: Any) -> None:
        """Handles a message of the child, in the parent."""

    def died(self, how: str) -> Any:
        """Called in the parent if the child ended before its work was done, or was killed. Returns a task that
        continues the work in a new process, or None."""


T = TypeVar("T", bound=Task)


class Child(Generic[T]):
    """The child process of a task, seen from the parent. `log` is a file descriptor for what the child prints."""

    def __init__(self, task: T, log: int | None = None) -> None:
        self.task, self.until = task, time.monotonic() + task.patience
        self.news, theirs = FORK.Pipe(duplex=False)
        self.process = FORK.Process(target=self._run, args=(theirs, log, os.getpid()))
        self.process.start()
        theirs.close()

    def _run(self, news: Connection, log: int | None, parent: int) -> None:
        os.setpgid(0, 0)  # a process group with the processes it starts, such as compilers, to kill them together
        gc.freeze()  # otherwise each collection scans all imported modules, which takes a second
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its children
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
        if log is not None:
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.stdout = sys.stderr = os.fdopen(
                log, "w", buffering=1, closefd=False
            )  # also if the parent replaced them
            faulthandler.enable(log)
        try:
            self.task.work(lambda kind, value: news.send((kind, value)))
            news.send(("end", ""))
        except BaseException as error:
            news.send(("end", f"{type(error).__name__}: {error}"))
        os._exit(0)  # skips the exit handlers that were inherited from the parent

    @property
    def ends(self) -> list[Any]:
        """Objects for `multiprocessing.connection.wait`, ready if there is a message or the process has ended."""
        return [self.news, self.process.sentinel]

    def _heard(self) -> Iterator[tuple[str, Any]]:
        """All messages so far. If the process has ended, the last one is ("end", how), where "" means success."""
        with contextlib.suppress(EOFError, OSError):
            while self.news.poll():
                yield self.news.recv()
            if self.process.is_alive():
                return
        self.process.join()
        code = self.process.exitcode or 0
        yield "end", f"killed by {signal.Signals(-code).name}" if code < 0 else f"the process ended with status {code}"

    def listen(self) -> str | None:
        """Passes the messages on to the task. Returns how the process has ended ("" means success), or None if it still
        runs."""
        for kind, news in self._heard():
            self.until = time.monotonic() + self.task.patience
            if kind == "end":
                return news
            self.task.hear(kind, news)
        return f"no result within {self.task.patience:.0f} s" if time.monotonic() > self.until else None

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid or 0, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.news.close()


def _end_with(parent: int) -> None:
    """Ends this process soon after its parent has ended, for whatever reason."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def run(
    tasks: Iterable[T],
    *,
    lanes: int = 1,
    start_until: float = float("inf"),
    end: float = float("inf"),
    log: int | None = None,
) -> list[T]:
    """Runs the tasks in order and returns those for which no time was left.

    Args:
        lanes: number of tasks that run at the same time.
        start_until: no task starts after this value of `time.monotonic()`.
        end: tasks that still run at this value are killed, and returned.
        log: file descriptor for what the processes print.
    """
    waiting, running, late = deque(tasks), set[Child[T]](), list[T]()
    try:
        while True:
            while waiting and len(running) < lanes and time.monotonic() < min(start_until, end):
                running.add(Child(waiting.popleft(), log))
            if not running:
                return [*late, *waiting]
            soonest = min(end, *(child.until for child in running)) - time.monotonic()
            wait([ready for child in running for ready in child.ends], timeout=min(max(soonest, 0.0), 1.0))
            for child in list(running):
                how = child.listen()
                if how is None and time.monotonic() <= end:
                    continue
                running.remove(child)
                child.kill()
                if how is None:
                    late.append(child.task)
                elif how and (rest := child.task.died(how)):
                    waiting.appendleft(rest)
    finally:
        for child in running:
            child.kill()


class _Question(Task):
    """Calls `ask` in the child. `answer` is its result, `problem` the reason why there is none."""

    def __init__(self, ask: Callable[[], Any], patience: float) -> None:
        self.ask, self.patience = ask, patience
        self.answer, self.problem = None, ""

    def work(self, tell: Tell) -> None:
        tell("answer", self.ask())

    def hear(self, kind: str, news: Any) -> None:
        self.answer = news

    def died(self, how: str) -> None:
        self.problem = how.removeprefix("ValueError: ")


def in_a_process(ask: Callable[[], Any], patience: float = 120.0) -> Any:
    """Calls `ask` in its own process and returns the result.

    Raises:
        ValueError: it raised, crashed or took longer than `patience` seconds; the message says how.
    """
    question = _Question(ask, patience)
    run([question])
    if question.problem:
        raise ValueError(question.problem)
    return question.answer
