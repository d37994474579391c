"""What instructions read and write: views of blocks of numbers, and where they begin from step to step."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class AffineOffset:
    """const + sum_d coefficients[d] * start[d], where start is that of a box that the step computes."""

    const: int | Fraction
    coefficients: tuple[int | Fraction, ...] = ()

    @staticmethod
    def weighted(const: int | Fraction, terms: Iterable[tuple["AffineOffset", int]]) -> "AffineOffset":
        """const + the sum of offsets times their weights"""
        terms = [one for one in terms if one[1]]
        if len(terms) == 1 and terms[0][1] == 1:
            return terms[0][0] + const
        coefficients: list[int | Fraction] = []
        for offset, weight in terms:
            const += offset.const * weight
            coefficients += [0] * (len(offset.coefficients) - len(coefficients))
            for k, coefficient in enumerate(offset.coefficients):
                if coefficient:
                    coefficients[k] += coefficient * weight
        return AffineOffset(const, tuple(coefficients))

    def __add__(self, other: "AffineOffset | int | Fraction") -> "AffineOffset":
        if not isinstance(other, AffineOffset):
            return AffineOffset(self.const + other, self.coefficients) if other else self
        return AffineOffset.weighted(0, ((self, 1), (other, 1)))

    def __mul__(self, factor: int | Fraction) -> "AffineOffset":
        return AffineOffset(self.const * factor, tuple(factor * c for c in self.coefficients))

    def at(self, start: Sequence[int]) -> int:
        found = self.const + sum(c * s for c, s in zip(self.coefficients, start, strict=False))
        assert found == int(found)
        return int(found)

    def over(self, starts: np.ndarray) -> np.ndarray:
        """At many starts (steps, dimensions)."""
        used = np.array([float(c) for c in self.coefficients])
        return np.rint(float(self.const) + starts[:, : len(used)] @ used).astype(np.int64)


@dataclass(frozen=True)
class Memory:
    """A block of numbers for each image, or for all images together.

    Attributes:
        kind: "stored" (a value of the network, from step to step), "scratch" (within a program) or "constant".
        number: which one of its kind; of "scratch", which one of its program.
        numel: numbers for one image.
        data: of a constant, flat.
        source: of a constant, the tensor that `data` was copied from.
    """

    kind: str
    number: int
    numel: int
    dtype: torch.dtype
    data: Tensor | None = field(default=None, compare=False)
    source: Tensor | None = field(default=None, compare=False)


@dataclass(frozen=True)
class View:
    """Part of a memory: sizes and strides without the images' own, and where it begins.

    Attributes:
        offset: of its first element, in the start of the box of `task`.
        task: which of a step's boxes; values that are computed in the same box share it.
        listed: comes to the offset where no formula gives all of it: its number among the listed ones of a step.
    """

    memory: Memory
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: AffineOffset
    task: int
    listed: int | None = None

    @property
    def moves(self) -> bool:
        """Whether it begins elsewhere at another step."""
        return self.listed is not None or any(self.offset.coefficients)

    @property
    def numel(self) -> int:
        return torch.Size(self.sizes).numel()

    @property
    def span(self) -> int:
        """From its first element to its last."""
        return sum(stride * (size - 1) for size, stride in zip(self.sizes, self.strides, strict=True))

    def as_strided(self, sizes: Sequence[int], strides: Sequence[int], offset: AffineOffset | None = None) -> "View":
        """Another part of the memory; it begins where this one does if no offset is given."""
        offset = self.offset if offset is None else offset
        return View(self.memory, tuple(sizes), tuple(strides), offset, self.task, self.listed)

    def order(self, dims: Sequence[int]) -> "View":
        """The view with these of its dimensions, in this order; those left out have size 1."""
        return self.as_strided([self.sizes[d] for d in dims], [self.strides[d] for d in dims])

    def expand(self, sizes: Sequence[int]) -> "View":
        """Broadcast to more dimensions in front, and along those of size 1."""
        extra = len(sizes) - len(self.sizes)
        have, strides = (1,) * extra + self.sizes, (0,) * extra + self.strides
        kept = zip(have, sizes, strides, strict=True)
        return self.as_strided(sizes, [0 if old != new else stride for old, new, stride in kept])

    def narrow(self, dim: int, start: int, size: int, step: int = 1) -> "View":
        sizes, strides = list(self.sizes), list(self.strides)
        sizes[dim], strides[dim] = size, strides[dim] * step
        return self.as_strided(sizes, strides, self.offset + start * self.strides[dim])

    def unsqueeze(self, dim: int) -> "View":
        sizes, strides = list(self.sizes), list(self.strides)
        sizes.insert(dim, 1)
        strides.insert(dim, 0)
        return self.as_strided(sizes, strides)

    def collapse(self) -> "View":
        """With neighbouring dimensions as one where they lie in memory as one, and without those of size 1."""
        sizes: list[int] = []
        strides: list[int] = []
        for size, stride in zip(self.sizes, self.strides, strict=True):
            if size == 1:
                continue
            if sizes and strides[-1] == size * stride:
                sizes[-1], strides[-1] = sizes[-1] * size, stride
            else:
                sizes.append(size)
                strides.append(stride)
        return self.as_strided(sizes, strides)


_numbers = itertools.count()


def constant(source: Tensor, sizes: Sequence[int] | None = None) -> View:
    """All of a tensor that is the same for all images and steps, with other sizes where some are given."""
    sizes = source.shape if sizes is None else sizes
    data = source.clone(memory_format=torch.contiguous_format)  # at the beginning of a storage of its own
    memory = Memory("constant", next(_numbers), data.numel(), data.dtype, data.reshape(-1), source)
    return View(memory, tuple(sizes), dense_strides(sizes), AffineOffset(0), 0)


def dense_strides(sizes: Sequence[int], order: Sequence[int] | None = None) -> tuple[int, ...]:
    """Strides of a contiguous tensor that has its dimensions in this order, by dimension."""
    found, stride = [0] * len(sizes), 1
    for d in reversed(range(len(sizes)) if order is None else order):
        found[d] = stride
        stride *= sizes[d]
    return tuple(found)
