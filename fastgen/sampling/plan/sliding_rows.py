"""Takes the programs and offsets of all steps; gives memory for the rows that are still to be read: `Ring`.

What every step reads and writes is known before any image is drawn. A value of which a step and all later ones touch a
few rows only keeps a ring of rows; where a step would reach beyond its end, the rows still to be read move to its
beginning first.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastgen.sampling.machine.language import Memory, Program, View
from fastgen.sampling.plan.layout import Layout

ROOM = 2  # windows that a ring holds: rows move once in as many steps of a row as a window has
Steps = Sequence[Any]  # of a plan


@dataclass(frozen=True)
class Move:
    """Before `step`, rows from `first` to before `stop` of the ring go to its beginning."""

    step: int
    first: int
    stop: int


@dataclass(frozen=True, eq=False)
class Ring:
    """Attributes:
    layout: of the whole value; rows are along the outermost dimension, padding included.
    rows: that there is memory for.
    moves: in the order of their steps.
    """

    layout: Layout
    rows: int
    moves: tuple[Move, ...]

    @property
    def pitch(self) -> int:
        """Numbers in a row."""
        return self.layout.strides[self.layout.order[0]]

    @property
    def numel(self) -> int:
        return self.rows * self.pitch

    def first_row(self, step: int) -> int:
        """The row of the value that the ring begins with, when a step runs."""
        return sum(move.first for move in self.moves if move.step <= step)


@dataclass(frozen=True)
class Candidate:
    """A value that a ring may hold a part of.

    Attributes:
        begun: rows from the first on that hold constants which are there from the beginning.
        written: a later row that holds constants -> the step that writes them, with others of the row.
    """

    memory: Memory
    layout: Layout
    begun: int
    written: dict[int, int]


class _Rows:
    """When the rows of a candidate live: from the first step that touches one to the last.

    Attributes:
        low, high: of each step the first and the last row that it touches; `high` is -1 where it touches none.
        still: whether a step has a view of it whose offset is the same at all steps, so that its rows cannot move.
    """

    def __init__(self, candidate: Candidate, steps: int) -> None:
        self.layout = candidate.layout
        self.low, self.high, self.still = np.full(steps, 2**31), np.full(steps, -1), np.zeros(steps, dtype=bool)
        outer = self.layout.order[0]
        self.pitch, before = self.layout.strides[outer], self.layout.before[outer]
        self.last = before + self.layout.shape[outer] - 1
        self.written = {before + row: step for row, step in candidate.written.items()}
        if candidate.begun:
            self.low[0], self.high[0] = before, before + candidate.begun - 1

    def touch(self, steps: np.ndarray, view: View, begins: np.ndarray | None) -> None:
        """Adds a view that these steps have; it begins there, or at one place for all where that is None."""
        self.still[steps] |= begins is None
        first = np.array(view.offset.at(())) if begins is None else begins
        self.low[steps] = np.minimum(self.low[steps], first // self.pitch)
        self.high[steps] = np.maximum(self.high[steps], (first + view.span) // self.pitch)

    def ring(self) -> Ring | None:
        needed = np.minimum.accumulate(self.low[::-1])[::-1]  # the first row that a step or a later one touches
        rows = ROOM * int((self.high - needed + 1).max())
        room = self.layout.room[self.layout.order[0]]
        if not 0 < rows < room or self.high.max() > self.last:  # what follows must stay zero
            return None
        if any(((self.low <= row) & (self.high >= row))[:step].any() for row, step in self.written.items()):
            return None
        moves: list[Move] = []
        tops, first = np.maximum.accumulate(self.high), 0  # the last row touched so far, at each step
        while (step := int(np.searchsorted(tops, first + rows))) < len(tops):
            begin, top = int(needed[step]), max(int(tops[step - 1]), 0) if step else 0
            moves.append(Move(step, begin - first, max(begin, top + 1) - first))
            first = begin
        fixed = bool(moves) and self.still[moves[0].step :].any()
        return None if fixed else Ring(self.layout, rows, tuple(moves))


def make_rings(candidates: Iterable[Candidate], programs: Sequence[Program], steps: Steps) -> dict[Memory, Ring]:
    """Rings by their memory, for those candidates that fit one; moves the offsets of the steps into them."""
    found = {one.memory: _Rows(one, len(steps)) for one in candidates}
    served = [np.array([k for k, step in enumerate(steps) if step.program == p]) for p in range(len(programs))]
    for program, of_program in zip(programs, served, strict=True):
        offsets = np.array([steps[step].offsets for step in of_program.tolist()])
        moving = dict(zip(program.moving(), offsets.T, strict=True))
        for view in {view for views in program.views for view in views if view.memory in found}:
            found[view.memory].touch(of_program, view, moving.get(view))
    rings = {memory: ring for memory, rows in found.items() if (ring := rows.ring()) is not None}
    firsts = {memory: np.zeros(len(steps), dtype=np.int64) for memory in rings}  # numbers before those that it holds
    for memory, ring in rings.items():
        for move in ring.moves:
            firsts[memory][move.step :] += move.first * ring.pitch
    for program, of_program in zip(programs, served, strict=True):
        moved = [(number, firsts[view.memory]) for number, view in enumerate(program.moving()) if view.memory in rings]
        numbers, of_all = [number for number, _ in moved], np.array([first for _, first in moved])
        for step in of_program.tolist() if moved else ():
            steps[step].offsets[numbers] -= of_all[:, step]
    return rings
