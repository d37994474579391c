"""Choices between two values by a condition, place by place (`where`, `masked_fill`): `Selection`."""

import math
from collections.abc import Callable, Iterator
from functools import cached_property, reduce
from typing import Any

import torch
from torch import Tensor

from fastgen.sampling.machine.language import View
from fastgen.sampling.plan.builder import Builder
from fastgen.sampling.rules.base import SOFTMAX_ZERO, constant_operand, reduce_to
from fastgen.sampling.rules.pointwise import Pointwise
from fastgen.sampling.trace.element_times import compact
from fastgen.sampling.trace.graph import CONSTANT, NEVER, Operand, Value

CONSTANT_TIME = torch.tensor(CONSTANT, dtype=torch.int32)


class Selection(Pointwise):
    """Where the condition is constant, the result does not read what that leaves out."""

    sees_zeros = True

    @staticmethod
    def takes(value: Value) -> bool:
        return value.op_name in ("where", "masked_fill") and len(value.args) == 3

    @cached_property
    def condition(self) -> Operand:
        return self.value.args[0 if self.value.op_name == "where" else 1]

    @cached_property
    def choices(self) -> tuple[Any, Any]:
        """What stands where the condition is true, and where it is false: operands or numbers."""
        args = self.value.args
        return (args[1], args[2]) if self.value.op_name == "where" else (args[2], args[0])

    def ready(self) -> tuple[Tensor, Tensor | None]:
        first, second = (
            self._aligned(self.analysis.ready(one)) if isinstance(one, Operand) else CONSTANT_TIME
            for one in self.choices
        )
        known, true = self._known()
        every = reduce(torch.maximum, (self._aligned(self.analysis.ready(self.condition)), first, second))
        ready = torch.where(known, torch.where(true, first, second), every)
        low, other = map(self._softmax_zero, self.choices)
        return ready.expand(self.value.shape), torch.where(known, torch.where(true, low, other), low & other)

    def needs(self, times: Tensor) -> Iterator[tuple[Operand, Tensor]]:
        yield self.condition, reduce_to(times, self.condition.shape)
        known, true = self._known()
        for one, unused in zip(self.choices, (known & ~true, known & true), strict=True):
            if isinstance(one, Operand):
                wanted = torch.where(unused, NEVER, compact(times)) if unused.any() else times
                yield one, reduce_to(wanted.expand(times.shape), one.shape)

    def _known(self) -> tuple[Tensor, Tensor]:
        """Where the condition is constant, and where it is true if so."""
        constant = self._aligned(self.analysis.ready(self.condition)) == CONSTANT
        return constant, ~self._aligned(self.analysis.zero(self.condition))

    def _softmax_zero(self, choice: Any) -> Tensor:
        if isinstance(choice, Operand):
            return self._aligned(self.analysis.softmax_zero(choice))
        return torch.tensor(choice <= SOFTMAX_ZERO)

    # --- computing a part

    def _is_instruction(self, builder: Builder, target: View, view: Callable[[Operand], View | Tensor]) -> bool:
        dtype, condition = self.value.data.dtype, self.condition
        of_one_type = all(one.dtype == dtype for one in self._chosen_from if isinstance(one, Operand))
        if not dtype.is_floating_point or not of_one_type or condition.dtype != torch.bool or condition.shape == ():
            return False
        self._select(builder, target, view)
        return True

    @cached_property
    def _chosen_from(self) -> list[Operand | float]:
        """The choices, with numbers in the place of constants that hold but one."""
        return [
            float(self.analysis.data(one) if isinstance(one, Operand) else one)
            if not isinstance(one, Operand) or (one.shape == () and constant_operand(one))
            else one
            for one in self.choices
        ]

    def _select(self, builder: Builder, target: View, view: Callable[[Operand], View | Tensor]) -> None:
        """What is left out becomes 0, and both are added; -inf is put in place alone."""
        condition: Any = view(self.condition)
        choices: list[Any] = [view(one) if isinstance(one, Operand) else one for one in self._chosen_from]
        for one, other, op in zip(choices, choices[::-1], ("keep", "erase"), strict=True):
            if other == 0:
                builder.pointwise(op, target, one, condition)
                return
            if other == -math.inf:
                if op == "keep" and self._otherwise is not None:
                    condition = view(self._otherwise)
                elif op == "keep":
                    hidden = builder.scratch(target.sizes, torch.bool)
                    builder.pointwise("eq", hidden, condition, 0.0)
                    condition = hidden
                builder.pointwise("hide", target, one, condition)
                return
        rest = builder.scratch(target.sizes, target.memory.dtype)
        builder.pointwise("keep", target, choices[0], condition)
        builder.pointwise("erase", rest, choices[1], condition)
        builder.pointwise("add", target, target, rest)

    @cached_property
    def _otherwise(self) -> Operand | None:
        """Where a condition that is constant everywhere is false."""
        constant = all(one.kind == "constant" for one in self.condition.values)
        return self.analysis.constant(~self.analysis.data(self.condition)) if constant else None
