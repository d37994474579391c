"""Instructions as the machines, of the CPU and of GPUs, take them: sizes and strides in few dimensions."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from fastgen.sampling.machine.language import (
    Call,
    Instruction,
    Lookup,
    Memory,
    Pointwise,
    Product,
    Program,
    Rowwise,
    Temporary,
    View,
    lives,
)

DIMS = 5  # images, three more, columns


class Blocks(Protocol):
    """Where memory is; `run.memory.PlanMemory` is one."""

    def block(self, memory: Memory, program: int = 0) -> Tensor: ...


class Unknown(Exception):
    """The machines have no such instruction."""


@dataclass(frozen=True)
class Side:
    """A view of an instruction, with a stride for every dimension of the result; columns come last."""

    view: View
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """An instruction in the machine's terms. All sides have the sizes of the result.

    Attributes:
        inputs: sides or numbers; None where there is none.
        weight: (depth, columns), packed, takes the place of the second input.
        depth: terms of each sum, or numbers of a row; `along` holds the strides of the first two inputs along it.
        whole_rows: whether threads share it by rows alone.
    """

    op: str
    out: Side
    sizes: tuple[int, ...]
    inputs: tuple[Side | float | None, ...]
    weight: View | None = None
    depth: int = 0
    along: tuple[int, int] = (0, 0)
    number: float = 0.0
    whole_rows: bool = False

    @property
    def sides(self) -> list[Side]:
        return [self.out, *(one for one in self.inputs if isinstance(one, Side))]

    def collapsed(self) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
        """Sizes of the result with the least dimensions, columns last, and strides of all sides along them."""
        return collapse(self.sizes, self.sides)


def collapse(sizes: Sequence[int], sides: Sequence[Side]) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """These sizes with the least dimensions, columns last, and strides of the sides along them."""
    last = len(sizes) - 1
    found: list[int] = []
    strides: list[list[int]] = [[] for _ in sides]
    for d, size in enumerate(sizes):
        if size == 1 and d != last:
            continue
        here = [side.strides[d] for side in sides]
        # Columns stay by themselves, so that all parts that compute a map share it among threads in one way.
        mergeable = found and d != last
        if mergeable and all(old[-1] == size * new for old, new in zip(strides, here, strict=True)):
            found[-1] *= size
            for old, new in zip(strides, here, strict=True):
                old[-1] = new
        else:
            found.append(size)
            for old, new in zip(strides, here, strict=True):
                old.append(new)
    if not found:
        found, strides = [1], [[0] for _ in sides]
    return tuple(found), [tuple(one) for one in strides]


HALF = (torch.bfloat16, torch.float16)


def part_of(one: Instruction, half: bool = False) -> Part:
    """Raises Unknown. `half`: whether numbers in half precision are known, too."""
    if isinstance(one, Pointwise):
        found = _pointwise(one)
    elif isinstance(one, Product):
        shared = len(one.weight.sizes) == 2 and one.weight.memory.kind == "constant"
        found = _product(one) if shared else _contraction(one)
    elif isinstance(one, Rowwise):
        out, strides = one.out, one.out.strides
        sizes = (*out.sizes[:-1], 1)
        source = Side(one.source, (*one.source.strides[:-1], 0))
        depth, along = one.source.sizes[-1], (one.source.strides[-1], 0)
        number = one.numbers[0] if one.numbers else 0.0
        found = Part(one.op, Side(out, strides), sizes, (source,), None, depth, along, number, True)
    elif isinstance(one, Lookup):
        if len(one.table.sizes) != 2:
            raise Unknown
        index = Side(one.index, (*one.index.strides, 0))
        table = Side(one.table, (0,) * len(one.out.sizes))
        along = (one.table.strides[0], one.table.strides[1])
        target, count = Side(one.out, one.out.strides), float(one.table.sizes[0])
        found = Part("lookup", target, one.out.sizes, (table, index), None, 0, along, count, True)
    else:
        raise Unknown
    _check(found, (torch.float32, *HALF) if half else (torch.float32,))
    return found


def _broadcast(view: View, sizes: Sequence[int]) -> Side:
    if len(view.sizes) > len(sizes):
        raise Unknown
    return Side(view, view.expand(sizes).strides)


def _pointwise(one: Pointwise) -> Part:
    out, sizes = one.out, one.out.sizes
    inputs = tuple(_broadcast(x, sizes) if isinstance(x, View) else float(x) for x in one.operands)
    op = one.op
    if op == "copy":
        to, of = (isinstance(x, View) and x.memory.dtype == torch.int64 for x in (out, one.operands[0]))
        op = ("move_int64" if of else "to_int64") if to else "copy_int64" if of else op
    return Part(op, Side(out, out.strides), sizes, inputs)


def _product(one: Product) -> Part:
    """With a weight that is the same for all images and steps: packed, where rows and columns lie side by side."""
    out, rows, weight = one.out, one.rows, one.weight
    depth = weight.sizes[0]
    added = None if one.added is None else _broadcast(one.added, out.sizes)
    shared = Side(rows, (*rows.strides[:-1], 0))
    scattered = out.strides[-1] != 1 or (added is not None and added.strides[-1] != 1)
    if (rows.strides[-1] != 1 and depth > 1) or (scattered and out.sizes[-1] > 1):
        factor = Side(weight, (*[0] * (len(out.sizes) - 1), weight.strides[-1]))
        along = (rows.strides[-1], weight.strides[0])
        return Part(
            "contract", Side(out, out.strides), out.sizes, (shared, factor, added), None, depth, along, 0.0, True
        )
    return Part("product", Side(out, out.strides), out.sizes, (shared, None, added), weight, depth)


def _contraction(one: Product) -> Part:
    out, rows, weight = one.out, one.rows, one.weight
    every = out.sizes[:-2]
    of_rows = rows.expand((*every, *rows.sizes[-2:])).strides
    of_weight = weight.expand((*every, *weight.sizes[-2:])).strides
    added = None if one.added is None else _broadcast(one.added, out.sizes)
    sides = Side(rows, (*of_rows[:-1], 0)), Side(weight, (*of_weight[:-2], 0, of_weight[-1])), added
    along = (of_rows[-1], of_weight[-2])
    return Part("contract", Side(out, out.strides), out.sizes, sides, None, rows.sizes[-1], along, 0.0, True)


def _check(part: Part, real: Sequence[torch.dtype]) -> None:
    """Raises Unknown for numbers of other dtypes, and for more dimensions than the machine has."""
    for k, side in enumerate(part.sides):
        integers = part.op == "move_int64" or (part.op, k) in (("copy_int64", 1), ("to_int64", 0), ("lookup", 2))
        if side.view.memory.dtype not in ((torch.int64,) if integers else (*real, torch.bool)):
            raise Unknown
    if part.weight is not None and part.weight.memory.dtype not in real:
        raise Unknown
    if len(part.collapsed()[0]) > DIMS - 1:
        raise Unknown


@dataclass
class Section:
    """Instructions in a row, as `parts` where the machine knows them, or else as they are."""

    parts: list[Part] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)


def sections(program: Program) -> list[Section]:
    """A program cut into sections; what a call makes anew lives within one."""
    made = lives(
        [leaf for leaf in (*one.leaves, one.result) if isinstance(leaf, Temporary)] if isinstance(one, Call) else ()
        for one in program.instructions
    )
    found: list[Section] = []
    open_until = -1
    for k, one in enumerate(program.instructions):
        if isinstance(one, Call) and one.result is not None:
            open_until = max(open_until, made[one.result][1])
        parts: list[Part] = []
        if k > open_until:
            with suppress(Unknown):
                parts = [part_of(one)]
        if not found or bool(parts) != bool(found[-1].parts):
            found.append(Section())
        found[-1].parts += parts
        if not parts:
            found[-1].instructions.append(one)
    return found


def unknown_in(program: Program) -> list[str]:
    """What the machine of GPUs does not know, by name, each once."""
    found: dict[str, None] = {}
    for one in program.instructions:
        try:
            part_of(one, half=True)
        except Unknown:
            found[_name(one)] = None
    return [name for name in found if not name.startswith("_")] or list(found)  # what puts results in place goes unsaid


def _name(one: Instruction) -> str:
    if isinstance(one, Call):
        name = getattr(one.function, "__qualname__", type(one.function).__name__)
        return name.removeprefix("_VariableFunctionsClass.").removeprefix("aten::")  # where torch keeps its functions
    name = one.op if isinstance(one, (Pointwise, Rowwise)) else type(one).__name__.lower()
    return f"{name} of {'x'.join(map(str, one.out.sizes))} {str(one.out.memory.dtype).removeprefix('torch.')}"
