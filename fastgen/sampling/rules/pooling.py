"""The greatest of a window."""

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgen.sampling.plan.builder import Builder
from fastgen.sampling.plan.layout import Box
from fastgen.sampling.rules.base import Analysis, Rule
from fastgen.sampling.trace.element_times import compact
from fastgen.sampling.trace.graph import NEVER, Operand, Value


class MaxPool2d(Rule):
    """Max pooling without padding."""

    def __init__(self, value: Value, analysis: Analysis) -> None:
        super().__init__(value, analysis)
        self.x = value.args[0]
        kernel, stride, _, dilation = (*value.args[1:], (), (), ())[:4]
        self.kernel, self.stride, self.dilation = (
            [int(k) for k in one] * (2 if len(one) == 1 else 1) for one in (kernel, stride or kernel, dilation or [1])
        )

    @staticmethod
    def takes(value: Value) -> bool:
        return value.output == 0 and not any(value.args[3] if len(value.args) > 3 else ()) and len(value.args) < 6

    def ready(self) -> tuple[Tensor, Tensor | None]:
        times = self._by_channels(self.analysis.ready(self.x)).double()
        return F.max_pool2d(times, self.kernel, self.stride, 0, self.dilation).int().expand(self.value.shape), None

    def _by_channels(self, times: Tensor) -> Tensor:
        """With all places, but only the channels that differ."""
        channels = compact(times).shape[:-2]
        return times[tuple(slice(0, size) for size in channels)]

    def needs(self, times: Tensor) -> Iterator[tuple[Operand, Tensor]]:
        times = self._by_channels(times)
        wanted = torch.full((*times.shape[:-2], *self.x.shape[-2:]), NEVER, dtype=torch.int32)
        rows, columns = times.shape[-2:]
        for i, j in product(range(self.kernel[0]), range(self.kernel[1])):
            first, left = i * self.dilation[0], j * self.dilation[1]
            window = wanted[..., first :: self.stride[0], left :: self.stride[1]][..., :rows, :columns]
            window.copy_(torch.minimum(window, times))
        yield self.x, wanted.expand(self.x.shape)

    def emit(self, builder: Builder, box: Box) -> None:
        region = builder.region(box)
        stride = [s * step for s, step in zip(self.stride, box.steps[-2:], strict=True)]
        for d in range(2):
            axis = len(box.sizes) - 2 + d
            reach = (box.sizes[axis] - 1) * stride[d] + (self.kernel[d] - 1) * self.dilation[d] + 1
            region[axis] = (builder.starts(box)[axis] * self.stride[d], reach, 1)
        found = builder.make(_pool, builder.read(self.x, region), self.kernel, stride, self.dilation)
        builder.fill(builder.out(self.value, box), found)


def _pool(x: Tensor, kernel: list[int], stride: list[int], dilation: list[int]) -> Tensor:
    found = F.max_pool2d(x.flatten(0, -4), kernel, stride, 0, dilation)
    return found.view(*x.shape[:-2], *found.shape[-2:])
