"""Tasks, each in a process of its own: what crashes, hangs or breaks the GPU's context takes nothing else with it.

Processes are forks: everything is imported once, here, and no process waits for it. A fork of a process that has used
CUDA cannot use it, so that this one never does: what is to be known of the GPU, a child finds out. A child only tells;
this process keeps and writes what it hears.
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
Tell = Callable[[str, Any], Any]  # takes a kind of news, and the news


class Task:
    """What a process does, and what is made of it here.

    Attributes:
        patience: seconds that it may be silent.
    """

    patience = 60.0

    def work(self, tell: Tell) -> None:
        """All of it, in the process."""
        raise NotImplementedError

    def hear(self, kind: str, news: Any) -> None:
        """Takes in, here, what the process has told."""

    def died(self, how: str) -> Any:
        """Called here when the process ended before `work` did, or is silent; returns the task of the same kind that
        goes on instead, if any."""


T = TypeVar("T", bound=Task)


class Child(Generic[T]):
    """The process of a task."""

    def __init__(self, task: T, log: int | None = None) -> None:
        self.task, self.until = task, time.monotonic() + task.patience
        self.news, theirs = FORK.Pipe(duplex=False)
        self.process = FORK.Process(target=self._run, args=(theirs, log, os.getpid()))
        self.process.start()
        theirs.close()

    def _run(self, news: Connection, log: int | None, parent: int) -> None:
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
            self.task.work(lambda kind, value: news.send((kind, value)))
            news.send(("end", ""))
        except BaseException as error:
            news.send(("end", f"{type(error).__name__}: {error}"))
        os._exit(0)  # without what else this process inherited to do at its end

    @property
    def ends(self) -> list[Any]:
        """What is ready when there is news, or the process has ended."""
        return [self.news, self.process.sentinel]

    def _heard(self) -> Iterator[tuple[str, Any]]:
        """All news so far; ("end", how) is the last where the process has ended, and "" says that its work is done."""
        with contextlib.suppress(EOFError, OSError):
            while self.news.poll():
                yield self.news.recv()
            if self.process.is_alive():
                return
        self.process.join()
        code = self.process.exitcode or 0
        yield "end", f"killed by {signal.Signals(-code).name}" if code < 0 else f"the process ended with status {code}"

    def listen(self) -> str | None:
        """Passes the news on to the task. How the process has ended, or None while it goes on."""
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
    """Ends this process soon after its parent has ended, however that came."""
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
    """Runs the tasks in order, `lanes` at the same time, and returns those that no time was left for.

    Args:
        start_until, end: of `time.monotonic()`: no task starts after the first, and none runs after the second.
        log: file descriptor that what the processes print goes to.
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
    """`answer` is what `ask` returns in the process, `problem` why there is none."""

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
    """What `ask` returns in a process of its own.

    Raises:
        ValueError: it failed or took too long; the text says how.
    """
    question = _Question(ask, patience)
    run([question])
    if question.problem:
        raise ValueError(question.problem)
    return question.answer
