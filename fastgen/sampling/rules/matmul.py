"""Products of matrices, with or without a batch of them, and sums with a third operand."""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastgen.sampling.plan.builder import Builder
from fastgen.sampling.plan.layout import Box
from fastgen.sampling.plan.program import Linear, View
from fastgen.sampling.rules.base import Analysis, Rule, constant_operand, groups_of, reduce_to
from fastgen.sampling.rules.pointwise import ONE
from fastgen.sampling.trace.graph import CONSTANT, NEVER, Operand, Value

PATTERNS = 64  # kinds of columns up to which they are treated kind by kind
CHUNK = 2**24


class MatMul(Rule):
    """(..., M, K) @ (..., K, N); an element that is a constant zero takes no part."""

    def __init__(self, value: Value, analysis: Analysis) -> None:
        super().__init__(value, analysis)
        self._cuts: dict[tuple[int, ...], Tensor] = {}

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
        la = torch.where(za, CONSTANT, self.analysis.ready(a))
        lb = torch.where(zb, CONSTANT, self.analysis.ready(b))
        ready = torch.maximum(latest(la, zb), latest(lb.mT, za.mT).mT)
        if self.summand is not None:
            ready = torch.maximum(ready, self.analysis.ready(self.summand).expand(ready.shape))
            return ready, self.analysis.low(self.summand).expand(ready.shape)
        return ready, None

    def needs(self, times: Tensor) -> Iterator[tuple[Operand, Tensor]]:
        a, b = self.factors
        if self.summand is not None and not constant_operand(self.summand):
            yield self.summand, reduce_to(times, self.summand.shape)
        za, zb = self.analysis.zero(a), self.analysis.zero(b)
        if not constant_operand(a):
            yield a, torch.where(za, NEVER, -latest(-times, zb.mT, -NEVER))
        if not constant_operand(b):
            yield b, torch.where(zb, NEVER, -latest(-times.mT, za, -NEVER).mT)

    def fixed(self, box: Box) -> tuple[int, ...]:
        """Columns that constants are cut to."""
        return (box.start[-1],)

    def emit(self, builder: Builder, box: Box) -> None:
        a, b = self.factors
        out = builder.out(self.value, box)
        region = builder.region(box)
        inner = (Linear(0), a.shape[-1], 1)
        batch = region[:-2]
        plain = all(self.value.kwargs.get(name, 1) == 1 for name in ("alpha", "beta"))
        if constant_operand(b) and len(batch) == 0 and plain:
            weight = self._cut(b, 1, box)
            left = builder.read(a, [region[-2], inner])
            bias = self.summand
            if bias is None:
                emit_linear(builder, left, weight, None, out)
                return
            if constant_operand(bias) and bias.shape[:-1] in ((), (1,)):
                emit_linear(builder, left, weight, self._cut(bias, len(bias.shape) - 1, box).reshape(-1), out)
                return
        first = builder.read(a, [*batch[len(batch) - len(a.shape) + 2 :], region[-2], inner])
        second = builder.read(b, [*batch[len(batch) - len(b.shape) + 2 :], inner, region[-1]])
        found: Any = builder.make(torch.matmul, first, second)
        if self.summand is not None:
            alpha, beta = (self.value.kwargs.get(name, 1) for name in ("alpha", "beta"))
            aligned = region[len(region) - len(self.summand.shape) :]
            cut = [one if size > 1 else ONE for one, size in zip(aligned, self.summand.shape, strict=True)]
            summand: Any = builder.read(self.summand, cut).expand(box.sizes)
            if beta != 1:
                summand = builder.make(torch.mul, summand, beta)
            found = builder.make(functools.partial(torch.add, alpha=alpha), summand, found)
        builder.emit(Tensor.copy_, out, found)

    def _cut(self, operand: Operand, dim: int, box: Box) -> Tensor:
        """The columns of a constant that a box needs."""
        start, size, step = box.start[-1], box.sizes[-1], box.steps[-1]
        key = (id(operand), dim, start, size, step)
        if key not in self._cuts:
            data = self.analysis.data(operand)
            if data.shape[dim] > 1:
                data = data.narrow(dim, start, (size - 1) * step + 1)
                data = data[(slice(None),) * dim + (slice(None, None, step),)]
            self._cuts[key] = data.contiguous()
        return self._cuts[key]


def latest(times: Tensor, zero: Tensor, least: int = CONSTANT) -> Tensor:
    """out[..., m, n] = max over k with not zero[..., k, n] of times[..., m, k]; `least` where there is none."""
    rows, columns = times.shape[-2], zero.shape[-1]
    if not zero.any():
        return times.amax(-1, keepdim=True).expand(*times.shape[:-1], columns)
    if zero.dim() == 2:
        groups = groups_of(zero.mT, PATTERNS)
        if groups is not None:
            out = times.new_full((*times.shape[:-1], columns), least)
            for numbers, pattern in groups:
                live = torch.nonzero(~pattern).flatten()
                if len(live):
                    out[..., numbers] = times[..., live].amax(-1, keepdim=True)
            return out
    if times.dim() >= 2 and rows > 1 and bool((times == times[..., :1, :]).all()):
        return latest(times[..., :1, :], zero, least).expand(*times.shape[:-2], rows, columns)
    parts = []
    step = max(1, CHUNK // max(1, times.numel()))
    for first in range(0, columns, step):
        dead = zero[..., first : first + step].mT.unsqueeze(-3)
        parts.append(torch.where(dead, least, times.unsqueeze(-2)).amax(-1))
    return torch.cat(parts, -1)


def emit_linear(builder: Builder, x: View, weight: Tensor, added: View | Tensor | None, out: View) -> None:
    """out (..., N) = x (..., K) @ weight (K, N) + added, bias or map; one row where all but the last have size 1."""
    k, columns = weight.shape
    rows, target = x.collapse(), out.collapse()
    if rows.sizes in ((k,), ()) and target.sizes in ((columns,), ()):
        rows, target = (one if one.sizes else one.unsqueeze(0) for one in (rows, target))
        if isinstance(added, View):
            added = added.order([len(added.sizes) - 1])
        if added is None:
            builder.emit(torch.mm, rows, weight, out=target)
        else:
            builder.emit(torch.addmm, added, rows, weight, out=target)
        return
    builder.emit(linear, x, weight, added, out=out)


def linear(x: Tensor, weight: Tensor, added: Tensor | None, out: Tensor) -> Tensor:
    """x (..., K) @ weight (K, N) + added, (N,) or (..., N)"""
    found = torch.mm(x.reshape(-1, len(weight)), weight).view(out.shape)
    return out.copy_(found) if added is None else torch.add(found, added, out=out)
