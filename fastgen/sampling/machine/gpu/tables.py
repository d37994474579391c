"""A plan as the step machine of GPUs reads it: tables of int64, whose words `fastgen.kernels.sampler.words` names."""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fastgen.kernels.sampler import words
from fastgen.sampling.machine.definitions import POINTWISE
from fastgen.sampling.machine.gpu.fusion import Fused
from fastgen.sampling.machine.language import View, constant
from fastgen.sampling.machine.parts import DIMS, Blocks, Side
from fastgen.sampling.plan.plan import Step

Words = list[int]
ALIGNED = 16  # units of 4 bytes at a multiple of which packed weights begin
PRECISIONS = {torch.bfloat16: words.BFLOAT16, torch.float16: words.FLOAT16}


def with_views(fused: Fused, numbers: dict[float, View]) -> Fused:
    """With views of constants, shared through `numbers`, in the place of operands that are numbers."""
    sizes = fused.head.sizes

    def view_of(one: Side | float | None) -> Side | None:
        if one is None or isinstance(one, Side):
            return one
        view = numbers.setdefault(one, constant(torch.tensor([one], dtype=torch.float32)))
        return Side(view, (0,) * len(sizes))

    head = replace(fused.head, inputs=tuple(view_of(one) for one in fused.head.inputs))
    return replace(fused, head=head, links=tuple(replace(one, operand=view_of(one.operand)) for one in fused.links))


@dataclass
class Tables:
    """Tensors on the device, as the kernel has them.

    Attributes:
        codes: (instructions, WORDS), links behind the instructions of their program.
        programs: (programs, 2), first instruction and number; none of a program that is not known.
        steps: (steps, STEP_WORDS).
        offsets: of the moving views of all steps, one after the other, each behind a 0.
        weights: packed, in units of 4 bytes.
    """

    codes: Tensor
    programs: Tensor
    steps: Tensor
    offsets: Tensor
    weights: Tensor

    def read(self) -> tuple[Tensor, ...]:
        """In the order of the kernel's arguments."""
        return self.weights, self.codes, self.programs, self.steps, self.offsets

    def no_request(self, floats: Tensor) -> tuple[Tensor, ...]:
        """In the place of the tensors of a request, where nothing is drawn and none is read."""
        none = self.steps
        return none, none, floats, none, none.view(torch.uint8)[0], none.view(torch.int32)[0]


