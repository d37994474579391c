"""Operations that compute every element from the same place of their operands: `Pointwise`."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastgen.sampling.machine.language import View
from fastgen.sampling.plan.builder import Builder
from fastgen.sampling.plan.layout import Box
from fastgen.sampling.rules.base import NOWHERE, SOFTMAX_ZERO, Rule, constant_operand, reduce_to, result_of
from fastgen.sampling.trace.element_times import compact, shrunk
from fastgen.sampling.trace.graph import CONSTANT, NEVER, Operand, Value, map_arguments

SWALLOWS = 1e6  # where a sum is rounded by more than this, its smaller part counts as nothing
CONSTANT_TIME = torch.tensor(CONSTANT, dtype=torch.int32)


class Pointwise(Rule):
    @property
    def sees_zeros(self) -> bool:  # type: ignore[override]
        return self.value.op_name in (
            *("mul", "div", "where", "masked_fill"),
            *("logical_and", "bitwise_and", "logical_or", "bitwise_or"),
        )

    _vanishing: Tensor | None = None

    @cached_property
    def vanishes(self) -> Operand | None:
        """Where the result is a constant zero, whatever lies in the operand there."""
        if self._vanishing is None:
            return None
        return self.analysis.constant(self._vanishing.expand(self.value.shape).float())

    def ready(self) -> tuple[Tensor, Tensor | None]:
        found, softmax_zero = self._selected() if self.chosen() is not None else self._of_all()
        return found.expand(self.value.shape), softmax_zero

    def _of_all(self) -> tuple[Tensor, Tensor | None]:
        """Of an operation that reads all of its operands, but for what is multiplied by zero or added to a mask."""
        name, operands = self.value.op_name, self.value.operands
        times = [self._aligned(self.analysis.ready(one)) for one in operands]
        ready = functools.reduce(torch.maximum, times)
        if name in ("mul", "div", "logical_and", "bitwise_and"):
            for one in operands if name != "div" else operands[:1]:
                zero = self._aligned(self.analysis.zero(one))
                ready = torch.where(zero, CONSTANT, ready) if zero.any() else ready
        if name in ("logical_or", "bitwise_or") and self.value.data.dtype == torch.bool:
            for one, of_one in zip(operands, times, strict=True):
                true = (of_one == CONSTANT) & ~self._aligned(self.analysis.zero(one))
                ready = torch.where(true, CONSTANT, ready) if true.any() else ready
        low: Tensor | None = None
        if name in ("add", "sub", "clone", "_to_copy"):
            summands = operands if name != "sub" else [one for one in self.value.args[:1] if isinstance(one, Operand)]
            low = NOWHERE
            for one in summands:
                low = low | self._aligned(self.analysis.softmax_zero(one))
            hidden = self._swallowed(summands, times)
            hidden = hidden | (low & (self.value.data == -math.inf)) if low.any() else hidden
            ready = torch.where(compact(shrunk(hidden)), CONSTANT, ready) if hidden.any() else ready
        if name in ("exp", "exp2", "sigmoid"):
            vanishes = self._aligned(self.analysis.softmax_zero(operands[0]))
            if vanishes.any():
                vanishes = vanishes & (self.value.data == 0)
                ready = torch.where(vanishes, CONSTANT, ready)
                self._vanishing = vanishes
        real = self.value.data.is_floating_point()
        if real and name in ("mul", "div") and not any(isinstance(one, Operand) for one in self.value.args[1:]):
            low = self._aligned(self.analysis.softmax_zero(operands[0]))
            low = low & (self.value.data <= SOFTMAX_ZERO) if low.any() else low
        return ready, low

    def _selected(self) -> tuple[Tensor, Tensor | None]:
        """Of a selection, which does not read what a constant condition leaves out."""
        chosen = self.chosen()
        assert chosen is not None
        condition, first, second = chosen
        times = [CONSTANT_TIME if one is None else self._aligned(self.analysis.ready(one)) for one in (first, second)]
        of_condition = self._aligned(self.analysis.ready(condition))
        known, value = of_condition == CONSTANT, ~self._aligned(self.analysis.zero(condition))
        ready = torch.where(
            known, torch.where(value, times[0], times[1]), functools.reduce(torch.maximum, [of_condition, *times])
        )
        a, b = (self._softmax_zero(t, one) for t, one in zip(self._given(), (first, second), strict=True))
        return ready, torch.where(known, torch.where(value, a, b), a & b)

    def _aligned(self, tensor: Tensor) -> Tensor:
        """In the dimensions of the value, with size 1 along those that it is expanded along."""
        return compact(tensor.expand(self.value.shape))

    def _swallowed(self, summands: list[Operand], times: list[Tensor]) -> Tensor:
        """Where a constant is so large that rounding leaves nothing of what is added to it: the mask of a score."""
        found, data = NOWHERE, self.value.data
        for one, ready in zip(summands, times, strict=False) if data.is_floating_point() else ():
            constant = ready == CONSTANT
            if constant.any() and one.dtype.is_floating_point:
                given = self.analysis.data(one)
                large = given.abs() * torch.finfo(data.dtype).eps > SWALLOWS
                if large.any():
                    found = found | ((given == data) & constant & large)
        return found

    def _softmax_zero(self, argument: Any, operand: Operand | None) -> Tensor:
        if operand is None:
            return torch.tensor(argument <= SOFTMAX_ZERO)
        return self._aligned(self.analysis.softmax_zero(operand))

    def _given(self) -> tuple[Any, Any]:
        """What a selection takes where its condition is true, and where it is false, numbers too."""
        args = self.value.args
        return (args[1], args[2]) if self.value.op_name == "where" else (args[2], args[0])

    def chosen(self) -> tuple[Operand, Operand | None, Operand | None] | None:
        """Of a selection: the condition, what stands where it is true, and where it is false; None for a number."""
        args = self.value.args
        if self.value.op_name == "where" and isinstance(args[0], Operand) and len(args) == 3:
            return args[0], _or_none(args[1]), _or_none(args[2])
        if self.value.op_name == "masked_fill" and isinstance(args[1], Operand):
            return args[1], _or_none(args[2]), _or_none(args[0])
        return None

    def needs(self, times: Tensor) -> Iterator[tuple[Operand, Tensor]]:
        chosen = self.chosen()
        if chosen is not None:
            condition, first, second = chosen
            yield condition, reduce_to(times, condition.shape)
            known = self._aligned(self.analysis.ready(condition)) == CONSTANT
            value = ~self._aligned(self.analysis.zero(condition))
            for one, unused in ((first, known & ~value), (second, known & value)):
                if one is not None:
                    wanted = torch.where(unused, NEVER, compact(times)) if unused.any() else times
                    yield one, reduce_to(wanted.expand(times.shape), one.shape)
            return
        for one in self.value.operands:
            if not constant_operand(one):
                yield one, reduce_to(times, one.shape)

    def emit(self, builder: Builder, box: Box) -> None:
        out = builder.out(self.value, box)
        order = [d for d in builder.storage.layouts[self.value].order if box.sizes[d] > 1]
        region = builder.region(box)

        def view(operand: Operand) -> View | Tensor:
            if operand.shape == () and constant_operand(operand):
                return self.analysis.data(operand)  # such a number takes no part in type promotion
            return builder.broadcast(operand, region).order(order)

        target = out.order(order)
        if not self._is_instruction(builder, target, view):
            args, kwargs = map_arguments(self.value.args, view), map_arguments(self.value.kwargs, view)
            builder.fill(target, builder.make(result_of(self.value.op, self.value.output), *args, **kwargs))
        if self.vanishes is not None:  # whatever lies where the operand is low
            hidden = builder.read(self.vanishes, region).order(order)
            builder.pointwise("erase", target, target, hidden)

    def _is_instruction(self, builder: Builder, target: View, view: Callable[[Operand], View | Tensor]) -> bool:
        """Writes the operation as instructions, where there are such."""
        name, dtype = self.value.op_name, self.value.data.dtype
        if self._selects:
            self._select(builder, target, view)
            return True
        args, kwargs = map_arguments(self.value.args, view), map_arguments(self.value.kwargs, view)
        copies = name in ("clone", "_to_copy")
        if copies and (dtype != torch.bool or args[0].memory.dtype == torch.bool):
            builder.pointwise("copy", target, args[0])
        elif dtype == torch.bool and name in (*COMPARISONS, *LOGICAL):
            return self._decide(builder, target, args)
        elif name == "clamp" and self._is_plain(args) and not kwargs:
            found = args[0]
            for op, bound in zip(("maximum", "minimum"), args[1:], strict=False):
                if bound is not None:
                    builder.pointwise(op, target, found, float(bound))
                    found = target
        elif (known := instruction_of(name, args, kwargs)) is not None and self._is_plain(args):
            builder.pointwise(known[0], target, *(self._real(builder, one, dtype) for one in known[1]))
        else:
            return False
        return True

    def _decide(self, builder: Builder, target: View, args: Sequence[Any]) -> bool:
        """A comparison, a sentence of conditions, or what a number is as a condition; False where it is none."""
        name = self.value.op_name
        conditions = all(isinstance(one, View) and one.memory.dtype == torch.bool for one in args)
        if name in LOGICAL and not conditions:
            return False
        if name in ("logical_and", "bitwise_and"):
            builder.pointwise("mul", target, *args)
            return True
        if name in ("logical_or", "bitwise_or"):  # not the first, or else the second
            other = builder.scratch(target.sizes, torch.bool)
            builder.pointwise("eq", other, args[0], 0.0)
            builder.pointwise("le", target, other, args[1])
            return True
        op, turned, negated = COMPARISONS[name]
        operands = self._comparable(builder, [*args, 0.0][:2])
        if operands is None:
            return False
        found = builder.scratch(target.sizes, torch.bool) if negated else target
        builder.pointwise(op, found, *(operands[::-1] if turned else operands))
        if negated:
            builder.pointwise("eq", target, found, 0.0)
        return True

    def _comparable(self, builder: Builder, args: Sequence[Any]) -> list[View | float] | None:
        """Operands as numbers of one real type, which holds them as they are; None where there is no such type."""
        views = [one for one in args if isinstance(one, View)]
        real = {one.memory.dtype for one in views} - {torch.int64, torch.bool}
        integers = [one for one in self.value.operands if one.dtype == torch.int64]
        if len(real) > 1 or not all(dtype.is_floating_point for dtype in real) or not all(map(_is_small, integers)):
            return None
        (dtype,) = real or {torch.float32}
        return [self._real(builder, one if isinstance(one, View) else float(one), dtype) for one in args]

    @cached_property
    def _selects(self) -> bool:
        """Whether it is a selection of real numbers of one type."""
        chosen, dtype = self.chosen(), self.value.data.dtype
        if chosen is None or not dtype.is_floating_point or chosen[0].dtype != torch.bool or chosen[0].shape == ():
            return False
        return all(one.dtype == dtype for one in self._selected_from if isinstance(one, Operand))

    @property
    def _selected_from(self) -> list[Operand | float]:
        """As `_given`, with numbers in the place of constants that hold but one."""
        return [
            float(self.analysis.data(one) if isinstance(one, Operand) else one)
            if not isinstance(one, Operand) or (one.shape == () and constant_operand(one))
            else one
            for one in self._given()
        ]

    def _select(self, builder: Builder, target: View, view: Callable[[Operand], View | Tensor]) -> None:
        """What is left out becomes 0, and both are added; -inf is put in place alone."""
        chosen = self.chosen()
        assert chosen is not None
        condition: Any = view(chosen[0])
        given: list[Any] = [view(one) if isinstance(one, Operand) else one for one in self._selected_from]
        for one, other, op in zip(given, given[::-1], ("keep", "erase"), strict=True):
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
        builder.pointwise("keep", target, given[0], condition)
        builder.pointwise("erase", rest, given[1], condition)
        builder.pointwise("add", target, target, rest)

    @cached_property
    def _otherwise(self) -> Operand | None:
        """Of a selection by a constant condition: where that is false."""
        condition = self.value.operands[0 if self.value.op_name == "where" else 1]
        known = all(one.kind == "constant" for one in condition.values)
        return self.analysis.constant(~self.analysis.data(condition)) if known else None

    def _is_plain(self, args: Sequence[Any]) -> bool:
        """Whether result and operands are real numbers of one type, but for levels and conditions."""
        dtype = self.value.data.dtype
        types = (dtype, torch.int64, torch.bool)
        return dtype.is_floating_point and all(one.memory.dtype in types for one in args if isinstance(one, View))

    def _real(self, builder: Builder, operand: View | float, dtype: torch.dtype) -> View | float:
        """Levels as numbers of a type; conditions are numbers of any."""
        if isinstance(operand, float) or operand.memory.dtype in (dtype, torch.bool):
            return operand
        found = builder.scratch(operand.sizes, dtype)
        builder.pointwise("copy", found, operand)
        return found


# Operators whose result is a condition: the op of the step language, whether its operands are turned round, and whether
# its result is.
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
# Operators that are an op of the step language by another name, or by the same one.
SAME_NAME = {
    "add", "sub", "mul", "div", "neg", "relu", "tanh", "sigmoid", "exp", "expm1", "log", "silu", "square", "abs",
    "sqrt", "rsqrt", "reciprocal", "maximum", "minimum", "log1p", "erf",
}  # fmt: skip
POWERS: dict[Any, str] = {(2,): "square", (0.5,): "sqrt", (-0.5,): "rsqrt", (-1,): "reciprocal"}


def instruction_of(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[str, list[Any]] | None:
    """The op of the step language that an operator is, and its operands; None where it is none."""
    numbers = {key: value for key, value in kwargs.items() if value is not None}
    if name == "gelu":
        return ("gelu_tanh" if numbers.get("approximate", "none") == "tanh" else "gelu"), list(args[:1])
    if numbers:
        return None
    if name == "clamp_min" and args[1:] == (0,):
        return "relu", list(args[:1])
    if name == "pow" and args[1:] in POWERS:
        return POWERS[args[1:]], list(args[:1])
    if name == "softplus" and args[1:] in ((), (1,), (1, 20)):
        return "softplus", list(args[:1])
    if name == "elu" and set(args[2:]) <= {1}:
        return "elu", [args[0], float(args[1]) if len(args) > 1 else 1.0]
    if name == "leaky_relu":
        return "leaky_relu", [args[0], float(args[1]) if len(args) > 1 else 0.01]
    if name not in SAME_NAME or len(args) > 2:
        return None
    operands = [float(one) if isinstance(one, (int, float, Tensor)) else one for one in args]
    return (name, operands) if all(isinstance(one, (View, float)) for one in operands) else None


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


def _or_none(argument: Any) -> Operand | None:
    return argument if isinstance(argument, Operand) else None
