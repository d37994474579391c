"""Convolutions of any number of dimensions, with stride, padding, dilation and groups.

A part of a convolution is a few products: the numbers that a run of taps sees lie side by side in memory, channels
innermost, so that they are a row times the weights of these taps. Example: of a 3x3 kernel with mask A over 8 channels,
the middle row of a pixel is one product with K = 8, and the row above it one with K = 24.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgen.sampling.machine.language import AffineOffset, View, constant, dense_strides
from fastgen.sampling.plan.builder import Builder
from fastgen.sampling.plan.layout import Box
from fastgen.sampling.rules.base import Analysis, Rule, constant_operand, groups_of, never, reduced
from fastgen.sampling.trace.element_times import compact
from fastgen.sampling.trace.graph import CONSTANT, NEVER, Operand, Unsupported, Value

WIDE = 32  # numbers in a row from which a product of its own costs less than a copy
FEW_RUNS = 4  # runs of taps up to which that holds at a single place
PRECISE = (torch.float32, torch.float64)  # in which sums may be rounded on the way


@dataclass(frozen=True)
class Part:
    """Some output channels' weights, cropped to the box of taps that holds all that are not zero.

    Attributes:
        taps: the first tap of the box and the one after the last, along each dimension of the kernel.
        channels: (first, count) of the input channels that it sees.
        weight: (taps * count, output channels), the channels of a tap side by side.
    """

    taps: list[tuple[int, int]]
    channels: tuple[int, int]
    weight: View


class Convolution(Rule):
    """A weight that is exactly zero takes no part: the live taps are those of the weights as they are.

    Args:
        rows: of the kernel, along its first dimension, that take part.
        onto: a map that their sums are added to, in place of the bias.
    """

    sees_zeros = False  # but those of its weights, which are no computed value

    def __init__(
        self, value: Value, analysis: Analysis, rows: slice | None = None, onto: Operand | None = None
    ) -> None:
        super().__init__(value, analysis)
        self.x, weight, self.bias, stride, padding, dilation, _, _, self.groups = value.args
        if weight.map is None or weight.map.value.kind != "constant":
            raise Unsupported(f"{value.name}: a convolution whose weights depend on the input")
        self.weight = analysis.data(weight)
        self.onto, self.bias = onto, self.bias if onto is None else None
        self.rank = len(self.x.shape) - 2
        self.stride, self.padding, self.dilation = (
            list(one) * (self.rank if len(one) == 1 else 1) for one in (stride, padding, dilation)
        )
        self.kernel = tuple(self.weight.shape[2:])
        self.taps: list[Sequence[int]] = list(product(*(range(size) for size in self.kernel)))
        zero = self._zero()
        live = ~compact(zero)
        if rows is not None:
            taking_part = torch.zeros(self.kernel[0], dtype=torch.bool)
            taking_part[rows] = True
            live = live & taking_part.view(-1, *[1] * (self.rank - 1))
        self.live = live.expand(zero.shape)
        self._constants: dict[Any, View] = {}
        self._parts: dict[Any, Part | None] = {}

    @property
    def multiply_adds(self) -> float:
        """With dense kernels, but for rows of the kernel that are zero throughout."""
        live = float(self.live_rows.float().mean())
        return self.value.shape[0] * self.weight.numel() * live * math.prod(self.places) / max(1, self.value.numel)

    @cached_property
    def live_taps(self) -> Tensor:
        """Which taps an output channel has on any input channel, (output channels, taps...)."""
        return any_along(self.live, 1)

    @cached_property
    def live_rows(self) -> Tensor:
        """Which rows of the kernel, along its first dimension, have weights that are not zero."""
        live = self.live_taps.any(0)
        return live.flatten(1).any(1) if self.rank > 1 else live

    def _zero(self) -> Tensor:
        """Which weights are zero, (output channels, input channels of a group, taps...)."""
        return self.analysis.zero(self.value.args[1])

    @property
    def places(self) -> tuple[int, ...]:
        """Sizes of the map, without channels, at whose places the kernel lies."""
        return self.value.shape[2:]

    def _blocks(self) -> Iterator[tuple[slice, slice]]:
        """Output and input channels of each group."""
        outs, ins = len(self.live) // self.groups, self.live.shape[1]
        for g in range(self.groups):
            yield slice(g * outs, (g + 1) * outs), slice(g * ins, (g + 1) * ins)

    def _window(self, tap: Sequence[int], padded: Tensor) -> Tensor:
        """What a tap meets of the padded other map, at each of the kernel's places."""
        for d, (k, dilation, stride, size) in enumerate(
            zip(tap, self.dilation, self.stride, self.places, strict=True), padded.dim() - self.rank
        ):
            span = stride * (size - 1) + 1
            padded = padded.narrow(d, k * dilation, span)[(slice(None),) * d + (slice(None, None, stride),)]
        return padded

    @cached_property
    def _kind(self) -> tuple[Any, ...]:
        """Equal for convolutions of which the same results read the same inputs."""
        live = compact(self.live)
        sizes = self.x.shape, self.value.shape, self.live.shape, live.shape, self.groups
        return type(self), *sizes, *map(tuple, (self.stride, self.padding, self.dilation)), live.numpy().tobytes()

    def ready(self) -> tuple[Tensor, Tensor | None]:
        out = self.analysis.once(("ready", self._kind), self.analysis.ready(self.x), self._latest_of)
        if self.bias is not None and not constant_operand(self.bias):
            out = torch.maximum(compact(out), compact(self.analysis.ready(self.bias)).view(1, -1, *[1] * self.rank))
        if self.onto is not None:
            out = torch.maximum(compact(out), compact(self.analysis.ready(self.onto)))
        return out.expand(self.value.shape), None

    def _latest_of(self, x: Tensor) -> Tensor:
        """When all that is read of the input is ready, from the ready times of the input."""
        live, blocks = self.live, list(self._blocks())
        if x.stride(1) == 0:  # the same for all channels: a channel of each kind of kernel will do
            x, live, blocks = x[:, :1], self.live_taps.unsqueeze(1), [(slice(0, len(live)), slice(0, 1))]
        found: list[tuple[Tensor, Tensor]] = []  # output channels, and their times without a dimension of channels
        for outs, ins in blocks:
            inputs = x[:, ins].transpose(0, 1)
            for numbers, kind in groups_of(live[outs]):
                found.append((outs.start + numbers, self._latest(inputs, kind.flatten(1))))
        return _of_channels(found, self.value.shape)

    def _latest(self, inputs: Tensor, live: Tensor) -> Tensor:
        """Of what some taps see of inputs (channels, images, ...): (images, ...). `live`: (channels, taps)."""
        return self._gathered(inputs, live, CONSTANT)

    def _first(self, results: Tensor, live: Tensor) -> Tensor:
        """When what the taps see is needed for results (channels, images, ...): (images, ...)."""
        return -self._scattered(-results, live, -NEVER, self.x.shape[2:])

    def _reached(self, times: Tensor, least: int) -> tuple[Tensor, tuple[slice, ...]]:
        """Times (..., the map that taps reach into) with `least` around them, as far as any tap reaches; where they lie
        in that."""
        sizes = times.shape[-self.rank :]
        pads: list[int] = []
        options = zip(sizes, self.places, self.stride, self.dilation, self.kernel, self.padding, strict=True)
        for size, places, stride, dilation, kernel, pad in options:
            reach = stride * (places - 1) + dilation * (kernel - 1) + 1
            pads = [pad, max(0, reach - size - pad), *pads]
        inner = tuple(slice(pad, pad + size) for pad, size in zip(self.padding, sizes, strict=True))
        return F.pad(times, pads, value=least), inner

    def _gathered(self, times: Tensor, live: Tensor, least: int) -> Tensor:
        """At each of the kernel's places the greatest of the times that live taps meet on the map they reach into."""
        around, _ = self._reached(times, least)
        best = torch.full((times.shape[1], *self.places), least, dtype=torch.int32)
        for number, tap in enumerate(self.taps):
            channels = torch.nonzero(live[:, number]).flatten()
            if len(channels):
                torch.maximum(best, self._window(tap, around)[channels].amax(0), out=best)
        return best

    def _scattered(self, times: Tensor, live: Tensor, least: int, sizes: Sequence[int]) -> Tensor:
        """On the map, of these sizes, that taps reach into, the greatest of the times at places whose live taps meet an
        element of it."""
        best, inner = self._reached(torch.full((times.shape[1], *sizes), least, dtype=torch.int32), least)
        for number, tap in enumerate(self.taps):
            channels = torch.nonzero(live[:, number]).flatten()
            if len(channels):
                window = self._window(tap, best)
                window.copy_(torch.maximum(window, times[channels].amax(0)))
        return best[(slice(None), *inner)]

    def needs(self, times: Tensor) -> Iterator[tuple[Operand, Tensor]]:
        if self.onto is not None:
            yield self.onto, times
        if self.bias is not None:
            yield self.bias, never(self.bias.shape)
        yield self.x, self.analysis.once(("needs", self._kind), times, self._first_of)

    def _first_of(self, times: Tensor) -> Tensor:
        """When the input is needed, from the times at which results are computed."""
        live, blocks = self.live, list(self._blocks())
        if times.stride(1) == 0:  # an input channel is needed as soon as any output of its group
            live = any_along(live.unflatten(0, (self.groups, -1)), 1).flatten(0, 1).unsqueeze(0)
            times, blocks = times[:, :1], [(slice(0, 1), slice(0, self.x.shape[1]))]
        found: list[tuple[Tensor, Tensor]] = []
        for outs, ins in blocks:
            results = times[:, outs].transpose(0, 1)
            for numbers, kind in groups_of(live[outs].transpose(0, 1)):
                found.append((ins.start + numbers, self._first(results, kind.flatten(1))))
        return _of_channels(found, self.x.shape)

    # --- computing a part

    def fixed(self, boxes: Any) -> Sequence[Any]:
        return (boxes.start[1],)

    def emit(self, builder: Builder, box: Box) -> None:
        out = builder.out(self.value, box)
        added = self._added(builder, box, out)
        for first, count, channels, group in self._channels(box):
            here = out.narrow(1, first, count)
            start = added if added is None else added.narrow(1, first, count)
            self._emit_products(builder, box, here, start, channels, group)

    def _channels(self, box: Box) -> Iterator[tuple[int, int, slice, int]]:
        """The box's output channels by groups: first and count in the box, which these are, number of the group."""
        size = len(self.live) // self.groups
        first, count, step = box.start[1], box.sizes[1], box.steps[1]
        for group in range(self.groups):
            begin, end = (min(max(0, -((first - edge * size) // step)), count) for edge in (group, group + 1))
            if begin < end:
                yield begin, end - begin, slice(first + begin * step, first + (end - 1) * step + 1, step), group

    def _added(self, builder: Builder, box: Box, out: View) -> View | None:
        """What the sums begin with, like the result."""
        if self.onto is not None:
            return builder.read(self.onto, builder.region(box))
        if self.bias is None:
            return None
        first, count, step = box.start[1], box.sizes[1], box.steps[1]
        kept = slice(first, first + (count - 1) * step + 1, step)
        bias = self._weights(("bias", first, count, step), self.analysis.data(self.bias)[kept])
        inner = [1] * self.rank
        return bias.as_strided((1, count, *inner), (0, 1, *(0 for _ in inner))).expand(out.sizes)

    def _padded(self) -> Operand:
        """The input with the zeros around it that the kernel reaches."""
        pads = self._room()
        padded = self.x.map.pad([0, 0, *pads], [0, 0, *pads])
        return Operand(self.analysis.graph, padded.shape, map=padded)

    def _room(self) -> list[int]:
        return self.padding

    def reads(self) -> list[Operand]:
        return [self._padded(), *([] if self.onto is None else [self.onto])]

    def _weights(self, key: Any, weights: Tensor, sizes: tuple[int, ...] | None = None) -> View:
        """A constant that is made once, of these sizes."""
        if key not in self._constants:
            self._constants[key] = constant(weights, sizes)
        return self._constants[key]

    def _part(self, channels: slice, group: int) -> Part | None:
        """The weights of some output channels; None where all are zero."""
        key = (channels.start, channels.stop, channels.step)
        if key not in self._parts:
            live = any_along(self.live[channels], 0)  # (input channels, taps...)
            found = None
            if live.any():
                inputs, *taps = (extent(live.movedim(d, 0).flatten(1).any(1)) for d in range(1 + self.rank))
                cut = tuple(slice(a, b) for a, b in (inputs, *taps))
                weight = self.weight[(channels, *cut)].permute(*range(2, 2 + self.rank), 1, 0)
                matrix = constant(weight, (weight[..., 0].numel(), weight.shape[-1]))
                seen = (group * len(live) + inputs[0], inputs[1] - inputs[0])
                found = Part(taps, seen, matrix)
            self._parts[key] = found
        return self._parts[key]

    def _window_at(
        self, builder: Builder, box: Box, channels: tuple[int, int], taps: Sequence[tuple[int, int]]
    ) -> tuple[View, tuple[int, ...], tuple[int, ...]]:
        """What these taps see of some input channels at the places of a box: all of it, strides along images and
        places, strides along taps.

        Args:
            channels: the first, and how many.
            taps: the first and the one after the last along each dimension of the kernel.
        """
        starts, steps = builder.starts(box), [s * step for s, step in zip(self.stride, box.steps[2:], strict=True)]
        region = [(starts[0], box.sizes[0], box.steps[0]), (AffineOffset(channels[0]), channels[1], 1)]
        for d, (first, last) in enumerate(taps):
            corner = starts[2 + d] * self.stride[d] + first * self.dilation[d]
            reach = (box.sizes[2 + d] - 1) * steps[d] + (last - 1 - first) * self.dilation[d] + 1
            region.append((corner, reach, 1))
        seen = builder.read(self._padded(), region)
        places, along = (
            tuple(s * step for s, step in zip(seen.strides[2:], by, strict=True)) for by in (steps, self.dilation)
        )
        return seen, (seen.strides[0], *places), along

    def _emit_products(
        self, builder: Builder, box: Box, out: View, added: View | None, channels: slice, group: int
    ) -> None:
        order = [0, *range(2, 2 + self.rank), 1]
        out, added = out.order(order), added if added is None else added.order(order)
        part = self._part(channels, group)
        if part is None:
            builder.pointwise("copy", out, 0.0 if added is None else added)
            return
        seen, strides, along = self._window_at(builder, box, part.channels, part.taps)
        places = seen.as_strided((box.sizes[0], *box.sizes[2:]), strides)
        taps = seen.as_strided(
            (*(last - first for first, last in part.taps), part.channels[1]), (*along, seen.strides[1])
        ).collapse()
        depth, dtype = part.weight.sizes[0], part.weight.memory.dtype
        run, stride = (taps.sizes[-1], taps.strides[-1]) if taps.sizes else (1, 1)
        runs = depth // run
        several = dtype in PRECISE and run >= WIDE and (runs <= FEW_RUNS or places.numel > 1)
        if stride == 1 and (runs == 1 or several):
            for k, index in enumerate(product(*(range(size) for size in taps.sizes[:-1]))):
                offset = places.offset + sum(i * s for i, s in zip(index, taps.strides, strict=False))
                rows = places.as_strided((*places.sizes, run), (*places.strides, 1), offset)
                builder.product(out, rows, part.weight.narrow(0, k * run, run), added if k == 0 else out)
            return
        rows = builder.scratch((*places.sizes, depth), dtype)
        inner = rows.as_strided((*places.sizes, *taps.sizes), (*rows.strides[:-1], *dense_strides(taps.sizes)))
        both = places.as_strided(inner.sizes, (*places.strides, *taps.strides))
        builder.pointwise("copy", inner, both)
        builder.product(out, rows, part.weight, added)


def any_along(mask: Tensor, dim: int) -> Tensor:
    """`mask.any(dim)`, for which torch takes several times as long."""
    return reduced(mask.view(torch.uint8), [dim], torch.amax).select(dim, 0).view(torch.bool)


def extent(live: Tensor) -> tuple[int, int]:
    """The first live place, and the one after the last."""
    places = torch.nonzero(live).flatten()
    return (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 1)


def _of_channels(found: list[tuple[Tensor, Tensor]], shape: tuple[int, ...]) -> Tensor:
    """Times (1, C, ...) from those (1, ...) of some channels each."""
    if len(found) == 1:
        return found[0][1].unsqueeze(1).expand(shape)
    out = torch.empty(shape, dtype=torch.int32)
    for numbers, times in found:
        out[:, numbers] = times.unsqueeze(1)
    return out
