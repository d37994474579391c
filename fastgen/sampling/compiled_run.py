"""The steps of a run with their programs compiled by `torch.compile`, which keeps what it has compiled on disk."""

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from fastgen.sampling.run import Run

Step = Callable[[list[Any]], None]
WORTH_COMPILING = 16  # steps that a program serves; compiling takes as long as thousands of them


class CompiledRun(Run):
    def bound(self) -> list[Step]:
        plain = super().bound()
        uses = Counter(number for number, _ in self.plan.steps)
        found = []
        for number, program in enumerate(self.plan.programs):
            step = plain[number]
            if uses[number] >= WORTH_COMPILING:
                functional = program.bind(self.n, self.block, self.on_device, functional=True)
                step = _guarded(torch.compile(functional, dynamic=True), step)
            found.append(step)
        return found


def _guarded(compiled: Step, plain: Step) -> Step:
    """The compiled step; the plain one for good where there is no compiler, or it fails. Steps may run twice."""
    chosen = [compiled]

    def step(offsets: list[Any]) -> None:
        try:
            chosen[0](offsets)
        except Exception as error:
            if chosen[0] is plain:
                raise
            warnings.warn(f"a step program runs uncompiled: {type(error).__name__}: {error}", stacklevel=2)
            chosen[0] = plain
            plain(offsets)

    return step
