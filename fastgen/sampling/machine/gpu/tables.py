"""A plan as the step machine of GPUs reads it: tables of int64, whose words `fastgen.kernels.sampler.words` names."""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fastgen.kernels.sampler import words
from fastgen.sampling.machine.language import View, constant
from fastgen.sampling.machine.parts import DIMS, Blocks, Part, Side
from fastgen.sampling.plan.plan import Step

Words = list[int]
ALIGNED = 16  # numbers from which packed weights begin
PRECISIONS = {torch.bfloat16: words.BFLOAT16, torch.float16: words.FLOAT16}


def with_views(part: Part, numbers: dict[float, View]) -> Part:
    """A part whose operands that are numbers have become views of constants, shared through `numbers`."""

    def view_of(one: Side | float | None) -> Side | None:
        if one is None or isinstance(one, Side):
            return one
        view = numbers.setdefault(one, constant(torch.tensor([one], dtype=torch.float32)))
        return Side(view, (0,) * len(part.sizes))

    return replace(part, inputs=tuple(view_of(one) for one in part.inputs))


@dataclass
class Tables:
    """Tensors on the device, as the kernel has them.

    Attributes:
        codes: (instructions, WORDS).
        programs: (programs, 2), first instruction and number; none of a program that is not known.
        steps: (steps, STEP_WORDS).
        offsets: of the moving views of all steps, one after the other, each behind a 0.
        weights: packed.
    """

    codes: Tensor
    programs: Tensor
    steps: Tensor
    offsets: Tensor
    weights: Tensor


class Linker:
    """Writes the tables.

    Args:
        memory: where what the parts read and write lies, in one arena for each dtype.
        columns, depth: of a panel of packed weights, and what its rows are a multiple of.
        dtype: of packed weights.
    """

    def __init__(self, memory: Blocks, columns: int, depth: int, dtype: torch.dtype = torch.float32) -> None:
        self.memory, self.columns, self.depth, self.dtype = memory, columns, depth, dtype
        self._weights: list[Tensor] = []
        self._packed: dict[View, int] = {}
        self._size = 0

    def link(
        self,
        programs: Sequence[tuple[Sequence[Part], Mapping[View, int]] | None],
        steps: Sequence[Step],
        moves: Mapping[int, Sequence[tuple[Tensor, Tensor]]],
        device: torch.device,
    ) -> Tables:
        """
        Args:
            programs: parts, their operands views, and the number of every moving view among the offsets of a step; None
                for a program that is not known.
            steps: of the plan.
            moves: step -> rows of rings that move before it, as (target, source).
        """
        codes: list[Words] = []
        ranges: list[Words] = []
        for number, program in enumerate(programs):
            parts, slots = program if program is not None else ((), {})
            ranges.append([len(codes), len(parts)])
            codes += [self._code(part, number, slots) for part in parts]
        offsets = [0]
        rows: list[Words] = []
        for number, step in enumerate(steps):
            moved = [self._move(target, source) for target, source in moves.get(number, ()) if target.shape[1]]
            rows.append([step.program, len(offsets), len(codes), len(moved)])
            codes += moved
            offsets += [0, *step.offsets.tolist()]
        weights = torch.cat(self._weights) if self._weights else torch.zeros(ALIGNED, dtype=self.dtype)
        codes = codes or [[0] * words.WORDS.value]
        tables = [np.array(one, dtype=np.int64) for one in (codes, ranges, rows, offsets)]
        codes_, programs_, steps_, offsets_ = (torch.from_numpy(one).to(device) for one in tables)
        return Tables(codes_, programs_, steps_, offsets_, weights.to(device))

    def _code(self, part: Part, program: int, slots: Mapping[View, int]) -> Words:
        code = [0] * words.WORDS.value
        sizes, strides = part.collapsed()
        code[words.OP.value] = words.OPS[part.op]
        code[words.DEPTH.value] = part.depth
        code[words.ALONG.value], code[words.ALONG_B.value] = part.along
        code[words.ROUNDED.value] = PRECISIONS.get(part.out.view.memory.dtype, words.FLOAT32).value
        code[words.NUMBER.value] = struct.unpack("<i", struct.pack("<f", part.number))[0]
        code[words.S1.value : words.COLUMNS.value + 1] = [1] * (DIMS - 1 - len(sizes)) + list(sizes)
        rest = iter(strides)
        self._put(code, words.OUT.value, part.out, next(rest), program, slots)
        for place, one in zip((words.A.value, words.B.value, words.ADDED.value), part.inputs, strict=False):
            if one is not None:
                assert isinstance(one, Side)
                self._put(code, place, one, next(rest), program, slots)
                code[words.HAS_ADDED.value] |= place == words.ADDED.value
        if part.op == "lookup":
            code[words.A.value + words.SIDE - 1] = part.along[1]
        if part.weight is not None:
            code[words.WEIGHT.value] = self._pack(part.weight)
        return code

    def _put(
        self, code: Words, place: int, side: Side, strides: tuple[int, ...], program: int, slots: Mapping[View, int]
    ) -> None:
        view = side.view
        block = self.memory.block(view.memory, program)
        start = int(block.storage_offset()) + (0 if view.moves else view.offset.at(()))
        images = 0 if view.memory.kind == "constant" else block.stride(0)
        inner = [0] * (DIMS - 1 - len(strides)) + list(strides)
        code[place : place + words.SIDE] = [start, slots[view] + 1 if view.moves else 0, images, *inner]

    def _move(self, target: Tensor, source: Tensor) -> Words:
        """A copy of columns (n, columns) to where it may overlap, further to the left."""
        code = [0] * words.WORDS.value
        code[words.OP.value] = words.OPS["move_int64" if target.dtype == torch.int64 else "copy"]
        code[words.IN_ORDER.value] = 1
        code[words.S1.value : words.COLUMNS.value + 1] = [1] * (DIMS - 2) + [target.shape[1]]
        for place, one in ((words.OUT.value, target), (words.A.value, source)):
            code[place : place + words.SIDE] = [int(one.storage_offset()), 0, one.stride(0), 0, 0, 0, 1]
        return code

    def _pack(self, weight: View) -> int:
        """Where the weight (depth, columns) begins among the packed ones: panels of columns, one after the other, with
        zeros for what is missing."""
        weight = replace(weight, task=0)
        if weight not in self._packed:
            data = weight.memory.data
            assert data is not None
            depth, columns = weight.sizes
            panels = -(-columns // self.columns)
            wide = torch.zeros(-(-depth // self.depth) * self.depth, panels * self.columns, dtype=self.dtype)
            wide[:depth, :columns] = data.as_strided(weight.sizes, weight.strides, weight.offset.at(()))
            packed = wide.view(len(wide), panels, self.columns).transpose(0, 1).reshape(-1)
            self._packed[weight] = self._size
            self._weights.append(torch.cat((packed, packed.new_zeros(-len(packed) % ALIGNED))))
            self._size += len(self._weights[-1])
        return self._packed[weight]
