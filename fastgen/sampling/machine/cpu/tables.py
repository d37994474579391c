"""A program as the machine reads it: addresses, strides, packed weights, and where threads wait."""

import ctypes
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from fastgen.sampling.machine.cpu.build import Machine
from fastgen.sampling.machine.cpu.pages import LargePages
from fastgen.sampling.machine.language import View
from fastgen.sampling.machine.parts import DIMS, Blocks, Part, Side

Key = tuple[Any, ...]


def words(names: str) -> list[tuple[str, Any]]:
    """Fields of 64 bits as ctypes has them: integers, and pointers, whose names begin with a star."""
    return [(one.lstrip("*"), ctypes.c_void_p if one[0] == "*" else ctypes.c_int64) for one in names.split()]


class SideCode(ctypes.Structure):
    _fields_: ClassVar = [*words("*base slot"), ("strides", ctypes.c_int64 * DIMS)]


class Code(ctypes.Structure):
    """An instruction as `machine.h` has it."""

    _fields_: ClassVar = [
        *words("op waits depth"),
        ("depth_strides", ctypes.c_int64 * 2),
        ("number", ctypes.c_double),
        ("sizes", ctypes.c_int64 * DIMS),
        ("out", SideCode),
        ("inputs", SideCode * 3),
    ]


class Panels:
    """Weights as the machine multiplies by them, for all players of a plan."""

    def __init__(self, columns: int) -> None:
        self.columns = columns  # of a panel
        self._packed: dict[View, Tensor] = {}
        self._pages = LargePages()

    def of(self, weight: View) -> Tensor:
        """A constant (depth, columns) as panels of columns, one after the other, the last filled up with zeros."""
        weight = replace(weight, task=0)
        if weight not in self._packed:
            depth, columns = weight.sizes
            panels = -(-columns // self.columns)
            assert weight.memory.data is not None
            data = weight.memory.data.as_strided(weight.sizes, weight.strides, weight.offset.at(()))
            wide = functional.pad(data, (0, panels * self.columns - columns))
            found = self._pages.take(wide.numel(), wide.dtype).view(panels, depth, self.columns)
            self._packed[weight] = found.copy_(wide.view(depth, panels, self.columns).transpose(0, 1))
        return self._packed[weight]


class Linker:
    """Puts parts together for the memory of a batch of n images. It holds what the tables point to."""

    def __init__(self, machine: Machine, n: int, memory: Blocks, panels: Panels) -> None:
        self.machine, self.n, self.memory, self.panels = machine, n, memory, panels
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
                code.inputs[1] = SideCode(self.panels.of(part.weight).data_ptr(), -1, (ctypes.c_int64 * DIMS)())
        return codes

    def _side(self, side: Side, strides: tuple[int, ...], program: int, slots: dict[View, int]) -> SideCode:
        view = side.view
        block = self.memory.block(view.memory, program)
        images = 0 if view.memory.kind == "constant" else block.stride(0)
        fixed = 0 if view.moves else view.offset.at(())
        base = block.data_ptr() + fixed * block.element_size()
        return SideCode(base, slots[view] if view.moves else -1, (ctypes.c_int64 * DIMS)(*_aligned(strides, images, 0)))

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
