"""Delays Ctrl-C and SIGTERM, which batch queues send, until a run can be saved."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """Raised by a signal inside `Interrupts.at_once`, and by `mean_loss` when it is told to stop."""


class Interrupts:
    """A context manager. Inside it, the first SIGINT or SIGTERM sets `caught`, and inside `at_once` also raises
    Interrupted; a second SIGINT raises KeyboardInterrupt.

    It has no effect outside the main thread, which alone receives signals.
    """

    def __init__(self) -> None:
        self.caught = False
        self._at_once = False
        self._before: dict[int, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.caught = True
        if self._at_once:
            self._at_once = False
            raise Interrupted

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a signal raises Interrupted at once. It is for work that takes long and changes nothing before it is
        finished: a validation."""
        self._at_once = True
        try:
            if self.caught:
                raise Interrupted
            yield
        finally:
            self._at_once = False

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
