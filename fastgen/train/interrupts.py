"""Delays Ctrl-C and SIGTERM (which queues send) until a moment at which a run can be saved."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """Raised inside `Interrupts.at_once`."""


class Interrupts:
    """While it is entered, the first SIGINT or SIGTERM only sets `caught`, or, inside `at_once`, also raises
    Interrupted; a second SIGINT raises KeyboardInterrupt.

    Does nothing outside the main thread, where signals are not to be had.
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
        """Inside, an interrupt ends the work at once: it may take long, and changes nothing until it is done."""
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
