"""Transposed convolutions: a few products, too, for places that lie alike between the strides.

Example: stride 2 and kernel 3 along a row. Even places are reached by taps 0 and 2, odd ones by tap 1: two products for
all even places of a row, one for all odd ones.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import product
from typing import Any

from torch import Tensor

from fastgen.sampling.machine.language import AffineOffset, View
from fastgen.sampling.plan.builder import Builder
from fastgen.sampling.plan.layout import Box
from fastgen.sampling.rules.convolution import Convolution
from fastgen.sampling.trace.graph import CONSTANT, NEVER


class TransposedConvolution(Convolution):
    """The kernel lies at the places of the input, and its taps reach into the output."""

    def _zero(self) -> Tensor:  # (I, O / groups, ...) -> (O, I / groups, ...)
        return super()._zero().unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)

    @property
    def places(self) -> tuple[int, ...]:
        return self.x.shape[2:]

    def _latest(self, inputs: Tensor, live: Tensor) -> Tensor:
        return self._scattered(inputs, live, CONSTANT, self.value.shape[2:])

    def _first(self, results: Tensor, live: Tensor) -> Tensor:
        return -self._gathered(-results, live, -NEVER)

    # --- computing a part

    def fixed(self, boxes: Any) -> Sequence[Any]:
        """The same is done at places that lie alike between the strides."""
        return [boxes.start[1], *(start % stride for start, stride in zip(boxes.start[2:], self.stride, strict=True))]

    def _room(self) -> list[int]:
        return [size * dilation for size, dilation in zip(self.kernel, self.dilation, strict=True)]

    def _emit_products(
        self, builder: Builder, box: Box, out: View, added: View | None, channels: slice, group: int
    ) -> None:
        """Places that lie alike between the strides are reached by the same taps, each a product."""
        size = len(self.weight) // self.groups
        order = [0, *range(2, 2 + self.rank), 1]
        starts = builder.starts(box)
        for alike in product(*(self._alike(box, d) for d in range(self.rank))):
            here, start = out, added
            for d, (first, count, step, _) in enumerate(alike):
                here = here.narrow(2 + d, first, count, step)
                start = start if start is None else start.narrow(2 + d, first, count, step)
            here, start = here.order(order), start if start is None else start.order(order)
            summed = False
            choices: list[list[int]] = [one[3] for one in alike]
            for taps in product(*choices):
                index: Any = (slice(group * size, (group + 1) * size), self._own(channels, group), *taps)
                weight = self.weight[index]
                if not bool((weight != 0).any()):
                    continue
                region = [(starts[0], box.sizes[0], box.steps[0]), (AffineOffset(group * size), size, 1)]
                for d, (tap, (first, count, step, _)) in enumerate(zip(taps, alike, strict=True)):
                    moved = first * box.steps[2 + d] + self.padding[d] - tap * self.dilation[d]
                    corner = (starts[2 + d] + moved) * Fraction(1, self.stride[d])
                    reach = self.kernel[d] * self.dilation[d]
                    region.append((corner + reach, count, step * box.steps[2 + d] // self.stride[d]))
                rows = builder.read(self._padded(), region).order(order)
                name = (channels.start, channels.stop, channels.step, *taps)
                builder.product(here, rows, self._weights(name, weight), here if summed else start)
                summed = True
            if not summed:
                builder.pointwise("copy", here, 0.0 if start is None else start)

    def _own(self, channels: slice, group: int) -> slice:
        """Output channels as numbered within their group."""
        first = group * (len(self.live) // self.groups)
        return slice(channels.start - first, channels.stop - first, channels.step)

    def _alike(self, box: Box, d: int) -> list[tuple[int, int, int, list[int]]]:
        """Places of the box along a dimension that the same taps reach: first, count, step, taps."""
        start, count, step = box.start[2 + d] + self.padding[d], box.sizes[2 + d], box.steps[2 + d]
        period = self.stride[d] // math.gcd(self.stride[d], step)
        found = []
        for first in range(min(period, count)):
            place = start + first * step
            taps = [k for k in range(self.kernel[d]) if (place - k * self.dilation[d]) % self.stride[d] == 0]
            found.append((first, len(range(first, count, period)), period, taps))
        return found
