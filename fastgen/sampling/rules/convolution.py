"""Convolutions of any number of dimensions, with stride, padding, dilation and groups, and their transposes."""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgen.sampling.plan.builder import Builder
from fastgen.sampling.plan.layout import Box, dense_strides
from fastgen.sampling.plan.program import Linear, View
from fastgen.sampling.rules.base import Analysis, Rule, groups_of
from fastgen.sampling.rules.kernels import Packed, Slab, convolve_transposed, extent, fill, project, select
from fastgen.sampling.rules.matmul import emit_linear
from fastgen.sampling.trace.graph import CONSTANT, NEVER, Operand, Unsupported, Value

WIDE = 32  # numbers in a row from which a product of its own costs less than a copy


class Convolution(Rule):
    """A weight that is exactly zero takes no part: the live taps are those of the weights as they are."""

    def __init__(self, value: Value, analysis: Analysis) -> None:
        super().__init__(value, analysis)
        self.x, weight, self.bias, stride, padding, dilation, self.transposed, _, self.groups = value.args
        if weight.map is None or weight.map.value.kind != "constant":
            raise Unsupported(f"{value.name}: a convolution whose weights depend on the input")
        self.weight = analysis.data(weight)
        self.onto: Operand | None = None  # a map that the convolution is added to, see `split_rows`
        if self.bias is not None and len(self.bias.shape) > 1:
            self.onto, self.bias = self.bias, None
        self.rank = len(self.x.shape) - 2
        self.stride, self.padding, self.dilation = (
            list(one) * (self.rank if len(one) == 1 else 1) for one in (stride, padding, dilation)
        )
        self.kernel = tuple(self.weight.shape[2:])
        self.taps: list[Sequence[int]] = list(product(*(range(size) for size in self.kernel)))
        live = self.weight != 0
        if self.transposed:  # (I, O / groups, ...) -> (O, I / groups, ...)
            live = live.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)
        self.live = live
        self._cache: dict[Any, Any] = {}

    @property
    def multiply_adds(self) -> float:
        """With dense kernels, but for rows of the kernel that are zero throughout."""
        places = self.x.shape[2:] if self.transposed else self.value.shape[2:]
        live = float(self.live.movedim(2, 0).flatten(1).any(1).float().mean())
        return self.value.shape[0] * self.weight.numel() * live * math.prod(places) / max(1, self.value.numel)

    def _blocks(self) -> Iterator[tuple[slice, slice]]:
        """Output and input channels of each group."""
        outs, ins = len(self.live) // self.groups, self.live.shape[1]
        for g in range(self.groups):
            yield slice(g * outs, (g + 1) * outs), slice(g * ins, (g + 1) * ins)

    def _window(self, tap: Sequence[int], padded: Tensor) -> Tensor:
        """What a tap sees of the padded input at every place of the output; for a transpose the other way round."""
        places = self.x.shape[2:] if self.transposed else self.value.shape[2:]
        for d, (k, dilation, stride, size) in enumerate(
            zip(tap, self.dilation, self.stride, places, strict=True), padded.dim() - self.rank
        ):
            span = stride * (size - 1) + 1
            padded = padded.narrow(d, k * dilation, span)[(slice(None),) * d + (slice(None, None, stride),)]
        return padded

    def _pads(self) -> list[int]:
        return [pad for one in reversed(self.padding) for pad in (one, one)]

    def _transposed_room(self) -> tuple[list[int], tuple[slice, ...]]:
        """Size of all that a transpose reaches, and where the output lies in it."""
        sizes = [
            max(stride * (size - 1) + dilation * (kernel - 1) + 1, pad + out)
            for stride, size, dilation, kernel, pad, out in zip(
                self.stride,
                self.x.shape[2:],
                self.dilation,
                self.kernel,
                self.padding,
                self.value.shape[2:],
                strict=True,
            )
        ]
        inner = tuple(slice(p, p + out) for p, out in zip(self.padding, self.value.shape[2:], strict=True))
        return sizes, inner

    def ready(self) -> tuple[Tensor, Tensor | None]:
        x = self.analysis.ready(self.x)
        out = torch.full(self.value.shape, CONSTANT, dtype=torch.int32)
        if not self.transposed:
            x = F.pad(x, self._pads(), value=CONSTANT)
        for outs, ins in self._blocks():
            inputs = x[:, ins].transpose(0, 1)
            for numbers, live in groups_of(self.live[outs]) or []:
                if self.transposed:
                    sizes, inner = self._transposed_room()
                    best = torch.full((x.shape[0], *sizes), CONSTANT, dtype=torch.int32)
                else:
                    best = torch.full((x.shape[0], *self.value.shape[2:]), CONSTANT, dtype=torch.int32)
                for number, tap in enumerate(self.taps):
                    channels = torch.nonzero(live.flatten(1)[:, number]).flatten()
                    if len(channels) == 0:
                        continue
                    if self.transposed:
                        window = self._window(tap, best)
                        window.copy_(torch.maximum(window, inputs[channels].amax(0)))
                    else:
                        seen = self._window(tap, inputs)
                        torch.maximum(best, seen[channels].amax(0), out=best)
                if self.transposed:
                    best = best[(slice(None), *inner)]
                out[:, outs.start + numbers] = best.unsqueeze(1)
        if self.bias is not None:
            torch.maximum(out, self.analysis.ready(self.bias).view(1, -1, *[1] * self.rank), out=out)
        if self.onto is not None:
            torch.maximum(out, self.analysis.ready(self.onto), out=out)
        return out, None

    def needs(self, times: Tensor) -> Iterator[tuple[Operand, Tensor]]:
        wanted = torch.full(self.x.shape, NEVER, dtype=torch.int32)
        if not self.transposed:
            wanted = F.pad(wanted, self._pads(), value=NEVER)
        else:
            sizes, inner = self._transposed_room()
            room = torch.full((*times.shape[:2], *sizes), NEVER, dtype=torch.int32)
            room[(slice(None), slice(None), *inner)] = times
            times = room
        for outs, ins in self._blocks():
            results = times[:, outs].transpose(0, 1)
            for numbers, live in groups_of(self.live[outs].transpose(0, 1)) or []:
                best = torch.full((len(wanted), *wanted.shape[2:]), NEVER, dtype=torch.int32)
                for number, tap in enumerate(self.taps):
                    channels = torch.nonzero(live.flatten(1)[:, number]).flatten()
                    if len(channels) == 0:
                        continue
                    if self.transposed:
                        torch.minimum(best, self._window(tap, results)[channels].amin(0), out=best)
                    else:
                        window = self._window(tap, best)
                        window.copy_(torch.minimum(window, results[channels].amin(0)))
                wanted[:, ins.start + numbers] = best.unsqueeze(1)
        if not self.transposed and any(self.padding):
            cut = tuple(slice(p, p + size) for p, size in zip(self.padding, self.x.shape[2:], strict=True))
            wanted = wanted[(slice(None), slice(None), *cut)]
        yield self.x, wanted
        if self.bias is not None:
            yield self.bias, torch.full(self.bias.shape, NEVER, dtype=torch.int32)
        if self.onto is not None:
            yield self.onto, times

    # --- computing a part

    def _channels(self, box: Box) -> tuple[int, int, int]:
        return (box.start[1], box.sizes[1], box.steps[1]) if self.groups == 1 else (0, self.value.shape[1], 1)

    def fixed(self, box: Box) -> tuple[Any, ...]:
        if not self.transposed:
            return (box.start[1],)
        places = zip(box.start[2:], box.sizes[2:], self.stride, strict=True)
        return (box.start[1], *(start % stride if size == 1 else start for start, size, stride in places))

    def emit(self, builder: Builder, box: Box) -> None:
        packed = self._packed(self._channels(box))
        out = builder.out(self.value, box)
        if packed is None and self.onto is not None:
            builder.emit(Tensor.copy_, out, builder.read(self.onto, builder.region(box)))
        elif packed is None:
            bias = 0 if self.bias is None else self._bias(self._channels(box)).view(-1, *[1] * self.rank)
            builder.emit(fill, out, bias)
        elif self.transposed:
            self._emit_transposed(builder, box, out)
        elif self.groups == 1 and math.prod(box.sizes[2:]) * box.sizes[0] == 1:
            self._emit_place(builder, box, packed, out)
        else:
            self._emit_slab(builder, box, packed, out)

    def _packed(self, channels: tuple[int, int, int]) -> "Packed | None":
        """The weights of some output channels, cropped to the box that holds all that are not zero; None: all are."""
        if channels not in self._cache:
            first, count, step = channels
            rows = slice(first, first + (count - 1) * step + 1, step)
            if self.transposed:
                weight = self.weight if self.groups > 1 else self.weight[:, rows]
                self._cache[channels] = Packed.of(weight, (), self.live[rows].any())
            else:
                live = self.live[rows]
                crop = [(0, live.shape[1])] if self.groups > 1 else [extent(live.transpose(0, 1).flatten(1).any(1))]
                crop += [extent(live.movedim(2 + d, 0).flatten(1).any(1)) for d in range(self.rank)]
                cut = tuple(slice(a, b) for a, b in crop)
                self._cache[channels] = Packed.of(self.weight[(rows, *cut)], tuple(a for a, _ in crop), live.any())
        return self._cache[channels]

    def _bias(self, channels: tuple[int, int, int]) -> Tensor:
        first, count, step = channels
        key = ("bias", *channels)
        if key not in self._cache:
            data = self.analysis.data(self.bias)
            self._cache[key] = data[first : first + (count - 1) * step + 1 : step].contiguous()
        return self._cache[key]

    def _padded(self) -> Operand:
        """The input with the zeros around it that the kernel reaches."""
        pads = self.padding
        if self.transposed:
            pads = [size * dilation for size, dilation in zip(self.kernel, self.dilation, strict=True)]
        padded = self.x.map.pad([0, 0, *pads], [0, 0, *pads])
        return Operand(self.analysis.graph, padded.shape, map=padded)

    def reads(self) -> list[Operand]:
        return [self._padded(), *([] if self.onto is None else [self.onto])]

    def _added(self, builder: Builder, box: Box, order: list[int]) -> View | Tensor | None:
        """What the sums begin with, dimensions in the given order."""
        if self.onto is not None:
            return builder.read(self.onto, builder.region(box)).order(order)
        return None if self.bias is None else self._bias(self._channels(box))

    def _emit_place(self, builder: Builder, box: Box, packed: "Packed", out: View) -> None:
        """One place: a row vector of all that the taps see, times a matrix."""
        starts = builder.starts(box)
        region = [(starts[0], 1, 1), (Linear(packed.first[0]), packed.weight.shape[1], 1)]
        for d in range(self.rank):
            corner = starts[2 + d] * self.stride[d] + packed.first[1 + d] * self.dilation[d]
            region.append((corner, packed.weight.shape[2 + d], self.dilation[d]))
        seen = builder.read(self._padded(), region).order([*range(2, 2 + self.rank), 1]).collapse()
        bias = self._added(builder, box, [1])
        matrix = packed.matrix
        target = out.collapse()
        target = target if target.sizes else target.unsqueeze(0)
        if len(seen.sizes) == 0:
            seen = seen.unsqueeze(0)
        precise = packed.weight.dtype in (
            torch.float32,
            torch.float64,
        )  # parts of a half precision sum would be rounded
        if precise and len(seen.sizes) == 2 and seen.strides[1] == 1 and seen.sizes[1] >= WIDE and seen.sizes[0] <= 4:
            rows = matrix.view(seen.sizes[0], seen.sizes[1], -1)
            for k in range(seen.sizes[0]):
                part = seen.narrow(0, k, 1).order([1])
                start = bias if k == 0 else target
                if start is None:
                    builder.emit(torch.mm, part, packed.part(k, rows), out=target)
                else:
                    builder.emit(torch.addmm, start, part, packed.part(k, rows), out=target)
            return
        if len(seen.sizes) > 1 or seen.strides[0] != 1:
            flat = builder.scratch((seen.numel,), self.x.map.value.data.dtype)
            strides = dense_strides(seen.sizes, range(len(seen.sizes)))
            builder.emit(Tensor.copy_, replace(flat, sizes=seen.sizes, strides=strides), seen)
            seen = flat
        if bias is None:
            builder.emit(torch.mm, seen, matrix, out=target)
        else:
            builder.emit(torch.addmm, bias, seen, matrix, out=target)

    def _emit_slab(self, builder: Builder, box: Box, packed: "Packed", out: View) -> None:
        """Many places at once: the convolution of all that they see."""
        starts = builder.starts(box)
        channels = self.x.shape[1] if self.groups > 1 else packed.weight.shape[1]
        region = [(starts[0], box.sizes[0], box.steps[0]), (Linear(packed.first[0]), channels, 1)]
        strides = []
        for d in range(self.rank):
            stride = self.stride[d] * box.steps[2 + d]
            reach = (box.sizes[2 + d] - 1) * stride + (packed.weight.shape[2 + d] - 1) * self.dilation[d] + 1
            corner = starts[2 + d] * self.stride[d] + packed.first[1 + d] * self.dilation[d]
            region.append((corner, reach, 1))
            strides.append(stride)
        seen = builder.read(self._padded(), region)
        if self.groups == 1 and all(size == 1 for size in packed.weight.shape[2:]) and all(s == 1 for s in strides):
            order = [0, *range(2, 2 + self.rank), 1]
            emit_linear(builder, seen.order(order), packed.matrix, self._added(builder, box, order), out.order(order))
            return
        bias = self._added(builder, box, [*range(2 + self.rank)])
        call = Slab(tuple(strides), tuple(self.dilation), self.groups)
        if self.groups == 1:
            builder.emit(call, seen, packed.weight, bias, out=out)
        else:
            found = builder.make(call, seen, packed.weight, bias)
            found = builder.make(select, found, box.start[1], box.sizes[1], box.steps[1])
            builder.emit(Tensor.copy_, out, found)

    def _emit_transposed(self, builder: Builder, box: Box, out: View) -> None:
        """Along a dimension with one place, the taps that reach it; along the others, the transpose of a slab."""
        channels = self._channels(box)
        packed = self._packed(channels)
        assert packed is not None
        starts = builder.starts(box)
        reach = [size * dilation for size, dilation in zip(self.kernel, self.dilation, strict=True)]
        source = self._padded()
        single = [d for d in range(self.rank) if box.sizes[2 + d] == 1]
        many = [d for d in range(self.rank) if d not in single]
        choices = []
        for d in single:
            place = box.start[2 + d] + self.padding[d]
            choices.append([k for k in range(self.kernel[d]) if (place - k * self.dilation[d]) % self.stride[d] == 0])
        region: list[Any] = [(starts[0], box.sizes[0], box.steps[0]), (Linear(0), self.x.shape[1], 1)]
        region += [None] * self.rank
        cuts = []
        for d in many:
            first, last = box.start[2 + d], box.start[2 + d] + (box.sizes[2 + d] - 1) * box.steps[2 + d]
            low = max(0, -(-(first + self.padding[d] - (self.kernel[d] - 1) * self.dilation[d]) // self.stride[d]))
            high = min(self.x.shape[2 + d] - 1, (last + self.padding[d]) // self.stride[d])
            region[2 + d] = (Linear(low + reach[d]), high - low + 1, 1)
            cuts.append((first + self.padding[d] - low * self.stride[d], box.sizes[2 + d], box.steps[2 + d]))
        total: Any = None
        for taps in product(*choices):
            weight_at: list[Any] = [slice(None), slice(None)] + [slice(None)] * self.rank
            for d, tap in zip(single, taps, strict=True):
                moved = starts[2 + d] + (self.padding[d] - tap * self.dilation[d])
                region[2 + d] = (moved * Fraction(1, self.stride[d]) + reach[d], 1, 1)
                weight_at[2 + d] = tap
            seen = builder.read(source, region).order([0, 1, *(2 + d for d in many)])
            weight = packed.slice(taps, tuple(weight_at))
            if many:
                call = functools.partial(
                    convolve_transposed,
                    stride=[self.stride[d] for d in many],
                    dilation=[self.dilation[d] for d in many],
                    groups=self.groups,
                    cuts=cuts,
                )
                part = builder.make(call, seen, weight)
            else:
                part = builder.make(functools.partial(project, groups=self.groups), seen, weight)
            total = part if total is None else builder.make(torch.add, total, part)
        if self.groups > 1 and total is not None:
            total = builder.make(select, total, box.start[1], box.sizes[1], box.steps[1])
        if self.bias is not None:
            first, count, step = box.start[1], box.sizes[1], box.steps[1]
            bias = self._bias((first, count, step)).view(-1, *[1] * len(many))
            total = bias if total is None else builder.make(torch.add, total, bias)
        target = out.order([0, 1, *(2 + d for d in many)])
        builder.emit(fill, target, 0 if total is None else total)
