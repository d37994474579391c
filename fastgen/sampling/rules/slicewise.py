"""Operations along some dimensions (the channels, say) that do the same at every index of the others."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgen.sampling.machine.language import AffineOffset, View
from fastgen.sampling.plan.builder import Builder
from fastgen.sampling.plan.indexed import Region
from fastgen.sampling.plan.layout import Box
from fastgen.sampling.rules.base import (
    Analysis,
    Rule,
    argument,
    batched_arguments,
    constant_operand,
    cut,
    never,
    reduced,
    result_of,
)
from fastgen.sampling.rules.choices import strongest
from fastgen.sampling.trace.element_times import compact
from fastgen.sampling.trace.graph import CONSTANT, NEVER, Operand, Value, map_arguments

# Along the dimension `dim` of their schema, or several.
ALONG = {
    "sort", "topk", "gather", "scatter", "scatter_add", "scatter_reduce", "index_add", "median", "nanmedian", "mode",
    "kthvalue", "linalg_cross", "_fft_r2c", "_fft_c2r", "_fft_c2c",
}  # fmt: skip


class Slicewise(Rule):
    """Each result depends on all of the operands' elements at its own index of the dimensions that stay apart."""

    def __init__(self, value: Value, analysis: Analysis) -> None:
        super().__init__(value, analysis)
        rank = len(value.operands[0].shape)
        self.dims = along(value)
        apart = [d for d in range(rank) if d not in self.dims]
        dropped = len(value.shape) < rank
        self.place = {d: k if dropped else d for k, d in enumerate(apart)}  # dimension of an operand -> of the value
        self.mixed = [d for d in range(len(value.shape)) if d not in self.place.values()]
        self.aligned = [one for one in value.operands if len(one.shape) == rank]

    @staticmethod
    def takes(value: Value) -> bool:
        name = value.op_name
        if name != "view_as_real_copy" and (name not in ALONG or argument(value, "dim") is None):
            return False  # a median of everything, for example
        rank = len(value.operands[0].shape)
        if rank == 0:
            return False
        apart = [d for d in range(rank) if d not in along(value)]
        sizes = [value.shape[k if len(value.shape) < rank else d] for k, d in enumerate(apart)]
        return all(
            all(one.shape[d] >= size for d, size in zip(apart, sizes, strict=True))
            if len(one.shape) == rank
            else constant_operand(one)
            for one in value.operands
        )

    def ready(self) -> tuple[Tensor, Tensor | None]:
        found = torch.full((), CONSTANT, dtype=torch.int32)
        for one in self.aligned:
            times = self._seen(one, self.analysis.ready(one), CONSTANT)
            times = reduced(times[self._used()], self.dims, torch.amax)
            times = times[tuple(0 if d in self.dims else slice(None) for d in range(times.dim()))]
            for d in self.mixed:
                times = times.unsqueeze(d)
            found = torch.maximum(found, compact(times.expand(self.value.shape)))
        return found.expand(self.value.shape), None

    def needs(self, times: Tensor) -> Iterator[tuple[Operand, Tensor]]:
        times = reduced(times, self.mixed, torch.amin)
        times = times[tuple(0 if d in self.mixed else slice(None) for d in range(times.dim()))]
        for d in self.dims:
            times = times.unsqueeze(d)
        for one in (one for one in self.value.operands if not constant_operand(one)):
            if one not in self.aligned:
                yield one, compact(times).amin().expand(one.shape)
                continue
            wanted = times
            if any(one.shape[d] > times.shape[d] for d in self.place):
                wanted = never(one.shape).contiguous()
                wanted[self._used()] = times
            yield one, self._seen(one, wanted.expand(one.shape), NEVER)

    def _seen(self, operand: Operand, times: Tensor, instead: int) -> Tensor:
        """Times of an operand's elements, something else for those that take no part."""
        return times

    def region_of(self, operand: Operand, region: Region) -> Region:
        """What is read of an operand for a region of the result."""
        return [
            region[self.place[d]] if d in self.place else (AffineOffset(0), size, 1)
            for d, size in enumerate(operand.shape)
        ]

    def _used(self) -> tuple[slice, ...]:
        """Of an operand, which may be larger than the result."""
        rank = len(self.place) + len(self.dims)
        return tuple(slice(self.value.shape[self.place[d]]) if d in self.place else slice(None) for d in range(rank))

    def fixed(self, boxes: Any) -> Sequence[Any]:
        return [boxes.start[d] for d in self.mixed]

    def emit(self, builder: Builder, box: Box) -> None:
        if self.value.op_name == "topk" and strongest(self, builder, box):
            return
        region = builder.region(box)

        def view(operand: Operand) -> View | Tensor:
            if not any(operand is one for one in self.aligned):
                return self.analysis.data(operand)
            return builder.read(operand, self.region_of(operand, region))

        args, kwargs = (map_arguments(one, view) for one in batched_arguments(self.value, self.dims))
        found: Any = builder.make(result_of(self.value.op, self.value.output), *args, **kwargs)
        for d in self.mixed:
            found = builder.make(cut, found, d, box.start[d], box.sizes[d], box.steps[d])
        builder.fill(builder.out(self.value, box), found)


def along(value: Value) -> list[int]:
    """The dimensions of its operands along which an operation works."""
    rank = len(value.operands[0].shape)
    if value.op_name == "view_as_real_copy":
        return []
    if value.op_name == "native_layer_norm":
        return list(range(rank - len(value.args[1]), rank))
    dims = argument(value, "dim")
    if dims is None or dims == []:
        return list(range(rank))
    return sorted(d % max(rank, 1) for d in (dims if isinstance(dims, (list, tuple)) else [dims]))
