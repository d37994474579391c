"""Takes a program and memory; plays it with torch, each instruction as `machine.definitions` says what it means.

What memory holds in another dtype than its own is converted to that, and what becomes of it back again.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fastgen.sampling.machine import definitions
from fastgen.sampling.machine.language import (
    Call,
    Fixed,
    Instruction,
    Lookup,
    Pointwise,
    Product,
    Rowwise,
    Temporary,
    View,
    views_of,
)
from fastgen.sampling.plan.plan import Plan, Step
from fastgen.sampling.run.memory import PlanMemory


class _State:
    """What one run of a program reads besides memory: its moving views, results of calls."""

    def __init__(self, views: dict[View, Tensor]) -> None:
        self.views = views
        self.results: dict[Temporary, Any] = {}


Play = Callable[[_State], Any]
PlayInto = Callable[[_State, Tensor], Any]


class TorchProgram:
    """Some instructions of a program (all of them where None), bound to the memory of a batch."""

    def __init__(
        self, plan: Plan, number: int, memory: PlanMemory, instructions: Sequence[Instruction] | None = None
    ) -> None:
        program = plan.programs[number]
        self.number, self.memory = number, memory
        instructions = program.instructions if instructions is None else instructions
        used = {view for one in instructions for view in views_of(one)}
        self._moving = [
            (k, view, *memory.strided(view, number)) for k, view in enumerate(program.moving()) if view in used
        ]
        self._plays = [self._bound(one) for one in instructions]

    def __call__(self, step: Step) -> None:
        views = {
            view: block.as_strided(sizes, strides, block.storage_offset() + int(step.offsets[k]))
            for k, view, block, sizes, strides in self._moving
        }
        state = _State(views)
        for play in self._plays:
            play(state)

    def _bound(self, one: Instruction) -> Play:
        if isinstance(one, Call):
            return self._bound_call(one)
        return self._into(one.out, self._bound_into(one))

    def _into(self, view: View, play: PlayInto) -> Play:
        dtype, place = view.memory.dtype, self._place(view)
        if self.memory.block(view.memory, self.number).dtype == dtype:
            return lambda state: play(state, place(state))

        def converted(state: _State) -> None:
            found = place(state).to(dtype)  # some write only a part
            play(state, found)
            place(state).copy_(found)

        return converted

    def _bound_into(self, one: Pointwise | Product | Rowwise | Lookup) -> PlayInto:
        if isinstance(one, Pointwise):
            function = definitions.POINTWISE[one.op]
            operands = [self._get(operand) for operand in one.operands]
            return lambda state, out: function(*[get(state) for get in operands], out=out)
        if isinstance(one, Product):
            shared = len(one.weight.sizes) == 2 and one.weight.memory.kind == "constant"
            rows, weight = self._get(one.rows), self._get(one.weight, shared)
            bias = one.added is not None and one.added.memory.kind == "constant" and len(one.added.sizes) == 1
            added = self._get(one.added, shared=bias)
            return lambda state, out: definitions.product(rows(state), weight(state), added(state), out)
        if isinstance(one, Rowwise):
            source, op, numbers = self._get(one.source), one.op, one.numbers
            return lambda state, out: definitions.rowwise(op, source(state), numbers, out)
        of_images = one.table.memory.kind != "constant"
        table, index = self._get(one.table, shared=not of_images), self._get(one.index)
        return lambda state, out: definitions.lookup(table(state), index(state), out, of_images)

    def _bound_call(self, call: Call) -> Play:
        function, result = call.function, call.result
        if result is None:
            target, *rest = call.args
            others = [self._get(one) for one in rest]
            return self._into(target, lambda state, out: function(out, *[get(state) for get in others]))
        args = [self._get(one) for one in call.args]
        kwargs = [(name, self._get(one)) for name, one in call.kwargs]

        def play(state: _State) -> None:
            state.results[result] = function(
                *[get(state) for get in args], **{name: get(state) for name, get in kwargs}
            )

        return play

    def _get(self, argument: Any, shared: bool = False) -> Callable[[_State], Any]:
        """How to come by an argument; `shared`: a constant without a dimension of images."""
        if isinstance(argument, View):
            dtype, place = argument.memory.dtype, self._place(argument, shared)
            if self.memory.block(argument.memory, self.number).dtype == dtype:
                return place
            return lambda state: place(state).to(dtype)
        if isinstance(argument, Temporary):
            return lambda state: state.results[argument]
        if isinstance(argument, tuple) and any(isinstance(one, (View, Temporary, Fixed)) for one in argument):
            inner = [self._get(one) for one in argument]
            return lambda state: [get(state) for get in inner]
        fixed = argument.tensor.to(self.memory.device) if isinstance(argument, Fixed) else argument
        return lambda _: fixed

    def _place(self, view: View, shared: bool = False) -> Callable[[_State], Tensor]:
        """Where a view is, as memory holds it."""
        if view.moves:
            return lambda state: state.views[view][0] if shared else state.views[view]
        block, sizes, strides = self.memory.strided(view, self.number)
        offset = block.storage_offset() + view.offset.at(())
        if shared:
            sizes, strides = sizes[1:], strides[1:]
        tensor = block.as_strided(sizes, strides, offset)
        return lambda _: tensor
