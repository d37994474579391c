"""Takes how long draws took with some threads; gives the number of threads for the next ones."""

from collections import deque
from statistics import median

TRIED_EVERY = 32  # turns after which another number than the quickest is tried again
REMEMBERED = 3  # times of each number, of which the median counts: one of them may have been interrupted


class Pace:
    """How many threads are quickest is measured, since they wait for each other: what that takes depends on the
    processor, and on what else it runs.

    Args:
        most: threads. These are tried, half of them, and so on to one.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._turns = 0
        self._seconds = {most >> k: deque[float](maxlen=REMEMBERED) for k in range(most.bit_length())}

    def threads(self) -> int:
        """For the next turn."""
        numbers = list(self._seconds)
        self._turns += 1
        if self._turns <= len(numbers):
            return numbers[self._turns - 1]
        if self._turns % TRIED_EVERY == 0:
            return numbers[self._turns // TRIED_EVERY % len(numbers)]
        return min(numbers, key=lambda number: median(self._seconds[number]))

    def took(self, threads: int, seconds: float) -> None:
        """How long a draw took in a turn with so many threads."""
        self._seconds[threads].append(seconds)
