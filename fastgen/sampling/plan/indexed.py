"""Operands whose elements no affine map describes: where each lies, and what moves from step to step.

Example: heads of attention that are flattened, (heads, T, 4) -> (T, heads * 4). At step t row t is read: elements
4 * T * head + 4 * t + k of a block. Their distances are the same at all steps, so that one program serves them all, and
a step has but the place of the first one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fastgen.sampling.machine.language import AffineOffset
from fastgen.sampling.trace.graph import Operand, Value, coordinates

Region = Sequence[tuple[AffineOffset, int, int]]  # first element, number of elements and step along each dimension


@dataclass(eq=False)
class Indexed:
    """Attributes:
    values: that the elements of an operand belong to.
    which: number of the value in `values`, of the operand's shape.
    places: in the block of the value, of the operand's shape.
    """

    values: list[Value]
    which: np.ndarray
    places: np.ndarray

    @staticmethod
    def of(operand: Operand, strides: Callable[[Value], tuple[tuple[int, ...], int]]) -> "Indexed":
        """strides: of a value in its block, and the place of its first element."""
        assert operand.ids is not None
        graph, ids = operand.graph, operand.ids
        values = operand.values
        which, places = torch.zeros(operand.numel, dtype=torch.long), torch.zeros(operand.numel, dtype=torch.long)
        if bool((ids == 0).any()):  # the zero outside of images
            values = [graph.zero(values[0].data.dtype if values else torch.float32), *values]
        for number, (value, inside, elements) in enumerate(operand.parts, len(values) - len(operand.parts)):
            along, origin = strides(value)
            which[inside] = number
            places[inside] = origin + coordinates(elements, value.shape) @ torch.tensor(along, dtype=torch.long)
        return Indexed(values, which.view(ids.shape).numpy(), places.view(ids.shape).numpy())


@dataclass(eq=False)
class IndexedRead:
    """A region of an operand that a task of a program reads.

    Attributes:
        listed: number of the first place among the step's listed offsets, for each value of `numbers`.
    """

    indexed: Indexed
    task: int
    region: Region
    numbers: list[int]
    listed: list[int]

    def at(self, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`which` and `places` of the region for several starts of the task's box, (steps, *sizes)."""
        index = []
        for d, (first, size, step) in enumerate(self.region):
            shape = [len(starts), *(size if k == d else 1 for k in range(len(self.region)))]
            along = first.over(starts)[:, None] + step * np.arange(size)
            index.append(along.reshape(shape))
        if not index:
            return np.repeat(self.indexed.which[None], len(starts)), np.repeat(self.indexed.places[None], len(starts))
        return self.indexed.which[tuple(index)], self.indexed.places[tuple(index)]

    def over(self, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which steps read as the first one does but for where it begins, and the first places (steps, values)."""
        which, places = self.at(starts)
        fits = (which == which[:1]).reshape(len(starts), -1).all(1)
        firsts = []
        for number in self.numbers:
            of_value = places[:, which[0] == number].reshape(len(starts), -1)
            first = of_value.min(1)
            fits &= (of_value - first[:, None] == of_value[0] - first[0]).all(1)
            firsts.append(first)
        return fits, np.stack(firsts, 1)
