"""A program as the machine reads it: addresses, strides, packed weights, and where threads wait."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from fastgen.sampling.machine.cpu.build import Machine
from fastgen.sampling.machine.language import Instruction, Lookup, Memory, Pointwise, Product, Rowwise, View

DIMS = 5  # images, three more, columns
Key = tuple[Any, ...]


class SideCode(ctypes.Structure):
    _fields_: ClassVar = [("base", ctypes.c_void_p), ("slot", ctypes.c_int64), ("strides", ctypes.c_int64 * DIMS)]


class Code(ctypes.Structure):
    """An instruction as `machine.h` has it."""

    _fields_: ClassVar = [
        ("op", ctypes.c_int64),
        ("waits", ctypes.c_int64),
        ("depth", ctypes.c_int64),
        ("depth_strides", ctypes.c_int64 * 2),
        ("number", ctypes.c_double),
        ("sizes", ctypes.c_int64 * DIMS),
        ("out", SideCode),
        ("inputs", SideCode * 3),
    ]


class Unknown(Exception):
    """The machine has no such instruction."""


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
        sides, last = self.sides, len(self.sizes) - 1
        sizes: list[int] = []
        strides: list[list[int]] = [[] for _ in sides]
        for d, size in enumerate(self.sizes):
            if size == 1 and d != last:
                continue
            here = [side.strides[d] for side in sides]
            # Columns stay by themselves, so that all parts that compute a map share it among threads in one way.
            mergeable = sizes and d != last
            if mergeable and all(old[-1] == size * new for old, new in zip(strides, here, strict=True)):
                sizes[-1] *= size
                for old, new in zip(strides, here, strict=True):
                    old[-1] = new
            else:
                sizes.append(size)
                for old, new in zip(strides, here, strict=True):
                    old.append(new)
        if not sizes:
            sizes, strides = [1], [[0] for _ in sides]
        return tuple(sizes), [tuple(one) for one in strides]


def part_of(one: Instruction) -> Part:
    """Raises Unknown."""
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
        found = Part("lookup", Side(one.out, one.out.strides), one.out.sizes, (table, index), None, 0, along, 0.0, True)
    else:
        raise Unknown
    _check(found)
    return found


def _broadcast(view: View, sizes: Sequence[int]) -> Side:
    if len(view.sizes) > len(sizes):
        raise Unknown
    return Side(view, view.expand(sizes).strides)


def _pointwise(one: Pointwise) -> Part:
    out, sizes = one.out, one.out.sizes
    inputs = tuple(_broadcast(x, sizes) if isinstance(x, View) else float(x) for x in one.operands)
    op = one.op
    if op == "copy" and isinstance(one.operands[0], View) and one.operands[0].memory.dtype == torch.int64:
        op = "move_int64" if out.memory.dtype == torch.int64 else "copy_int64"
    return Part(op, Side(out, out.strides), sizes, inputs)


def _product(one: Product) -> Part:
    out, rows, weight = one.out, one.rows, one.weight
    depth = weight.sizes[0]
    if (rows.strides[-1] != 1 and depth > 1) or out.strides[-1] != 1 < out.sizes[-1]:
        raise Unknown
    added = None if one.added is None else _broadcast(one.added, out.sizes)
    if added is not None and added.strides[-1] != 1 < out.sizes[-1]:
        raise Unknown
    shared = Side(rows, (*rows.strides[:-1], 0))
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


def _check(part: Part) -> None:
    """Raises Unknown for other numbers than float32, and for more dimensions than the machine has."""
    for k, side in enumerate(part.sides):
        integers = part.op == "move_int64" or (part.op, k) in (("copy_int64", 1), ("lookup", 2))
        if side.view.memory.dtype != (torch.int64 if integers else torch.float32):
            raise Unknown
    if part.weight is not None and part.weight.memory.dtype != torch.float32:
        raise Unknown
    if len(part.collapsed()[0]) > DIMS - 1:
        raise Unknown


class Blocks(Protocol):
    """Where memory is; `run.memory.PlanMemory` is one."""

    def block(self, memory: Memory, program: int = 0) -> Tensor: ...


class Linker:
    """Puts parts together for the memory of a batch of n images. It holds what the tables point to."""

    def __init__(self, machine: Machine, n: int, memory: Blocks) -> None:
        self.machine, self.n, self.memory = machine, n, memory
        self._packed: dict[View, Tensor] = {}
        self._numbers: dict[float, Tensor] = {}

    def link(self, parts: Sequence[Part], program: int, slots: dict[View, int]) -> "ctypes.Array[Code]":
        """
        Args:
            parts: instructions in a row of a program.
            program: its number.
            slots: number of every moving view among the offsets of a step.
        """
        codes = (Code * len(parts))()
        for code, part, wait in zip(codes, parts, self._waits(parts, program), strict=True):
            sizes, strides = part.collapsed()
            code.op, code.waits, code.number = self.machine.ops[part.op], wait, part.number
            code.depth, code.depth_strides[:] = part.depth, part.along
            code.sizes[:] = _aligned(sizes, self.n, 1)
            rest = iter(strides)
            code.out = self._side(part.out, next(rest), program, slots)
            for place, one in enumerate(part.inputs):
                if isinstance(one, Side):
                    code.inputs[place] = self._side(one, next(rest), program, slots)
                elif one is not None:
                    number = self._numbers.setdefault(one, torch.tensor([one], dtype=torch.float32))
                    code.inputs[place] = SideCode(number.data_ptr(), -1, (ctypes.c_int64 * DIMS)())
            if part.weight is not None:
                code.inputs[1] = SideCode(self._pack(part.weight).data_ptr(), -1, (ctypes.c_int64 * DIMS)())
        return codes

    def _side(self, side: Side, strides: tuple[int, ...], program: int, slots: dict[View, int]) -> SideCode:
        view = side.view
        block = self.memory.block(view.memory, program)
        images = 0 if view.memory.kind == "constant" else block.stride(0)
        fixed = 0 if view.moves else view.offset.at(())
        base = block.data_ptr() + fixed * block.element_size()
        return SideCode(base, slots[view] if view.moves else -1, (ctypes.c_int64 * DIMS)(*_aligned(strides, images, 0)))

    def _pack(self, weight: View) -> Tensor:
        """Weights (depth, columns) as panels of columns, one after the other, the last filled up with zeros."""
        weight = replace(weight, task=0)
        if weight not in self._packed:
            panel = self.machine.panel
            depth, columns = weight.sizes
            panels = -(-columns // panel)
            wide = torch.zeros(depth, panels * panel)
            data = self.memory.block(weight.memory)[0]
            wide[:, :columns] = data.as_strided(weight.sizes, weight.strides, weight.offset.at(()))
            self._packed[weight] = wide.view(depth, panels, panel).transpose(0, 1).contiguous()
        return self._packed[weight]

    def _waits(self, parts: Sequence[Part], program: int) -> list[bool]:
        """Before which parts the threads wait for each other.

        Threads share the columns (or rows) of a result by its sizes alone. So what a thread reads of a place that has
        been written by a part of the same sizes, strides and offset is its own; anything else that was written since
        the last wait may be another's, and so may be what a part overwrites.
        """
        found = []
        written: dict[int, set[Key]] = {}
        seen: dict[int, set[Key]] = {}
        for part in parts:
            write, *reads = (self._key(part, side, program) for side in part.sides)
            if part.weight is not None:  # a column needs all of its row
                reads[0] = (*reads[0], "all columns")
            if part.whole_rows:
                reads = [(*key, "all columns") for key in reads]
                write = (*write, "whole rows")
            wait = any(written.get(key[0], {key}) != {key} for key in reads)
            wait |= any(touched.get(write[0], {write}) != {write} for touched in (written, seen))
            if wait:
                written, seen = {}, {}
            for key in reads:
                seen.setdefault(key[0], set()).add(key)
            written.setdefault(write[0], set()).add(write)
            found.append(wait)
        return found

    def _key(self, part: Part, side: Side, program: int) -> Key:
        """Where a block lies, which memories may share; then what is equal where each thread touches the same."""
        kept = [(size, stride) for size, stride in zip(part.sizes, side.strides, strict=True) if size > 1]
        view, block = side.view, self.memory.block(side.view.memory, program)
        shared = part.collapsed()[0]
        return (block.data_ptr(), block.stride(0), view.offset, view.task, view.listed, shared, tuple(kept))


def _aligned(inner: Sequence[int], images: int, fill: int) -> list[int]:
    """Images first, what there is last."""
    return [images, *[fill] * (DIMS - 1 - len(inner)), *inner]
