"""Products of matrices, with or without a batch of them, and sums with a third operand."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastgen.sampling.machine.language import AffineOffset, View, constant
from fastgen.sampling.plan.builder import Builder
from fastgen.sampling.plan.layout import Box
from fastgen.sampling.rules.base import Analysis, Rule, constant_operand, groups_of, reduce_to
from fastgen.sampling.rules.pointwise import ONE
from fastgen.sampling.trace.graph import CONSTANT, NEVER, Operand, Value

PATTERNS = 64  # kinds of columns up to which they are treated kind by kind
CHUNK = 2**24


class MatMul(Rule):
    """(..., M, K) @ (..., K, N); an element that is a constant zero takes no part."""

    def __init__(self, value: Value, analysis: Analysis) -> None:
        super().__init__(value, analysis)
        self._cuts: dict[tuple[int, ...], View] = {}

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
        out, summand = builder.out(self.value, box), self.summand
        region = builder.region(box)
        inner = (AffineOffset(0), a.shape[-1], 1)
        batch = region[:-2]
        plain = all(self.value.kwargs.get(name, 1) == 1 for name in ("alpha", "beta"))
        if constant_operand(b) and not batch and plain:
            left = builder.read(a, [region[-2], inner])
            if summand is None or (constant_operand(summand) and summand.shape[:-1] in ((), (1,))):
                bias = None if summand is None else self._cut(summand, len(summand.shape) - 1, box)
                added = None if bias is None else replace(bias, sizes=bias.sizes[-1:], strides=bias.strides[-1:])
                builder.product(out, left, self._cut(b, 1, box), added)
                return
        first = builder.read(a, [*batch[len(batch) - len(a.shape) + 2 :], region[-2], inner])
        second = builder.read(b, [*batch[len(batch) - len(b.shape) + 2 :], inner, region[-1]])
        if plain and self._is_plain(first, second):
            added = None if summand is None else self._summand(builder, region, box)
            builder.product(out, first, second, added)
            return
        found: Any = builder.make(torch.matmul, first, second)
        if summand is not None:
            alpha, beta = (self.value.kwargs.get(name, 1) for name in ("alpha", "beta"))
            scaled: Any = self._summand(builder, region, box)
            if beta != 1:
                scaled = builder.make(torch.mul, scaled, beta)
            found = builder.make(torch.add, scaled, found, alpha=alpha)
        builder.fill(out, found)

    def _is_plain(self, *factors: View) -> bool:
        """Whether all has one type, which sums are not rounded to on the way."""
        dtype = self.value.data.dtype
        return dtype in (torch.float32, torch.float64) and all(one.memory.dtype == dtype for one in factors)

    def _summand(self, builder: Builder, region: Sequence[Any], box: Box) -> View:
        assert self.summand is not None
        aligned = region[len(region) - len(self.summand.shape) :]
        cut = [one if size > 1 else ONE for one, size in zip(aligned, self.summand.shape, strict=True)]
        return builder.read(self.summand, cut).expand(box.sizes)

    def _cut(self, operand: Operand, dim: int, box: Box) -> View:
        """The columns of a constant that a box needs."""
        start, size, step = box.start[-1], box.sizes[-1], box.steps[-1]
        key = (id(operand), dim, start, size, step)
        if key not in self._cuts:
            data = self.analysis.data(operand)
            if data.shape[dim] > 1:
                data = data.narrow(dim, start, (size - 1) * step + 1)
                data = data[(slice(None),) * dim + (slice(None, None, step),)]
            self._cuts[key] = constant(data)
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