class Linker:
    """Writes the tables.

    Args:
        memory: where what the parts read and write lies, in one arena for each dtype.
        columns, depth: of a panel of packed weights, and what its rows are a multiple of.
    """

    def __init__(self, memory: Blocks, columns: int, depth: int) -> None:
        self.memory, self.columns, self.depth = memory, columns, depth
        self._weights: list[Tensor] = []
        self._packed: dict[tuple[View, int], int] = {}
        self._size = 0

    def link(
        self,
        programs: Sequence[tuple[Sequence[Fused], Mapping[View, int]] | None],
        steps: Sequence[Step],
        moves: Mapping[int, Sequence[tuple[Tensor, Tensor]]],
        device: torch.device,
    ) -> Tables:
        """
        Args:
            programs: instructions, their operands views, and the number of every moving view among the offsets of a
                step; None for a program that is not known.
            steps: of the plan.
            moves: step -> rows of rings that move before it, as (target, source).
        """
        codes: list[Words] = []
        ranges: list[Words] = []
        for number, program in enumerate(programs):
            instructions, slots = program if program is not None else ((), {})
            ranges.append([len(codes), len(instructions)])
            linked = [self._codes(one, number, slots) for one in instructions]
            links_at = len(codes) + len(instructions)
            for head, *links in linked:
                head[words.LINKS.value], head[words.LINKS_AT.value] = len(links), links_at
                links_at += len(links)
                codes.append(head)
            codes += [link for _, *links in linked for link in links]
        offsets = [0]
        rows: list[Words] = []
        for number, step in enumerate(steps):
            moved = [self._move(target, source) for target, source in moves.get(number, ()) if target.shape[1]]
            rows.append([step.program, len(offsets), len(codes), len(moved)])
            codes += moved
            offsets += [0, *step.offsets.tolist()]
        weights = torch.cat(self._weights) if self._weights else torch.zeros(ALIGNED, dtype=torch.float32)
        codes = codes or [[0] * words.WORDS.value]
        tables = [np.array(one, dtype=np.int64) for one in (codes, ranges, rows, offsets)]
        codes_, programs_, steps_, offsets_ = (torch.from_numpy(one).to(device) for one in tables)
        return Tables(codes_, programs_, steps_, offsets_, weights.to(device))

    def _codes(self, fused: Fused, program: int, slots: Mapping[View, int]) -> list[Words]:
        """Of an instruction, and of its links."""
        part, (sizes, strides) = fused.head, fused.collapsed()
        rest = iter(strides)

        def code_of(op: str, out: Side, kept: bool, operands: Mapping[int, Side | float | None]) -> Words:
            code = [0] * words.WORDS.value
            code[words.OP.value], code[words.KEPT.value] = words.OPS[op], sizes[-1] if kept else 0
            code[words.ROUNDED.value] = PRECISIONS.get(out.view.memory.dtype, words.FLOAT32).value
            code[words.S1.value : words.COLUMNS.value + 1] = [1] * (DIMS - 1 - len(sizes)) + list(sizes)
            for place, one in ((words.OUT.value, out if kept else None), *operands.items()):
                if one is not None:
                    assert isinstance(one, Side)
                    self._put(code, place, one, next(rest), program, slots)
                    code[words.HAS_ADDED.value] |= place == words.ADDED.value
            return code

        numbers = part.op in POINTWISE  # whose second one has its place
        places = (words.A, words.ADDED) if numbers else (words.A, words.B, words.ADDED)
        operands = {place.value: one for place, one in zip(places, part.inputs, strict=False)}
        head = code_of(part.op, part.out, fused.kept, operands)
        head[words.THEN.value] = words.OPS[part.op if numbers else "add" if head[words.HAS_ADDED.value] else "copy"]
        head[words.DEPTH.value], head[words.HALF.value] = part.depth, fused.half
        head[words.ALONG.value], head[words.ALONG_B.value] = part.along
        head[words.NUMBER.value] = struct.unpack("<i", struct.pack("<f", part.number))[0]
        if part.op == "lookup":
            head[words.A.value + words.SIDE - 1], head[words.DEPTH.value] = part.along[1], int(part.number)
        if part.weight is not None:
            head[words.WEIGHT.value] = self._pack(part.weight, fused.half)
            head[words.WEIGHT_PRECISION.value] = PRECISIONS.get(part.weight.memory.dtype, words.FLOAT32).value
        found = [head]
        for link in fused.links:
            code = code_of(link.op, link.out, link.kept, {words.ADDED.value: link.operand})
            code[words.THEN.value], code[words.FOLDS.value] = code[words.OP.value], int(link.half > 0)
            found.append(code)
        return found

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
        code[words.THEN.value] = words.OPS["copy"]
        code[words.IN_ORDER.value], code[words.KEPT.value] = 1, target.shape[1]
        code[words.S1.value : words.COLUMNS.value + 1] = [1] * (DIMS - 2) + [target.shape[1]]
        for place, one in ((words.OUT.value, target), (words.A.value, source)):
            code[place : place + words.SIDE] = [int(one.storage_offset()), 0, one.stride(0), 0, 0, 0, 1]
        return code

    def _pack(self, weight: View, half: int) -> int:
        """Where the weight (depth, columns) begins among the packed ones: panels of columns, one after the other, with
        zeros for what is missing. half: of columns that are packed in turns, one of each half."""
        key = replace(weight, task=0), half
        if key not in self._packed:
            data = weight.memory.data
            assert data is not None
            depth, columns = weight.sizes
            panels = -(-columns // self.columns)
            wide = torch.zeros(-(-depth // self.depth) * self.depth, panels * self.columns, dtype=weight.memory.dtype)
            found = data.as_strided(weight.sizes, weight.strides, weight.offset.at(()))
            wide[:depth, :columns] = found.view(depth, 2, half).mT.reshape(depth, columns) if half else found
            packed = wide.view(len(wide), panels, self.columns).transpose(0, 1).reshape(-1)
            packed = packed.view(torch.float32)
            self._packed[key] = self._size
            self._weights.append(torch.cat((packed, packed.new_zeros(-len(packed) % ALIGNED))))
            self._size += len(self._weights[-1])
        return self._packed[key]
