"""Memory of a batch, and the programs bound to it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastgen.sampling.plan.plan import Plan
from fastgen.sampling.plan.program import Memory
from fastgen.sampling.plan.sliding_rows import Ring
from fastgen.sampling.request import SampleRequest
from fastgen.sampling.run.prefill import prefill
from fastgen.sampling.trace.graph import CONSTANT, Value


class Run:
    """The memory of a batch of n images, and the programs bound to it."""

    def __init__(self, plan: Plan, n: int, device: torch.device) -> None:
        self.plan = plan
        self.n = n
        self.device = device
        self.blocks: dict[int, Tensor] = {}
        self._keep: list[Memory] = []
        self._scratch = [
            torch.empty(n * size, dtype=dtype, device=device)
            for size, dtype in zip(plan.scratch.sizes, plan.scratch.dtypes, strict=True)
        ]
        programs = self.bound()
        self.steps = [(programs[number], self.offsets(offsets)) for number, offsets in plan.steps]
        self._initial: list[tuple[Tensor, Tensor]] = []  # rings, and what they begin with
        self._moves: dict[int, list[tuple[Tensor, Tensor]]] = {}  # step -> where rows go, and which
        for index in sorted(plan.storage.stored):
            value = plan.timed.graph.values[index]
            if value.kind == "computed":
                constant = plan.timed.graph.of(plan.schedule.times, value) == CONSTANT
                if constant.any() or id(plan.storage.memories.get(index)) in plan.rings:
                    self._start_with(value, torch.where(constant, value.data, 0).to(device))
        self._levels = self._inner(plan.levels)
        self.levels = self._levels[:, 0]
        view = plan.output.map
        assert view is not None
        strides, origin = plan.storage.strides(view.value)
        memory = self.block(plan.storage.memory(view.value))
        if view.value.kind == "constant":
            memory = memory.expand(n, -1)
        along = [sum(s * t for s, t in zip(step, strides, strict=True)) for step in view.steps]
        offset = origin + sum(s * t for s, t in zip(view.start, strides, strict=True))
        self._params = memory.as_strided((n, *view.shape), (memory.stride(0), *along), offset)[:, 0]

    def bound(self) -> list[Callable[[list[Any]], None]]:
        """The plan's programs, ready to run on this batch."""
        return [program.bind(self.n, self.block, self.on_device) for program in self.plan.programs]

    def _start_with(self, value: Value, constants: Tensor) -> None:
        """Puts the constants of a stored value, 0 elsewhere, where they belong."""
        memory = self.plan.storage.memory(value)
        block, ring = self.block(memory), self.plan.rings.get(id(memory))
        if ring is None:
            self._inner(value).copy_(constants)
            return
        self._initial.append((block, self._part(ring, constants[None], 0)))
        for move in ring.moves:
            source = block[:, move.first * ring.pitch : move.stop * ring.pitch]
            self._moves.setdefault(move.step, []).append((block[:, : source.shape[1]], source))

    @staticmethod
    def _part(ring: Ring, values: Tensor, step: int) -> Tensor:
        """What a ring holds of values (n, *shape) when a step runs, padding included."""
        first = ring.first_row(step) * ring.pitch
        whole = values.new_zeros((len(values), max(ring.layout.numel, first + ring.numel)))
        ring.layout.inner(whole).copy_(values)
        return whole[:, first : first + ring.numel]

    def offsets(self, offsets: list[Any]) -> Any:
        """What a program is called with in a step."""
        return [self.on_device(one) for one in offsets]

    def block(self, memory: Memory) -> Tensor:
        if id(memory) not in self.blocks:
            self._keep.append(memory)
            if memory.data is not None:
                found = memory.data.to(self.device).view(1, -1)
            elif memory.kind == "scratch":
                found = self._scratch[self.plan.scratch.block_of[id(memory)]][: self.n * memory.numel].view(self.n, -1)
            else:
                ring = self.plan.rings.get(id(memory))
                size = memory.numel if ring is None else ring.numel
                found = torch.zeros((self.n, size), dtype=memory.dtype, device=self.device)
            self.blocks[id(memory)] = found
        return self.blocks[id(memory)]

    def on_device(self, one: Any) -> Any:
        return one.to(self.device) if isinstance(one, Tensor) and one.device != self.device else one

    def params(self) -> Tensor:
        """The model's output for what has been drawn, (n, ..., H, W), a view."""
        return self._params

    def begin(self, request: SampleRequest) -> None:
        """Takes the condition, sets all levels to zero, computes what depends on no pixel."""
        self._levels.zero_()
        leaves = [leaf for leaf in tree_leaves(request.condition) if isinstance(leaf, Tensor) and leaf.dim()]
        for value, leaf in zip(self.plan.leaves, leaves, strict=True):
            self._inner(value).copy_(leaf.view(self.n, *value.shape))
        for block, initial in self._initial:
            block.copy_(initial)
        program, offsets = self.steps[0]
        program(offsets)

    def step(self, place: int) -> None:
        """Computes what the level drawn at this place decides."""
        for target, source in self._moves.get(place + 1, ()):
            target.copy_(source.clone())
        program, offsets = self.steps[place + 1]
        program(offsets)

    def fill_known(self, levels: Tensor, count: int) -> None:
        """Computes all that the first `count` places of levels (n, C, H, W) decide, in one pass."""
        self.levels.copy_(levels)
        given = {self.plan.levels.index: self._levels.contiguous()}
        for value in self.plan.leaves:
            given[value.index] = self._inner(value).contiguous()

        def keep(value: Value, found: Tensor) -> None:
            memory = self.plan.storage.memory(value)
            ring = self.plan.rings.get(id(memory))
            if ring is None:
                self._inner(value).copy_(found)
            else:
                self.block(memory).copy_(self._part(ring, found, count))

        prefill(self.plan, given, keep)

    def _inner(self, value: Value) -> Tensor:
        """A stored value, (n, *shape)."""
        return self.plan.storage.layouts[value.index].inner(self.block(self.plan.storage.memory(value)))
