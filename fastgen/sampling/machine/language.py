"""The step language: what a plan is written in, and what every player plays.

A step computes what the level drawn last decides. It runs a *program*, a list of instructions:

    Product    out (..., N) = rows (..., K) @ weight (K, N) + added
    Pointwise  out = op(inputs), element by element; "copy" is one of the ops
    Rowwise    out = op(source) along the last dimension, a softmax for example
    Lookup     out (..., D) = table (R, D)[index (...)]
    Call       a function of torch, for what has no instruction

What an instruction reads and writes is a `View` of a `Memory`. A program serves all steps that compute boxes of the
same sizes: such steps differ in nothing but where their views begin. Example: a 1x3 convolution over a row of pixels
that hold 8 channels each is, pixel after pixel, the product of 24 numbers with a (24, N) weight; its view of the row
begins at 8 * (column - 1), an `AffineOffset` of the start of the box that the step computes.

No two instructions of a program need to be told apart by more than their fields: equal programs compare equal.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class AffineOffset:
    """const + sum_d coefficients[d] * start[d], where start is that of a box that the step computes."""

    const: int | Fraction
    coefficients: tuple[int | Fraction, ...] = ()

    @staticmethod
    def weighted(const: int | Fraction, terms: Iterable[tuple["AffineOffset", int]]) -> "AffineOffset":
        """const + the sum of offsets times their weights"""
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
            return AffineOffset(self.const + other, self.coefficients)
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


# --- instructions


@dataclass(frozen=True)
class Product:
    """out (..., N) = rows (..., K) @ weight + added.

    Attributes:
        weight: (K, N), or (..., K, N) for out (..., M, N) and rows (..., M, K).
        added: None, or what broadcasts to `out`.
    """

    out: View
    rows: View
    weight: View
    added: View | None = None

    @property
    def inputs(self) -> tuple[View, ...]:
        return (self.rows, self.weight) if self.added is None else (self.rows, self.weight, self.added)

    @property
    def multiply_adds(self) -> int:
        return self.out.numel * self.rows.sizes[-1]


@dataclass(frozen=True)
class Pointwise:
    """out = op(inputs), which broadcast to `out` or are numbers. The ops are those of `machine.definitions`."""

    op: str
    out: View
    operands: tuple[View | float, ...]

    @property
    def inputs(self) -> tuple[View, ...]:
        return tuple(one for one in self.operands if isinstance(one, View))


@dataclass(frozen=True)
class Rowwise:
    """out = op(source, numbers) along the last dimension of `source`."""

    op: str
    out: View
    source: View
    numbers: tuple[float, ...] = ()

    @property
    def inputs(self) -> tuple[View, ...]:
        return (self.source,)


@dataclass(frozen=True)
class Lookup:
    """out (..., D) = table[index]; table (R, D), of each image or the same for all; index (...) int64."""

    out: View
    table: View
    index: View

    @property
    def inputs(self) -> tuple[View, ...]:
        return (self.table, self.index)


@dataclass(frozen=True)
class Temporary:
    """The result of a call that makes a tensor of its own."""

    number: int


@dataclass(frozen=True, eq=False)
class Fixed:
    """A tensor among the arguments of a call, the same at all steps."""

    tensor: Tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fixed) and self.tensor is other.tensor

    def __hash__(self) -> int:
        return id(self.tensor)


@dataclass(frozen=True)
class Call:
    """function(*args, **kwargs), with views, temporaries and `Fixed` in the place of tensors. It writes its first
    argument, a view, and no other, where it has no result."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()
    result: Temporary | None = None

    @property
    def leaves(self) -> list[Any]:
        return _leaves((self.args, tuple(value for _, value in self.kwargs)))

    @property
    def views(self) -> tuple[View, ...]:
        """What it may read or write."""
        return tuple(one for one in self.leaves if isinstance(one, View))


Instruction = Product | Pointwise | Rowwise | Lookup | Call


def views_of(instruction: Instruction) -> tuple[View, ...]:
    return instruction.views if isinstance(instruction, Call) else (instruction.out, *instruction.inputs)


def _leaves(arguments: Any) -> list[Any]:
    if isinstance(arguments, (list, tuple)):
        return [leaf for one in arguments for leaf in _leaves(one)]
    return [arguments]


def lives(uses: Iterable[Iterable[T]]) -> dict[T, tuple[int, int]]:
    """Where in a sequence each thing is used first and last: it lives from the one to the other, both included."""
    found: dict[T, tuple[int, int]] = {}
    for k, used in enumerate(uses):
        for one in used:
            found[one] = found.get(one, (k, k))[0], k
    return found


@dataclass
class Program:
    """The instructions of a step, and of all steps that compute boxes of the same sizes."""

    instructions: list[Instruction] = field(default_factory=list)

    @property
    def key(self) -> tuple[Instruction, ...]:
        """Equal for programs that differ in nothing but the offsets of a step."""
        return tuple(self.instructions)

    @property
    def views(self) -> list[tuple[View, ...]]:
        """What each instruction reads and writes."""
        return [views_of(one) for one in self.instructions]

    def moving(self) -> list[View]:
        """The views that move, each once, in the order of their first use."""
        found: dict[View, None] = {}
        for instruction in self.instructions:
            for view in views_of(instruction):
                if view.moves:
                    found.setdefault(view)
        return list(found)

    def offsets(self, starts: Sequence[np.ndarray], listed: np.ndarray) -> np.ndarray:
        """Where the moving views begin, (steps, views) int64.

        Args:
            starts: task -> (steps, dimensions), the starts of its boxes.
            listed: (steps, listed offsets).
        """
        moving = self.moving()
        found = np.zeros((len(listed), len(moving)), dtype=np.int64)
        for k, view in enumerate(moving):
            found[:, k] = view.offset.over(starts[view.task])
            if view.listed is not None:
                found[:, k] += listed[:, view.listed]
        return found
