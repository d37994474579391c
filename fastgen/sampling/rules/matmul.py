"""Products of matrices, with or without a batch of them, and sums with a third operand."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgen.sampling.machine.language import AffineOffset, View
from fastgen.sampling.plan.builder import Builder
from fastgen.sampling.plan.layout import Box
from fastgen.sampling.rules.base import Rule, constant_operand, groups_of, reduce_to
from fastgen.sampling.trace.element_times import compact, kinds_of
from fastgen.sampling.trace.graph import CONSTANT, NEVER, Operand

PATTERNS = 64  # kinds of columns up to which they are treated kind by kind
CHUNK = 2**24


class MatMul(Rule):
    """(..., M, K) @ (..., K, N); an element that is a constant zero takes no part."""

    @property
    def factors(self) -> tuple[Operand, Operand]:
        args = self.value.args
        return (args[1], args[2]) if len(args) > 2 else (args[0], args[1])

    @property
    def summand(self) -> Operand | None:
        args = self.value.args
        return args[0] if len(args) > 2 and self.value.kwargs.get("beta", 1) != 0 else None

    @property
    def multiply_adds(self) -> float:
        return self.factors[0].shape[-1]

    def ready(self) -> tuple[Tensor, Tensor | None]:
        a, b = self.factors
        za, zb = self.analysis.zero(a), self.analysis.zero(b)
        la, lb = (_without(self.analysis.ready(one), zero, CONSTANT) for one, zero in ((a, za), (b, zb)))
        ready = torch.maximum(compact(latest(la, zb)), compact(latest(lb.mT, za.mT).mT)).expand(self.value.shape)
        if self.summand is None:
            return ready, None
        added = self.analysis.ready(self.summand).expand(ready.shape)
        low = self.analysis.softmax_zero(self.summand)
        return torch.maximum(compact(ready), compact(added)).expand(ready.shape), low.expand(ready.shape)

    def needs(self, times: Tensor) -> Iterator[tuple[Operand, Tensor]]:
        a, b = self.factors
        if self.summand is not None and not constant_operand(self.summand):
            yield self.summand, reduce_to(times, self.summand.shape)
        za, zb = self.analysis.zero(a), self.analysis.zero(b)
        negated = (-compact(times)).expand(times.shape)
        for one, other, zero, rows in ((a, zb.mT, za, negated), (b, za, zb, negated.mT)):
            if not constant_operand(one):
                found = latest(rows, other, -NEVER)
                wanted = (-compact(found)).expand(found.shape)
                yield one, _without(wanted if one is a else wanted.mT, zero, NEVER)

    def fixed(self, boxes: Any) -> Sequence[Any]:
        """Columns that constants are cut to."""
        return (boxes.start[-1],)

    def emit(self, builder: Builder, box: Box) -> None:
        a, b = self.factors
        out, summand = builder.out(self.value, box), self.summand
        region = builder.region(box)
        inner = (AffineOffset(0), a.shape[-1], 1)
        batch = region[:-2]
        alpha, beta = (self.value.kwargs.get(name, 1) for name in ("alpha", "beta"))
        plain = alpha == beta == 1
        if constant_operand(b) and not batch and plain:
            columns = (AffineOffset(box.start[-1]), box.sizes[-1], box.steps[-1])
            if summand is None or (constant_operand(summand) and summand.shape[:-1] in ((), (1,))):
                rows = [region[-2], columns]
                added = None if summand is None else builder.broadcast(summand, rows).order([1])
                builder.product(out, builder.read(a, [region[-2], inner]), builder.read(b, [inner, columns]), added)
                return
        first = builder.read(a, [*batch[len(batch) - len(a.shape) + 2 :], region[-2], inner])
        second = builder.read(b, [*batch[len(batch) - len(b.shape) + 2 :], inner, region[-1]])
        if plain and self._is_plain(first, second):
            added = None if summand is None else builder.broadcast(summand, region)
            builder.product(out, first, second, added)
            return
        if self._is_plain(first, second) and summand is not None:
            builder.product(out, first, second)
            builder.pointwise("mul", out, out, float(alpha))
            part = builder.scratch(out.sizes, out.memory.dtype)
            builder.pointwise("mul", part, builder.broadcast(summand, region), float(beta))
            builder.pointwise("add", out, out, part)
            return
        found: Any = builder.make(torch.matmul, first, second)
        if summand is not None:
            scaled: Any = builder.broadcast(summand, region)
            if beta != 1:
                scaled = builder.make(torch.mul, scaled, beta)
            found = builder.make(torch.add, scaled, found, alpha=alpha)
        builder.fill(out, found)

    def _is_plain(self, *factors: View) -> bool:
        """Whether all has one type, which sums are not rounded to on the way."""
        dtype = self.value.data.dtype
        once = self.summand is None and dtype.is_floating_point
        return (once or dtype in (torch.float32, torch.float64)) and all(one.memory.dtype == dtype for one in factors)


def _without(times: Tensor, zero: Tensor, instead: int) -> Tensor:
    """The times, and something else where an element is a constant zero."""
    return torch.where(compact(zero), instead, compact(times)).expand(times.shape) if zero.any() else times


def latest(times: Tensor, zero: Tensor, least: int = CONSTANT) -> Tensor:
    """out[..., m, n] = max over k with not zero[..., k, n] of times[..., m, k]; `least` where there is none."""
    shape = (*times.shape[:-1], zero.shape[-1])
    if times.shape[-1] == 0:
        return times.new_full((), least).expand(shape)
    times, zero = compact(times), compact(zero)
    if not zero.any() or bool((times == least).all()):
        return times.amax(-1, keepdim=True).expand(shape)
    if times.shape[-2] > 1 and bool((times == times[..., :1, :]).all()):
        times = times[..., :1, :]
    inner = max(times.shape[-1], zero.shape[-2])
    times, zero = times.expand(*times.shape[:-1], inner), zero.expand(*zero.shape[:-2], inner, zero.shape[-1])
    if zero.numel() == math.prod(zero.shape[-2:]):
        columns = zero.reshape(zero.shape[-2:]).mT
        if kinds_of(columns)[0] <= PATTERNS:
            out = times.new_full((*times.shape[:-1], zero.shape[-1]), least)
            for numbers, pattern in groups_of(columns):
                live = torch.nonzero(~pattern).flatten()
                if len(live):
                    out[..., numbers] = times[..., live].amax(-1, keepdim=True)
            return out.expand(shape)
    parts = []
    for some in zero.split(max(1, CHUNK // max(1, times.numel())), -1):
        parts.append(torch.where(some.mT.unsqueeze(-3), least, times.unsqueeze(-2)).amax(-1))
    return torch.cat(parts, -1).expand(shape)
