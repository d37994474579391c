"""Concatenation and stacking: each element is copied from the operand that it comes from."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgen.sampling.plan.builder import Builder
from fastgen.sampling.plan.layout import Box
from fastgen.sampling.rules.base import Rule
from fastgen.sampling.trace.element_times import compact
from fastgen.sampling.trace.graph import Operand


class Concatenation(Rule):
    """cat and stack: each operand is copied to its place."""

    sees_zeros = False

    @cached_property
    def dim(self) -> int:
        dim = self.value.args[1] if len(self.value.args) > 1 else self.value.kwargs.get("dim", 0)
        return dim % len(self.value.shape)

    @cached_property
    def stacks(self) -> bool:
        return self.value.op_name == "stack"

    @cached_property
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
        return ready, self._joined(softmax_zero) if any(compact(one).any() for one in softmax_zero) else None

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

    def _begins(self, boxes: Any) -> np.ndarray:
        """Where each operand but the first begins in a box, (operands - 1, boxes)."""
        start, sizes, steps = (np.atleast_1d(one[self.dim]) for one in (boxes.start, boxes.sizes, boxes.steps))
        firsts = np.array([first for first, _, _ in self.pieces[1:]], dtype=np.int64)[:, None]
        return np.clip(-((start - firsts) // steps), 0, sizes)

    def fixed(self, boxes: Any) -> Sequence[Any]:
        """The number of a kind: in boxes of one kind all operands begin alike."""
        begins = self._begins(boxes)
        return (np.unique(begins, axis=1, return_inverse=True)[1],) if len(begins) else ()

    def emit(self, builder: Builder, box: Box) -> None:
        dim, out = self.dim, builder.out(self.value, box)
        begins = [0, *self._begins(box)[:, 0].tolist(), box.sizes[dim]]
        for (first, _, one), inside, end in zip(self.pieces, begins, begins[1:], strict=False):
            if inside == end:
                continue
            region = builder.region(box)
            start, _, step = region[dim]
            if self.stacks:
                del region[dim]
                part = builder.read(one, region).unsqueeze(dim)
            else:
                region[dim] = (start + (inside * step - first), end - inside, step)
                part = builder.read(one, region)
            builder.pointwise("copy", out.narrow(dim, inside, end - inside), part)
