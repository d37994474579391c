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

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from fastgen.sampling.machine.views import AffineOffset, Memory, View, constant, dense_strides

__all__ = [
    "AffineOffset", "Call", "Fixed", "Instruction", "Lookup", "Memory", "Pointwise", "Product", "Program", "Rowwise",
    "Temporary", "View", "constant", "dense_strides", "lives", "views_of",
]  # fmt: skip
T = TypeVar("T")


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
    """out (..., D) = table[index]; table (R, D), of each image or the same for all; index (...) int64, counted from the
    end where it is negative."""

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
