"""Takes a value, its times and who reads it; gives its `Layout` in memory: places outermost, features innermost, zeros
around them where a reader looks beyond the value."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fastgen.sampling.trace.element_times import compact, kinds_of
from fastgen.sampling.trace.graph import Map, Value

FEATURE_KINDS = 4  # along features (of colours, say) times show so many patterns at most, along places more


@dataclass(frozen=True)
class Box:
    """Elements start, start + step, ... of a value along each dimension."""

    start: tuple[int, ...]
    sizes: tuple[int, ...]
    steps: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(
            slice(first, first + (size - 1) * step + 1, step)
            for first, size, step in zip(self.start, self.sizes, self.steps, strict=True)
        )

    def moved(self, by: Sequence[int]) -> "Box":
        return Box(tuple(a + b for a, b in zip(self.start, by, strict=True)), self.sizes, self.steps)


@dataclass(frozen=True)
class Layout:
    """Order of the dimensions from the outermost to the innermost, and the zeros before and after along each."""

    shape: tuple[int, ...]
    order: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]

    @cached_property
    def room(self) -> tuple[int, ...]:
        return tuple(b + size + a for b, size, a in zip(self.before, self.shape, self.after, strict=True))

    @cached_property
    def strides(self) -> tuple[int, ...]:
        """Of the dimensions in the value's own order; the last of `order` has stride 1."""
        found, stride = [0] * len(self.shape), 1
        for d in reversed(self.order):
            found[d] = stride
            stride *= self.room[d]
        return tuple(found)

    @property
    def numel(self) -> int:
        return torch.Size(self.room).numel()

    @cached_property
    def origin(self) -> int:
        return sum(b * s for b, s in zip(self.before, self.strides, strict=True))

    def inner(self, memory: Tensor) -> Tensor:
        """The value (n, *shape) in memory (n, numel)."""
        return memory.as_strided(
            (memory.shape[0], *self.shape),
            (memory.stride(0), *self.strides),
            memory.storage_offset() + self.origin,
        )


def dimension_order(times: Tensor, channels: int | None) -> tuple[int, ...]:
    """Places outermost, features innermost, otherwise as they are; `channels`: the dimension to have last of all."""
    places, core = [], compact(times)
    for d in range(times.dim()):
        kinds = kinds_of(core.movedim(d, 0))[0] if core.shape[d] > 1 else 1
        places.append(kinds > FEATURE_KINDS or (kinds > 1 and kinds == times.shape[d]))
    order = [d for d in range(times.dim()) if places[d]] + [d for d in range(times.dim()) if not places[d]]
    if channels is not None and not places[channels]:
        order.remove(channels)
        order.append(channels)
    return tuple(order)


def layout(value: Value, order: tuple[int, ...], maps: Iterable[Map]) -> Layout:
    """Room for all that the maps read of the value, whose dimensions lie in this order."""
    before, after = [0] * len(value.shape), [0] * len(value.shape)
    for one in maps:
        for k, (low, high) in enumerate(one.bounds):
            before[k] = max(before[k], -low)
            after[k] = max(after[k], high - value.shape[k] + 1)
    return Layout(value.shape, order, tuple(before), tuple(after))
