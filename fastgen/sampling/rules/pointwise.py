"""Operations that compute every element from the same place of their operands."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastgen.sampling.plan.builder import Builder
from fastgen.sampling.plan.layout import Box
from fastgen.sampling.plan.program import Linear, View
from fastgen.sampling.rules.base import LOW, Rule, constant_operand, reduce_to, result_of
from fastgen.sampling.rules.out_variants import out_variant, relu
from fastgen.sampling.trace.graph import CONSTANT, NEVER, Operand, map_arguments

SWALLOWS = 1e6  # what rounding of a sum has to take away, for its smaller part to count as nothing
ONE = (Linear(0), 1, 1)  # all of a dimension of size 1


class Pointwise(Rule):
    vanishes: Operand | None = None

    def ready(self) -> tuple[Tensor, Tensor | None]:
        shape, name = self.value.shape, self.name
        operands = self.value.operands
        times = [self.analysis.ready(one).expand(shape) for one in operands]
        chosen = self.chosen()
        if chosen is not None:
            condition, first, second = chosen
            pick = [t if t is None else self.analysis.ready(t) for t in (first, second)]
            known = self.analysis.ready(condition).expand(shape) == CONSTANT
            value = (~self.analysis.zero(condition)).expand(shape)
            a, b = (torch.full((), CONSTANT, dtype=torch.int32) if t is None else t for t in pick)
            ready = torch.where(known, torch.where(value, a, b), torch.stack(times).amax(0))
            a, b = (self._low(t, operand) for t, operand in zip(self._given(), (first, second), strict=True))
            return ready, torch.where(known, torch.where(value, a, b), a & b)
        ready = times[0].clone()
        for other in times[1:]:
            torch.maximum(ready, other, out=ready)
        if name in ("mul", "div", "logical_and", "bitwise_and"):
            factors = operands if name != "div" else operands[:1]
            for one in factors:
                ready = torch.where(self.analysis.zero(one).expand(shape), CONSTANT, ready)
        low = None
        if name in ("add", "sub", "clone", "_to_copy"):
            summands = operands if name != "sub" else [one for one in self.value.args[:1] if isinstance(one, Operand)]
            low = torch.zeros(shape, dtype=torch.bool)
            for one in summands:
                low |= self.analysis.low(one).expand(shape)
            ready = torch.where(low & (self.value.data == -math.inf) | self._swallowed(summands), CONSTANT, ready)
        if name in ("exp", "exp2", "sigmoid"):
            vanishes = self.analysis.low(operands[0]) & (self.value.data == 0)
            ready = torch.where(vanishes, CONSTANT, ready)
            if vanishes.any():
                self.vanishes = self.analysis.constant(vanishes)
        real = self.value.data.is_floating_point()
        if real and name in ("mul", "div") and not any(isinstance(one, Operand) for one in self.value.args[1:]):
            low = self.analysis.low(operands[0]) & (self.value.data <= LOW)
        return ready, low

    @property
    def name(self) -> str:
        return self.value.op._schema.name.split("::")[1]

    def _swallowed(self, summands: list[Operand]) -> Tensor:
        """Where a constant is so large that rounding leaves nothing of what is added to it: the mask of a score."""
        found, data = torch.zeros(self.value.shape, dtype=torch.bool), self.value.data
        for one in summands if data.is_floating_point() else []:
            constant = self.analysis.ready(one) == CONSTANT
            if constant.any():
                same = self.analysis.data(one).expand(data.shape) == data
                found |= same & constant.expand(data.shape) & (data.abs() * torch.finfo(data.dtype).eps > SWALLOWS)
        return found

    def _low(self, argument: Any, operand: Operand | None) -> Tensor:
        return torch.tensor(argument <= LOW) if operand is None else self.analysis.low(operand)

    def _given(self) -> tuple[Any, Any]:
        """What a selection takes where its condition is true, and where it is false, numbers too."""
        args = self.value.args
        return (args[1], args[2]) if self.name == "where" else (args[2], args[0])

    def chosen(self) -> tuple[Operand, Operand | None, Operand | None] | None:
        """Of a selection: the condition, what stands where it is true, and where it is false; None for a number."""
        args = self.value.args
        if self.name == "where" and isinstance(args[0], Operand) and len(args) == 3:
            return args[0], _or_none(args[1]), _or_none(args[2])
        if self.name == "masked_fill" and isinstance(args[1], Operand):
            return args[1], _or_none(args[2]), _or_none(args[0])
        return None

    def needs(self, times: Tensor) -> Iterator[tuple[Operand, Tensor]]:
        chosen = self.chosen()
        if chosen is not None:
            condition, first, second = chosen
            yield condition, reduce_to(times, condition.shape)
            known = self.analysis.ready(condition).expand(times.shape) == CONSTANT
            value = (~self.analysis.zero(condition)).expand(times.shape)
            for one, unused in ((first, known & ~value), (second, known & value)):
                if one is not None:
                    yield one, reduce_to(torch.where(unused, NEVER, times), one.shape)
            return
        for one in self.value.operands:
            if not constant_operand(one):
                yield one, reduce_to(times, one.shape)

    def emit(self, builder: Builder, box: Box) -> None:
        out = builder.out(self.value, box)
        order = [d for d in builder.storage.layouts[self.value.index].order if box.sizes[d] > 1]
        region = builder.region(box)

        def view(operand: Operand) -> View | Tensor:
            if operand.shape == () and constant_operand(operand):
                return self.analysis.data(operand)  # such a number takes no part in type promotion
            aligned = region[len(region) - len(operand.shape) :]
            cut = [one if size > 1 else ONE for one, size in zip(aligned, operand.shape, strict=True)]
            return builder.read(operand, cut).expand(box.sizes).order(order)

        args, kwargs = map_arguments(self.value.args, view), map_arguments(self.value.kwargs, view)
        target = out.order(order)
        if self.name in ("clone", "_to_copy"):
            builder.emit(Tensor.copy_, target, args[0])
        elif self.name == "relu":
            builder.emit(relu, args[0], out=target)
        elif (function := out_variant(self.value.op)) is not None:
            builder.emit(function, *args, **kwargs, out=target)
        else:
            result = builder.make(result_of(self.value.op, self.value.output), *args, **kwargs)
            builder.emit(Tensor.copy_, target, result)
        if self.vanishes is not None:  # whatever lies where the operand is low
            builder.emit(Tensor.masked_fill_, target, builder.read(self.vanishes, region).order(order), 0)


def _or_none(argument: Any) -> Operand | None:
    return argument if isinstance(argument, Operand) else None
