"""Operations whose result is true or false, place by place: comparisons, and sentences of conditions: `Condition`."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgen.sampling.machine.language import View
from fastgen.sampling.plan.builder import Builder
from fastgen.sampling.rules.pointwise import Pointwise
from fastgen.sampling.trace.graph import Operand, Value, map_arguments

# The op of the step language that an operator is, whether its operands are turned round, and whether its result is.
COMPARISONS = {
    "eq": ("eq", False, False),
    "ne": ("eq", False, True),
    "lt": ("lt", False, False),
    "gt": ("lt", True, False),
    "le": ("le", False, False),
    "ge": ("le", True, False),
    "_to_copy": ("eq", False, True),  # with 0, as what comes next
    "logical_not": ("eq", False, False),
    "bitwise_not": ("eq", False, False),
}
LOGICAL = ("logical_and", "bitwise_and", "logical_or", "bitwise_or")


class Condition(Pointwise):
    @staticmethod
    def takes(value: Value) -> bool:
        return value.data.dtype == torch.bool and value.op_name in (*COMPARISONS, *LOGICAL)

    def _is_instruction(self, builder: Builder, target: View, view: Callable[[Operand], View | Tensor]) -> bool:
        name, args = self.value.op_name, map_arguments(self.value.args, view)
        conditions = all(isinstance(one, View) and one.memory.dtype == torch.bool for one in args)
        if name == "_to_copy" and conditions:
            builder.pointwise("copy", target, args[0])
            return True
        if name in LOGICAL:
            if conditions:
                self._join(builder, target, args)
            return conditions
        op, turned, negated = COMPARISONS[name]
        operands = self._comparable(builder, [*args, 0.0][:2])
        if operands is None:
            return False
        found = builder.scratch(target.sizes, torch.bool) if negated else target
        builder.pointwise(op, found, *(operands[::-1] if turned else operands))
        if negated:
            builder.pointwise("eq", target, found, 0.0)
        return True

    def _join(self, builder: Builder, target: View, conditions: Sequence[View]) -> None:
        if self.value.op_name in ("logical_and", "bitwise_and"):
            builder.pointwise("mul", target, *conditions)
        else:  # not the first, or else the second
            other = builder.scratch(target.sizes, torch.bool)
            builder.pointwise("eq", other, conditions[0], 0.0)
            builder.pointwise("le", target, other, conditions[1])

    def _comparable(self, builder: Builder, args: Sequence[Any]) -> list[View | float] | None:
        """Operands as numbers of one real type, which holds them as they are; None where there is no such type."""
        views = [one for one in args if isinstance(one, View)]
        real = {one.memory.dtype for one in views} - {torch.int64, torch.bool}
        integers = [one for one in self.value.operands if one.dtype == torch.int64]
        if len(real) > 1 or not all(dtype.is_floating_point for dtype in real) or not all(map(_is_small, integers)):
            return None
        (dtype,) = real or {torch.float32}
        return [self._real(builder, one if isinstance(one, View) else float(one), dtype) for one in args]


def _is_small(operand: Operand) -> bool:
    """Whether integers are known to be such as float32 tells apart: levels, conditions, some constants."""
    return all(
        one.kind == "levels"
        or (one.kind == "constant" and bool((one.data.abs() < 2**24).all()))
        or (one.kind == "computed" and (_are_places(one) or all(s.dtype == torch.bool for s in one.operands)))
        for one in operand.values
    )


def _are_places(value: Value) -> bool:
    """Whether integers number what has been found among real numbers: the greatest, the strongest."""
    return value.op_name != "_to_copy" and all(one.dtype.is_floating_point for one in value.operands)
