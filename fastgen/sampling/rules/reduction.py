"""Softmax, normalization, sums and other reductions, look-ups, and operations without a rule."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastgen.sampling.machine.language import AffineOffset, View, constant
from fastgen.sampling.plan.builder import Builder
from fastgen.sampling.plan.layout import Box
from fastgen.sampling.rules.base import (
    NEXT_TO_NOTHING,
    SOFTMAX_ZERO,
    Analysis,
    Rule,
    argument,
    batched_arguments,
    constant_operand,
    cut,
    reduced,
    result_of,
)
from fastgen.sampling.rules.choices import falling, first_of_greatest, put_place
from fastgen.sampling.rules.slicewise import Slicewise
from fastgen.sampling.trace.element_times import compact, shrunk
from fastgen.sampling.trace.graph import CONSTANT, NEVER, Operand, Unsupported, Value


def whole(shape: Sequence[int]) -> list[tuple[AffineOffset, int, int]]:
    return [(AffineOffset(0), size, 1) for size in shape]


def _beside_others(low: Tensor, dims: Sequence[int]) -> Tensor | None:
    """Elements that are low in rows along these dimensions that hold others, too; None where there are none."""
    if not low.any():
        return None
    all_low = compact(low)
    for d in dims:
        all_low = all_low.all(d, keepdim=True)
    found = compact(low) & ~all_low
    return found if found.any() else None


class Softmax(Rule):
    """Elements that are low, beside others in their row that are not, are constant zeros of a softmax."""

    sees_zeros = False

    def __init__(self, value: Value, analysis: Analysis) -> None:
        super().__init__(value, analysis)
        self.dim = value.args[1] % max(len(value.shape), 1)
        self._is_log = "log" in value.op_name
        unseen = _beside_others(analysis.softmax_zero(value.args[0]), [self.dim])
        if unseen is not None:
            unseen = shrunk(unseen & (value.data <= SOFTMAX_ZERO if self._is_log else value.data == 0))
        if analysis.certain and not self._is_log:
            unseen = shrunk(value.data <= NEXT_TO_NOTHING)
        self._hidden = compact(unseen) if unseen is not None and unseen.any() else None

    def ready(self) -> tuple[Tensor, Tensor | None]:
        times = self.analysis.ready(self.value.args[0])
        if self._hidden is None:
            return reduced(times, [self.dim], torch.amax).expand(self.value.shape), None
        row = torch.where(self._hidden, CONSTANT, compact(times)).amax(self.dim, keepdim=True)
        if self._is_log:
            return row.expand(self.value.shape), self._hidden
        return torch.where(self._hidden, CONSTANT, row).expand(self.value.shape), None

    def needs(self, times: Tensor) -> Iterator[tuple[Operand, Tensor]]:
        wanted = reduced(times, [self.dim], torch.amin)
        wanted = wanted if self._hidden is None else torch.where(self._hidden, NEVER, compact(wanted))
        yield self.value.args[0], wanted.expand(times.shape)

    def fixed(self, boxes: Any) -> Sequence[Any]:
        return (boxes.start[self.dim],)

    def emit(self, builder: Builder, box: Box) -> None:
        dim, out = self.dim, builder.out(self.value, box)
        region = builder.region(box)
        region[dim] = (AffineOffset(0), self.value.shape[dim], 1)
        last = [*(d for d in range(len(region)) if d != dim), dim]
        x = self.seen(builder, self.value.args[0], region, self._hidden).order(last)
        whole_row = box.sizes[dim] == self.value.shape[dim]
        found = out.order(last) if whole_row else builder.scratch(x.sizes, self.value.data.dtype)
        builder.rowwise("log_softmax" if self._is_log else "softmax", found, x)
        if not whole_row:
            found = found.narrow(len(last) - 1, box.start[dim], box.sizes[dim], box.steps[dim])
            builder.pointwise("copy", out.order(last), found)


GREATEST = {"amax", "max", "logsumexp"}


class Reduction(Slicewise):
    """Sums, means, norms, the greatest: one result, or, of a normalization, as many as there were.

    What is low beside others that are not takes no part in a maximum, as in a softmax that is written out.
    """

    sees_zeros = False

    def __init__(self, value: Value, analysis: Analysis) -> None:
        super().__init__(value, analysis)
        greatest = value.op_name in GREATEST and self.dims
        self._hidden = _beside_others(analysis.softmax_zero(value.args[0]), self.dims) if greatest else None
        if greatest and analysis.certain and value.data.is_floating_point():
            data = analysis.data(value.args[0])
            self._hidden = compact(shrunk(data <= data.amax(self.dims, keepdim=True) + SOFTMAX_ZERO))

    @property
    def _op(self) -> str | None:
        """That of the step language, or "argmax", whatever the operator calls it; None where there is none."""
        name = self.value.op_name
        if self.value.data.dtype != self.value.args[0].dtype:
            return "argmax" if name in ("argmax", "argmin", "max", "min") and len(self.dims) == 1 else None
        return name if name in ("sum", "mean") else "amax" if name in ("amax", "max", "amin", "min") else None

    def _reduce(self, builder: Builder, op: str, out: View, seen: View) -> None:
        least = self.value.op_name in ("min", "amin", "argmin")
        if least:
            negative = builder.scratch(seen.sizes, seen.memory.dtype)
            builder.pointwise("neg", negative, seen)
            seen = negative
        for d in self.dims:  # one after the other
            sizes = [size if k != d else 1 for k, size in enumerate(seen.sizes)]
            last = [*(k for k in range(len(sizes)) if k != d), d]
            is_result = d == self.dims[-1] and op != "argmax"
            part = out if is_result else builder.scratch(sizes, seen.memory.dtype)
            builder.rowwise("amax" if op == "argmax" else op, part.order(last), seen.order(last))
            if op == "argmax":
                row = seen.order(last)
                first = first_of_greatest(builder, row, part.order(last), falling(self, builder, row))
                put_place(builder, out.order(last), first, row)
            seen = part
        if least and op != "argmax":
            builder.pointwise("neg", out, out)

    def _is_plain(self, seen: View) -> bool:
        """Whether result and operand are real numbers of one type."""
        return self.value.data.dtype.is_floating_point and seen.memory.dtype == self.value.data.dtype

    def _seen(self, operand: Operand, times: Tensor, instead: int) -> Tensor:
        if self._hidden is None or operand is not self.value.args[0]:
            return times
        return torch.where(self._hidden, instead, compact(times)).expand(times.shape)

    def emit(self, builder: Builder, box: Box) -> None:
        out, x = builder.out(self.value, box), self.value.args[0]
        name = self.value.op_name
        same = self.value.shape == x.shape  # layer normalization gives all that it has averaged over
        region = self.region_of(x, builder.region(box))
        seen = self.seen(builder, x, region, self._hidden)
        if name == "native_layer_norm":
            normalized, weight, bias, eps = self.value.args[1:]
            weight, bias = (None if one is None else self.analysis.data(one) for one in (weight, bias))
            if same and len(self.dims) == 1 and self._is_plain(seen) and box.sizes[-1] == x.shape[-1]:
                self._normalize(builder, seen, out, eps)
                return
            found = builder.make(torch.layer_norm, seen, normalized, weight, bias, eps)
            if same:
                for d in self.dims:
                    found = builder.make(cut, found, d, box.start[d], box.sizes[d], box.steps[d])
        elif (op := self._op) is not None and self.dims and seen.memory.dtype.is_floating_point:
            for d in () if self.mixed else self.dims:
                out = out.unsqueeze(d)
            self._reduce(builder, op, out, seen)
            return
        else:
            found = builder.make(self.run, seen)
        builder.fill(out, found)

    @cached_property
    def run(self) -> Callable[[Tensor], Tensor]:
        """The operator on a batch of images."""
        op, kwargs = result_of(self.value.op, self.value.output), self.value.kwargs
        args: Sequence[Any] = self.value.args
        each_alone = argument(self.value, "dim") in (None, [])
        if not each_alone:
            args, kwargs = batched_arguments(self.value, self.dims)

        def run(x: Tensor) -> Tensor:
            return op(x, *args[1:], **kwargs)

        run.__qualname__ = self.value.op_name  # by which it is told that the machines do not know it
        return torch.vmap(run) if each_alone else run

    def _normalize(self, builder: Builder, seen: View, out: View, eps: float) -> None:
        """Layer normalization over the last dimension alone."""
        steps = [(op, one) for op, one in zip(("mul", "add"), self.value.args[2:4], strict=True) if one is not None]
        half = out.memory.dtype in (torch.bfloat16, torch.float16) and steps  # rounded to at the end alone
        found = builder.scratch(out.sizes, torch.float32) if half else out
        builder.rowwise("normalized", found, seen, eps)
        for k, (op, operand) in enumerate(steps):
            every = builder.read(operand, whole(operand.shape)).expand(out.sizes)
            builder.pointwise(op, out if k == len(steps) - 1 else found, found, every)


class Cumulative(Slicewise):
    """Running sums, products, maxima: each result depends on what comes before it along one dimension.

    What comes after it is read all the same, and changes nothing.
    """

    sees_zeros = False

    def ready(self) -> tuple[Tensor, Tensor | None]:
        (dim,) = self.dims
        return compact(self.analysis.ready(self.value.args[0])).cummax(dim).values.expand(self.value.shape), None

    def needs(self, times: Tensor) -> Iterator[tuple[Operand, Tensor]]:
        (dim,) = self.dims
        yield self.value.args[0], compact(times).flip(dim).cummin(dim).values.flip(dim).expand(times.shape)

    def emit(self, builder: Builder, box: Box) -> None:
        """A single one of running sums as the sum of what comes before it."""
        (dim,), x = self.dims, self.value.args[0]
        real = self.value.data.dtype.is_floating_point and x.dtype == self.value.data.dtype
        if self.value.op_name != "cumsum" or box.sizes[dim] > 1 or not real:
            super().emit(builder, box)
            return
        region = builder.region(box)
        region[dim] = (AffineOffset(0), box.start[dim] + 1, 1)
        last = [*(d for d in range(len(region)) if d != dim), dim]
        builder.rowwise("sum", builder.out(self.value, box).order(last), builder.read(x, region).order(last))


class Lookup(Rule):
    """Rows of a constant table by computed indices: embedding(table, indices), table[indices]."""

    sees_zeros = False

    def __init__(self, value: Value, analysis: Analysis) -> None:
        super().__init__(value, analysis)
        self._tables: dict[str, View] = {}

    @property
    def indices(self) -> Operand:
        found = self.value.args[1]
        return found[0] if isinstance(found, (list, tuple)) else found

    def ready(self) -> tuple[Tensor, Tensor | None]:
        times = self.analysis.ready(self.indices)
        return times[(..., *[None] * (len(self.value.shape) - times.dim()))].expand(self.value.shape), None

    def needs(self, times: Tensor) -> Iterator[tuple[Operand, Tensor]]:
        rank = len(self.indices.shape)
        reduced_to_rows = reduced(times, range(rank, times.dim()), torch.amin)
        yield self.indices, reduced_to_rows[(slice(None),) * rank + (0,) * (times.dim() - rank)]

    def fixed(self, boxes: Any) -> Sequence[Any]:
        return boxes.start[len(self.indices.shape) :]

    def emit(self, builder: Builder, box: Box) -> None:
        rank = len(self.indices.shape)
        out = builder.out(self.value, box)
        kept = tuple(
            slice(start, start + (size - 1) * step + 1, step)
            for start, size, step in zip(box.start[rank:], box.sizes[rank:], box.steps[rank:], strict=True)
        )
        if str(kept) not in self._tables:
            self._tables[str(kept)] = constant(self.analysis.data(self.value.args[0])[(slice(None), *kept)])
        seen = builder.read(self.indices, builder.region(box)[:rank])
        table = self._tables[str(kept)]
        if len(table.sizes) == 1:
            table, out = table.unsqueeze(1), out.unsqueeze(len(out.sizes))
        builder.lookup(out, table, seen)


class Opaque(Rule):
    """An operation that is not known: all of its result depends on all of its operands."""

    def ready(self) -> tuple[Tensor, Tensor | None]:
        read = [self.analysis.ready(one) for one in self.value.operands if 0 not in one.shape]
        latest = max((int(compact(times).max()) for times in read), default=CONSTANT)
        return torch.full((), latest, dtype=torch.int32).expand(self.value.shape), None

    def needs(self, times: Tensor) -> Iterator[tuple[Operand, Tensor]]:
        for one in self.value.operands:
            if not constant_operand(one):
                yield one, compact(times).amin().expand(one.shape)

    def emit(self, builder: Builder, box: Box) -> None:
        value = self.value
        if box.sizes != value.shape:
            raise Unsupported(f"{value.name} has no rule")
        out = builder.out(value, box)
        seen = [builder.read(one, whole(one.shape)) for one in value.operands]
        builder.fill(out, builder.make(torch.vmap(value.compute), *seen))
