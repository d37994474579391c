"""Takes a plan and a number of images; gives their memory: a block for each value that lasts, blocks that programs
share."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastgen.sampling.machine.language import Memory, View
from fastgen.sampling.plan.plan import Plan
from fastgen.sampling.plan.sliding_rows import Ring
from fastgen.sampling.trace.graph import CONSTANT, Value

Sizes = Mapping[Memory | int, tuple[int, torch.dtype]]  # as `Plan.blocks`


class PlanMemory:
    """Attributes:
    held: dtypes whose numbers lie in memory of another one.
    levels: int64 (n, C, H, W), a view.
    params: the model's output for what has been drawn, (n, ..., H, W), a view.
    moves: step -> the rows of rings that move before it, as (target, source).
    """

    held: ClassVar[Mapping[torch.dtype, torch.dtype]] = {}

    def __init__(self, plan: Plan, n: int, device: torch.device) -> None:
        self.plan, self.n, self.device = plan, n, device
        self._blocks = self.allocated(
            {one: (size, self.held.get(dtype, dtype)) for one, (size, dtype) in plan.blocks.items()}
        )
        self._initial: list[tuple[Tensor, Tensor]] = []  # values, and what they begin with
        self.moves: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for value in (one for one in plan.timed.computed if one in plan.storage.stored):
            constant = plan.schedule.times.of(value) == CONSTANT
            if constant.any() or plan.storage.memories.get(value) in plan.rings:
                self._start_with(value, constant)
        self.levels = self.inner(plan.levels)[:, 0]
        self.params = self._output()

    def allocated(self, sizes: Sizes) -> dict[Memory | int, Tensor]:
        """Zeros (n, size) for each block of the plan."""
        return {one: torch.zeros(self.n, size, dtype=dtype, device=self.device) for one, (size, dtype) in sizes.items()}

    def block(self, memory: Memory, program: int = 0) -> Tensor:
        """(n, numel), or (1, numel) of a constant; of scratch memory, that of a program."""
        if memory.kind == "scratch":
            # Each image has all of the block, so that no memory of one lies in another one's.
            return self._blocks[self.plan.scratch.block_of[program][memory]][:, : memory.numel]
        if memory not in self._blocks:
            assert memory.data is not None
            dtype = self.held.get(memory.dtype, memory.dtype)
            self._blocks[memory] = memory.data.to(self.device, dtype).view(1, -1)
        return self._blocks[memory]

    def strided(self, view: View, program: int) -> tuple[Tensor, tuple[int, ...], tuple[int, ...]]:
        """The block that a view is part of, and its sizes and strides, those of the images first."""
        block = self.block(view.memory, program)
        rows = 0 if view.memory.kind == "constant" else block.stride(0)
        return block, (self.n, *view.sizes), (rows, *view.strides)

    def inner(self, value: Value) -> Tensor:
        """A stored value, (n, *shape)."""
        return self.plan.storage.layouts[value].inner(self.block(self.plan.storage.memory(value)))

    def rewind(self) -> None:
        """Rings and values with constants as they begin."""
        for block, initial in self._initial:
            block.copy_(initial)

    def keep(self, value: Value, found: Tensor, place: int) -> None:
        """Stores a value of whole images (n, *shape), as it is when a place is to be drawn."""
        memory = self.plan.storage.memory(value)
        ring = self.plan.rings.get(memory)
        if ring is None:
            self.inner(value).copy_(found)
        else:
            self.block(memory).copy_(_part(ring, found, place))

    def _start_with(self, value: Value, constant: Tensor) -> None:
        """Notes where the constants of a stored value belong; what else is in their box is 0.

        Args:
            constant: which of its elements are.
        """
        memory = self.plan.storage.memory(value)
        block, ring = self.block(memory), self.plan.rings.get(memory)
        if ring is None:
            # Steps may compute a constant again, to another last bit: what a batch gives would depend on those before.
            places = constant.nonzero()
            ends = zip(places.amin(0).tolist(), (places.amax(0) + 1).tolist(), strict=True)
            box = tuple(slice(first, end) for first, end in ends)
            constants = torch.where(constant[box], value.data[box], 0).to(self.device)
            self._initial.append((self.inner(value)[(slice(None), *box)], constants))
            return
        constants = torch.where(constant, value.data, 0).to(self.device)
        self._initial.append((block, _part(ring, constants[None], 0)))
        for move in ring.moves:
            source = block[:, move.first * ring.pitch : move.stop * ring.pitch]
            self.moves.setdefault(move.step, []).append((block[:, : source.shape[1]], source))

    def _output(self) -> Tensor:
        view = self.plan.output.map
        assert view is not None
        strides, origin = self.plan.storage.strides(view.value)
        block = self.block(self.plan.storage.memory(view.value))
        if view.value.kind == "constant":
            block = block.expand(self.n, -1)
        along = [sum(s * t for s, t in zip(step, strides, strict=True)) for step in view.steps]
        offset = block.storage_offset() + origin + sum(s * t for s, t in zip(view.start, strides, strict=True))
        found: Any = block.as_strided((self.n, *view.shape), (block.stride(0), *along), offset)
        return found[:, 0]


def _part(ring: Ring, values: Tensor, step: int) -> Tensor:
    """What a ring holds of values (n, *shape) when a step runs, padding included."""
    first = ring.first_row(step) * ring.pitch
    whole = values.new_zeros((len(values), max(ring.layout.numel, first + ring.numel)))
    ring.layout.inner(whole).copy_(values)
    return whole[:, first : first + ring.numel]
