"""Softmax, normalization, sums and other reductions, look-ups, concatenation, and operations without a rule."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastgen.sampling.plan.builder import Builder
from fastgen.sampling.plan.layout import Box
from fastgen.sampling.plan.program import Linear
from fastgen.sampling.rules.base import (
    NEXT_TO_NOTHING,
    SOFTMAX_ZERO,
    Analysis,
    Rule,
    argument,
    batched_arguments,
    constant_operand,
    reduced,
    result_of,
)
from fastgen.sampling.trace.element_times import compact, shrunk
from fastgen.sampling.trace.graph import CONSTANT, NEVER, Operand, Unsupported, Value

LOWEST = -float("inf")


def whole(shape: Sequence[int]) -> list[tuple[Linear, int, int]]:
    return [(Linear(0), size, 1) for size in shape]


def cut(found: Tensor, dim: int, start: int, size: int, step: int) -> Tensor:
    """Part of a result (n, ...) along one dimension of the images."""
    return found[(slice(None),) * (dim + 1) + (slice(start, start + (size - 1) * step + 1, step),)]


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

    def __init__(self, value: Value, analysis: Analysis) -> None:
        super().__init__(value, analysis)
        self.dim = value.args[1] % max(len(value.shape), 1)
        self._is_log = "log" in value.op._schema.name
        unseen = _beside_others(analysis.softmax_zero(value.args[0]), [self.dim])
        if unseen is not None:
            unseen = shrunk(unseen & (value.data <= SOFTMAX_ZERO if self._is_log else value.data == 0))
        if analysis.certain and not self._is_log:
            unseen = shrunk(value.data <= NEXT_TO_NOTHING)
        self._hidden = compact(unseen) if unseen is not None and unseen.any() else None

    @cached_property
    def unseen(self) -> Operand | None:
        return None if self._hidden is None else self.analysis.constant(self._hidden.expand(self.value.shape))

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

    def fixed(self, box: Box) -> tuple[int, ...]:
        return (box.start[self.dim],)

    def emit(self, builder: Builder, box: Box) -> None:
        dim, out = self.dim, builder.out(self.value, box)
        region = builder.region(box)
        region[dim] = (Linear(0), self.value.shape[dim], 1)
        x: Any = builder.read(self.value.args[0], region)
        if self.unseen is not None:  # what lies there may not have been computed
            x = builder.make(torch.masked_fill, x, builder.read(self.unseen, region), LOWEST)
        found = builder.make(torch.log_softmax if self._is_log else torch.softmax, x, dim + 1)
        if box.sizes[dim] != self.value.shape[dim]:
            found = builder.make(cut, found, dim, box.start[dim], box.sizes[dim], box.steps[dim])
        builder.emit(Tensor.copy_, out, found)


GREATEST = {"amax", "max", "logsumexp"}


class Reduction(Rule):
    """Each result depends on all that is reduced into it; further dimensions stay.

    What is low beside others that are not takes no part in a maximum, as in a softmax that is written out.
    """

    def __init__(self, value: Value, analysis: Analysis) -> None:
        super().__init__(value, analysis)
        greatest = value.op._schema.name.split("::")[1] in GREATEST and self.dims
        self._hidden = _beside_others(analysis.softmax_zero(value.args[0]), self.dims) if greatest else None

    @cached_property
    def unseen(self) -> Operand | None:
        shape = self.value.args[0].shape
        return None if self._hidden is None else self.analysis.constant(self._hidden.expand(shape))

    @property
    def dims(self) -> list[int]:
        rank = len(self.value.args[0].shape)
        if self.value.op._schema.name.endswith("native_layer_norm"):
            return list(range(rank - len(self.value.args[1]), rank))
        found = argument(self.value, "dim")
        found = argument(self.value, "dims") if found is None else found
        if found is None or found == []:
            return list(range(rank))
        return [d % max(rank, 1) for d in (found if isinstance(found, (list, tuple)) else [found])]

    @property
    def keeps(self) -> bool:
        return len(self.value.shape) == len(self.value.args[0].shape)

    def ready(self) -> tuple[Tensor, Tensor | None]:
        x = self.analysis.ready(self.value.args[0])
        x = x if self._hidden is None else torch.where(self._hidden, CONSTANT, compact(x)).expand(x.shape)
        return self._dropped(reduced(x, self.dims, torch.amax)).expand(self.value.shape), None

    def _dropped(self, times: Tensor) -> Tensor:
        """Without the dimensions that are reduced, where the result has none."""
        if self.keeps:
            return times
        return times[tuple(0 if d in self.dims else slice(None) for d in range(times.dim()))]

    def needs(self, times: Tensor) -> Iterator[tuple[Operand, Tensor]]:
        x = self.value.args[0]
        if self.value.shape == x.shape:
            times = reduced(times, self.dims, torch.amin)
        elif not self.keeps:
            for d in sorted(self.dims):
                times = times.unsqueeze(d)
        wanted = times.expand(x.shape)
        if self._hidden is not None:
            wanted = torch.where(self._hidden, NEVER, compact(wanted)).expand(x.shape)
        yield x, wanted
        for one in self.value.operands[1:]:
            if not constant_operand(one):
                yield one, compact(times).amin().expand(one.shape)

    def emit(self, builder: Builder, box: Box) -> None:
        out, x = builder.out(self.value, box), self.value.args[0]
        kept = [d for d in range(len(x.shape)) if d not in self.dims]
        name = self.value.op._schema.name.split("::")[1]
        same = self.value.shape == x.shape  # layer normalization gives all that it has averaged over
        region = whole(x.shape)
        for k, d in enumerate(range(len(x.shape)) if self.keeps else kept):
            if d in kept:
                region[d] = builder.region(box)[k]
        seen: Any = builder.read(x, region)
        if self.unseen is not None:  # what lies there may not have been computed
            seen = builder.make(torch.masked_fill, seen, builder.read(self.unseen, region), LOWEST)
        if name == "native_layer_norm":
            normalized, weight, bias, eps = self.value.args[1:]
            weight, bias = (None if one is None else self.analysis.data(one) for one in (weight, bias))
            found = builder.make(torch.layer_norm, seen, normalized, weight, bias, eps)
            if same:
                for d in self.dims:
                    found = builder.make(cut, found, d, box.start[d], box.sizes[d], box.steps[d])
        else:
            found = builder.make(self.run, seen)
        builder.emit(Tensor.copy_, out, found)

    @cached_property
    def run(self) -> Callable[[Tensor], Tensor]:
        """The operator on a batch of images."""
        op = result_of(self.value.op, self.value.output)
        if argument(self.value, "dim") in (None, []):
            args, kwargs = self.value.args[1:], self.value.kwargs
            return torch.vmap(lambda x: op(x, *args, **kwargs))
        (_, *given), options = batched_arguments(self.value, self.dims)
        return lambda x: op(x, *given, **options)

    def fixed(self, box: Box) -> tuple[int, ...]:
        return box.start if self.value.op._schema.name.endswith("native_layer_norm") else ()


class Cumulative(Rule):
    """Running sums, products, maxima: each result depends on what comes before it along one dimension."""

    @property
    def dim(self) -> int:
        return self.value.args[1] % max(len(self.value.shape), 1)

    def ready(self) -> tuple[Tensor, Tensor | None]:
        return compact(self.analysis.ready(self.value.args[0])).cummax(self.dim).values.expand(self.value.shape), None

    def needs(self, times: Tensor) -> Iterator[tuple[Operand, Tensor]]:
        yield (
            self.value.args[0],
            compact(times).flip(self.dim).cummin(self.dim).values.flip(self.dim).expand(times.shape),
        )

    def fixed(self, box: Box) -> tuple[int, ...]:
        return (box.start[self.dim],)

    def emit(self, builder: Builder, box: Box) -> None:
        dim, out = self.dim, builder.out(self.value, box)
        region = builder.region(box)
        region[dim] = (Linear(0), box.start[dim] + (box.sizes[dim] - 1) * box.steps[dim] + 1, 1)
        (_, *args), kwargs = batched_arguments(self.value, [dim])
        run = result_of(self.value.op, self.value.output)
        found = builder.make(run, builder.read(self.value.args[0], region), *args, **kwargs)
        found = builder.make(cut, found, dim, box.start[dim], box.sizes[dim], box.steps[dim])
        builder.emit(Tensor.copy_, out, found)


class Lookup(Rule):
    """Rows of a constant table by computed indices: embedding(table, indices), table[indices]."""

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

    def fixed(self, box: Box) -> tuple[int, ...]:
        return box.start[len(self.indices.shape) :]

    def emit(self, builder: Builder, box: Box) -> None:
        rank = len(self.indices.shape)
        table = self.analysis.data(self.value.args[0])
        out = builder.out(self.value, box)
        for d in range(rank, len(box.sizes)):
            table = table.narrow(1 + d - rank, box.start[d], (box.sizes[d] - 1) * box.steps[d] + 1)
            table = table[(slice(None),) * (1 + d - rank) + (slice(None, None, box.steps[d]),)]
        seen = builder.read(self.indices, builder.region(box)[:rank])
        builder.emit(Tensor.copy_, out, builder.make(_rows, table, seen))


def _rows(table: Tensor, indices: Tensor) -> Tensor:
    return table[indices]


class Concatenation(Rule):
    @property
    def dim(self) -> int:
        dim = self.value.args[1] if len(self.value.args) > 1 else self.value.kwargs.get("dim", 0)
        return dim % len(self.value.shape)

    @property
    def stacks(self) -> bool:
        return self.value.op._schema.name == "aten::stack"

    @property
    def pieces(self) -> list[tuple[int, int, Operand]]:
        """Where each operand begins and ends along the dimension."""
        found, first = [], 0
        for one in self.value.args[0]:
            if not self.stacks and one.shape == (0,):
                continue
            last = first + (1 if self.stacks else one.shape[self.dim])
            found.append((first, last, one))
            first = last
        return found

    def ready(self) -> tuple[Tensor, Tensor | None]:
        ready = self._joined([self.analysis.ready(one) for _, _, one in self.pieces])
        softmax_zero = [self.analysis.softmax_zero(one) for _, _, one in self.pieces]
        return ready, self._joined(softmax_zero) if any(one.any() for one in softmax_zero) else None

    def _joined(self, parts: list[Tensor]) -> Tensor:
        parts = [one.unsqueeze(self.dim) for one in parts] if self.stacks else parts
        small = [compact(one) for one in parts]
        if small[0].shape[self.dim] == 1 and all(torch.equal(small[0], one) for one in small[1:]):
            return small[0].expand(self.value.shape)
        sizes = [max(one.shape[d] for one in small) for d in range(len(self.value.shape))]
        full = [
            one.expand([part.shape[d] if d == self.dim else size for d, size in enumerate(sizes)])
            for one, part in zip(small, parts, strict=True)
        ]
        return torch.cat(full, self.dim).expand(self.value.shape)

    def needs(self, times: Tensor) -> Iterator[tuple[Operand, Tensor]]:
        for first, last, one in self.pieces:
            part = times.narrow(self.dim, first, last - first)
            yield one, part.squeeze(self.dim) if self.stacks else part

    def fixed(self, box: Box) -> tuple[int, ...]:
        return (box.start[self.dim],)

    def emit(self, builder: Builder, box: Box) -> None:
        dim, out = self.dim, builder.out(self.value, box)
        start, size, step = box.start[dim], box.sizes[dim], box.steps[dim]
        for first, last, one in self.pieces:
            inside = [k for k in range(size) if first <= start + k * step < last]
            if not inside:
                continue
            region = builder.region(box)
            if self.stacks:
                del region[dim]
                part = builder.read(one, region).unsqueeze(dim)
            else:
                region[dim] = (Linear(start + inside[0] * step - first), len(inside), step)
                part = builder.read(one, region)
            builder.emit(Tensor.copy_, out.narrow(dim, inside[0], len(inside)), part)


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
        builder.emit(Tensor.copy_, out, builder.make(torch.vmap(value.compute), *seen))
