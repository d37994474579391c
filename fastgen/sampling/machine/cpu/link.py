"""Puts the parts of a program together as the machine reads them: addresses, packed weights, where threads wait."""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastgen.sampling.machine.cpu.build import Machine
from fastgen.sampling.machine.cpu.encode import Part, Side, collapsed
from fastgen.sampling.plan.program import Memory, View

DIMS = 5
Key = tuple[Any, ...]


class SideCode(ctypes.Structure):
    _fields_: ClassVar = [("base", ctypes.c_void_p), ("slot", ctypes.c_int64), ("strides", ctypes.c_int64 * DIMS)]


class Code(ctypes.Structure):
    """An instruction as `machine.cpp` has it."""

    _fields_: ClassVar = [
        ("op", ctypes.c_int64),
        ("waits", ctypes.c_int64),
        ("depth", ctypes.c_int64),
        ("sizes", ctypes.c_int64 * DIMS),
        ("out", SideCode),
        ("inputs", SideCode * 3),
    ]


class Linker:
    """For the memory of a batch of n images."""

    def __init__(self, machine: Machine, n: int, block: Callable[[Memory], Tensor]) -> None:
        self.machine = machine
        self.n = n
        self.block = block
        self._packed: dict[int, tuple[Tensor, Tensor]] = {}
        self._numbers: dict[float, Tensor] = {}

    def link(self, parts: Sequence[Part], slots: dict[View, int]) -> "ctypes.Array[Code]":
        """
        Args:
            parts: of one section.
            slots: number of every moving view among the offsets of a step.
        """
        codes = (Code * len(parts))()
        waiting = waits(parts, self.block)
        for code, part, wait in zip(codes, parts, waiting, strict=True):
            sizes, strides = collapsed(part)
            code.op, code.waits = self.machine.ops[part.op], wait
            code.sizes[:] = self._aligned(sizes, self.n, 1)
            rest = iter(strides)
            code.out = self._side(part.out, next(rest), slots)
            places = (0, 2) if part.weight is not None else (0, 1)
            for place, one in zip(places, part.inputs, strict=False):
                if isinstance(one, Side):
                    code.inputs[place] = self._side(one, next(rest), slots)
                elif one is not None:
                    number = self._numbers.setdefault(one, torch.tensor([one], dtype=torch.float32))
                    code.inputs[place] = SideCode(number.data_ptr(), -1, (ctypes.c_int64 * DIMS)())
            if part.weight is not None:
                code.depth = len(part.weight)
                code.inputs[1] = SideCode(self._pack(part.weight).data_ptr(), -1, (ctypes.c_int64 * DIMS)())
        return codes

    def _side(self, side: Side, strides: tuple[int, ...], slots: dict[View, int]) -> SideCode:
        view = side.view
        memory = self.block(view.memory)
        images = 0 if view.memory.kind == "constant" else memory.stride(0)
        fixed = side.extra + (0 if view.moves else view.offset.at(()))
        base = memory.data_ptr() + fixed * memory.element_size()
        slot = slots[view] if view.moves else -1
        return SideCode(base, slot, (ctypes.c_int64 * DIMS)(*self._aligned(strides, images, 0)))

    @staticmethod
    def _aligned(inner: Sequence[int], images: int, fill: int) -> list[int]:
        """Images first, what there is last."""
        return [images, *[fill] * (DIMS - 1 - len(inner)), *inner]

    def _pack(self, weight: Tensor) -> Tensor:
        """Weights (depth, columns) as panels of columns, one after the other, the last filled up with zeros."""
        if id(weight) not in self._packed:
            panel = self.machine.panel
            depth, columns = weight.shape
            panels = -(-columns // panel)
            wide = torch.zeros(depth, panels * panel)
            wide[:, :columns] = weight
            packed = wide.view(depth, panels, panel).transpose(0, 1).contiguous()
            self._packed[id(weight)] = weight, packed
        return self._packed[id(weight)][1]


def waits(parts: Sequence[Part], block: Callable[[Memory], Tensor]) -> list[bool]:
    """Before which parts the threads wait for each other.

    Threads share the columns (or rows) of a result by its sizes alone. So what a thread reads of a place that has been
    written by a part of the same sizes, strides and offset is its own; anything else that was written since the last
    wait may be another's, and so may be what a part overwrites.
    """
    found = []
    written: dict[int, set[Key]] = {}
    seen: dict[int, set[Key]] = {}
    for part in parts:
        reads = [_key(part, side, block) for side in part.inputs if isinstance(side, Side)]
        if part.weight is not None:
            reads[0] = (*reads[0], "all columns")
        write = _key(part, part.out, block)
        wait = any(written.get(key[0], {key}) != {key} for key in reads)
        wait |= any(touched.get(write[0], {write}) != {write} for touched in (written, seen))
        if wait:
            written, seen = {}, {}
        for key in reads:
            seen.setdefault(key[0], set()).add(key)
        written.setdefault(write[0], set()).add(write)
        found.append(wait)
    return found


def _key(part: Part, side: Side, block: Callable[[Memory], Tensor]) -> Key:
    """Where a block lies, which memories may share; then what is equal where each thread touches the same elements."""
    kept = [(size, stride) for size, stride in zip(part.out.sizes, side.strides, strict=True) if size > 1]
    view, memory = side.view, block(side.view.memory)
    shared = collapsed(part)[0]
    return (memory.data_ptr(), memory.stride(0), view.offset, view.task, view.listed, side.extra, shared, tuple(kept))
