"""Takes the programs and offsets of all steps; gives memory for the rows that are still to be read: `Ring`.

What every step reads and writes is known before any image is drawn. A value of which a step and all later ones touch a
few rows only keeps a ring of rows; where a step would reach beyond its end, the rows still to be read move to its
beginning first.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastgen.sampling.machine.language import Memory, Program, views_of
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


@dataclass(eq=False)
class _Touched:
    """Rows from `low` to `high` that each step touches; `high` is -1 where it touches none.

    still: whether a step has a view of it whose offset is the same at all steps, so that its rows cannot move.
    """

    low: np.ndarray
    high: np.ndarray
    still: np.ndarray


def make_rings(candidates: Iterable[Candidate], programs: Sequence[Program], steps: Steps) -> dict[Memory, Ring]:
    """Rings by their memory, for those candidates that fit one; moves the offsets of the steps into them.

    Args:
        candidates: the values.
    """
    layouts: dict[Memory, Layout] = {}
    touched: dict[Memory, _Touched] = {}
    written: dict[Memory, dict[int, int]] = {}
    for candidate in candidates:
        memory, layout = candidate.memory, candidate.layout
        one = _Touched(np.full(len(steps), 2**31), np.full(len(steps), -1), np.zeros(len(steps), dtype=bool))
        first_row = layout.before[layout.order[0]]
        if candidate.begun:
            one.low[0], one.high[0] = first_row, first_row + candidate.begun - 1
        written[memory] = {first_row + row: step for row, step in candidate.written.items()}
        layouts[memory], touched[memory] = layout, one
    served = [np.array([k for k, step in enumerate(steps) if step.program == p]) for p in range(len(programs))]
    _touch(touched, layouts, programs, served, steps)
    rings = {}
    firsts: dict[Memory, np.ndarray] = {}
    for key, found in touched.items():
        ring = _ring(layouts[key], found)
        early = any(((found.low <= row) & (found.high >= row))[:step].any() for row, step in written[key].items())
        if ring is not None and not early:
            first = np.zeros(len(steps), dtype=np.int64)
            for move in ring.moves:
                first[move.step :] += move.first
            if not first[found.still].any():
                rings[key], firsts[key] = ring, first * ring.pitch
    for program, of_program in zip(programs, served, strict=True):
        moved = [(number, firsts[view.memory]) for number, view in enumerate(program.moving()) if view.memory in rings]
        for step in of_program.tolist() if moved else ():
            steps[step].offsets[[number for number, _ in moved]] -= [first[step] for _, first in moved]
    return rings


def _touch(
    touched: dict[Memory, _Touched],
    layouts: dict[Memory, Layout],
    programs: Sequence[Program],
    served: Sequence[np.ndarray],
    steps: Steps,
) -> None:
    """Adds what the steps touch."""
    for program, of_program in zip(programs, served, strict=True):
        moving = {view: number for number, view in enumerate(program.moving())}
        offsets = np.array([steps[step].offsets for step in of_program.tolist()])
        views = {view for instruction in program.instructions for view in views_of(instruction)}
        for view in views:
            if view.memory not in layouts:
                continue
            one = touched[view.memory]
            if view in moving:
                first = offsets[:, moving[view]]
            else:
                first = np.full(len(of_program), view.offset.at(()))
                one.still[of_program] = True
            layout = layouts[view.memory]
            pitch = layout.strides[layout.order[0]]
            one.low[of_program] = np.minimum(one.low[of_program], first // pitch)
            one.high[of_program] = np.maximum(one.high[of_program], (first + view.span) // pitch)


def _ring(layout: Layout, touched: _Touched) -> Ring | None:
    needed = np.minimum.accumulate(touched.low[::-1])[::-1]  # the first row that a step or a later one touches
    outer = layout.order[0]
    window = int((touched.high - needed + 1).max())
    rows = ROOM * window
    last = layout.before[outer] + layout.shape[outer] - 1
    if rows >= layout.room[outer] or int(touched.high.max()) > last:  # rows after the last must stay zero
        return None
    moves = []
    first = top = 0
    for step in np.flatnonzero(touched.high >= 0).tolist():
        if touched.high[step] >= first + rows:
            begin = int(needed[step])
            moves.append(Move(step, begin - first, max(begin, top + 1) - first))
            first = begin
        top = max(top, int(touched.high[step]))
    return Ring(layout, rows, tuple(moves))
