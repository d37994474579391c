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
from fastgen.sampling.trace.graph import CONSTANT, Operand, map_arguments

VANISHES = {"exp", "exp2", "sigmoid", "relu", "silu", "gelu", "softplus", "clamp", "clamp_min"}
SWALLOWS = 1e6  # No sum adds as much to a mask: what is rounded by so much, or as far below 0, stays as it is.


class Pointwise(Rule):
    @property
    def sees_zeros(self) -> bool:  # type: ignore[override]
        return self.value.op_name in ("mul", "div", "logical_and", "bitwise_and", "logical_or", "bitwise_or")

    _vanishing: Tensor | None = None

    @cached_property
    def vanishes(self) -> Operand | None:
        """Where the result is a constant zero, whatever lies in the operand there."""
        if self._vanishing is None:
            return None
        return self.analysis.constant(self._vanishing.float())

    def ready(self) -> tuple[Tensor, Tensor | None]:
        """An operation reads all of its operands, but for what is multiplied by zero or added to a mask."""
        name, operands = self.value.op_name, self.value.operands
        found = [self.analysis.ready(one) for one in operands]
        times = list(map(self._aligned, found))
        alike = len({id(one) for one in found}) == 1 and found[0].shape == self.value.shape
        ready = found[0] if alike else functools.reduce(torch.maximum, times)
        if name in ("mul", "div", "logical_and", "bitwise_and"):
            for one in operands if name != "div" else operands[:1]:
                zero = self._aligned(self.analysis.zero(one))
                ready = torch.where(zero, CONSTANT, ready) if zero.any() else ready
        if name == "mul" and any(not isinstance(one, Operand) and one == 0 for one in self.value.args):
            ready = torch.full((), CONSTANT, dtype=torch.int32)
        if name in ("logical_or", "bitwise_or") and self.value.data.dtype == torch.bool:
            for one, of_one in zip(operands, times, strict=True):
                true = (of_one == CONSTANT) & ~self._aligned(self.analysis.zero(one))
                ready = torch.where(true, CONSTANT, ready) if true.any() else ready
        low: Tensor | None = None
        if name in ("add", "sub", "clone", "_to_copy"):
            low = NOWHERE
            for one, of_one in zip(operands, times, strict=True):
                if (factor := self._factor(one)) == 1:
                    low = low | self._aligned(self.analysis.softmax_zero(one))
                elif one.dtype.is_floating_point:
                    low = low | ((of_one == CONSTANT) & (factor * self.analysis.data(one) <= SOFTMAX_ZERO))
            hidden = self._swallowed(times)
            if low.any():
                low = low & (self.value.data <= SOFTMAX_ZERO)
                hidden = hidden | (low & (self.value.data == -math.inf))
            ready = torch.where(compact(shrunk(hidden)), CONSTANT, ready) if hidden.any() else ready
        if name in VANISHES:
            vanishes = self._aligned(self.analysis.softmax_zero(operands[0]))
            if vanishes.any() and len(operands) == 1:
                vanishes = vanishes & (self.value.data == 0) & (self.analysis.data(operands[0]) <= -SWALLOWS)
                ready = torch.where(vanishes, CONSTANT, ready)
                self._vanishing = vanishes
        real = self.value.data.is_floating_point()
        if real and name in ("mul", "div") and not any(isinstance(one, Operand) for one in self.value.args[1:]):
            low = self._aligned(self.analysis.softmax_zero(operands[0]))
            low = low & (self.value.data <= SOFTMAX_ZERO) if low.any() else low
        return ready if ready.shape == self.value.shape else ready.expand(self.value.shape), low

    def _aligned(self, tensor: Tensor) -> Tensor:
        """In the dimensions of the value, with size 1 along those that it is expanded along."""
        return compact(tensor.expand(self.value.shape))

    def _factor(self, operand: Operand) -> Any:
        """What a sum or a difference multiplies an operand by."""
        if operand not in self.value.args[1:]:
            return 1
        alpha = self.value.kwargs.get("alpha", 1)
        return -alpha if self.value.op_name == "sub" else alpha

    def _swallowed(self, times: list[Tensor]) -> Tensor:
        """Where a constant is so large that rounding leaves nothing of what is added to it: the mask of a score."""
        found, data = NOWHERE, self.value.data
        for one, ready in zip(self.value.operands, times, strict=True) if data.is_floating_point() else ():
            constant = ready == CONSTANT
            if constant.any() and one.dtype.is_floating_point:
                factor, given = self._factor(one), compact(self.analysis.data(one))
                given = given if factor == 1 else factor * given
                large = given.abs() * torch.finfo(data.dtype).eps > SWALLOWS
                if large.any():
                    found = found | ((given == data) & (constant & large))
        return found

    def needs(self, times: Tensor) -> Iterator[tuple[Operand, Tensor]]:
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
            hidden = builder.broadcast(self.vanishes, region).order(order)
            builder.pointwise("erase", target, target, hidden)

    def _is_instruction(self, builder: Builder, target: View, view: Callable[[Operand], View | Tensor]) -> bool:
        """Writes the operation as instructions, where there are such."""
        name, dtype = self.value.op_name, self.value.data.dtype
        args, kwargs = map_arguments(self.value.args, view), map_arguments(self.value.kwargs, view)
        if name in ("clone", "_to_copy"):
            builder.pointwise("copy", target, args[0])
        elif name == "clamp" and self._is_plain(args) and not kwargs and not any(isinstance(k, View) for k in args[1:]):
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
