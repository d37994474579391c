"""The scans of PixelRNN: a cell at a time, each once, from the states around it that are there already.

The value of a scan holds hidden and cell states, (1, 2, h, H, W), of which the model sees the hidden ones.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgen.sampling.machine.language import AffineOffset, View, constant
from fastgen.sampling.plan.builder import Builder
from fastgen.sampling.plan.layout import Box
from fastgen.sampling.rules.base import Analysis, Rule
from fastgen.sampling.trace.graph import CONSTANT, NEVER, Map, Operand, Unsupported, Value

Place = tuple[int, int]  # row and column


class Scan(Rule):
    """What the diagonal and the Row LSTM share. Subclasses say which neighbours of a pixel its state comes from."""

    keeps_state = True
    channels = 2

    def __init__(self, value: Value, analysis: Analysis) -> None:
        super().__init__(value, analysis)
        self.gates, weight = value.args[:2]
        if weight.map is None or weight.map.value.kind != "constant":
            raise Unsupported(f"{value.name}: an LSTM whose weights depend on the input")
        self.weight = analysis.data(weight)
        self.units = self.weight.shape[1]
        self._cuts: dict[tuple[int, int, int], View] = {}

    @property
    def multiply_adds(self) -> float:
        return 4 * self.weight[0].numel() / 2  # an element of the value is half a unit

    @abstractmethod
    def before(self, times: Tensor, fill: int) -> Tensor:
        """For every pixel of times (H, W) the greatest of all pixels that its state comes from, not its own."""

    def ready(self) -> tuple[Tensor, Tensor | None]:
        own = self.analysis.ready(self.gates).unflatten(1, (4, -1)).amax(1)  # (1, h, H, W)
        earlier = torch.stack([self.before(of_image.amax(0), CONSTANT) for of_image in own])
        return torch.maximum(own, earlier.unsqueeze(1)).unsqueeze(1).expand(self.value.shape), None

    def needed_within(self, latest: Tensor) -> Tensor:
        together = latest.amin(1)  # hidden and cell state come at once
        # A state is needed before all that come from it: the pixels after it are those before it in the mirror.
        mirrored = -together.amin(1).flip(1, 2)
        later = -torch.stack([self.before(of_image, -NEVER) for of_image in mirrored]).flip(1, 2)
        return torch.minimum(together, later.unsqueeze(1)).unsqueeze(1).expand(latest.shape)

    def needs(self, times: Tensor) -> Iterator[tuple[Operand, Tensor]]:
        together = times.amin(1)
        yield self.gates, together.repeat(1, 4, 1, 1)

    def around(self) -> Operand:
        """The states with zeros around the image."""
        reach = self.reach
        padded = Map.identity(self.value).pad((0, 0, 0, 1, reach), (0, 0, 0, 0, reach))
        assert padded is not None
        return Operand(self.analysis.graph, padded.shape, map=padded)

    @property
    def reach(self) -> int:
        """Columns to the left and right that a state may come from."""
        return 1

    def reads(self) -> list[Operand]:
        return [self.gates, self.around()]

    def fixed(self, boxes: Any) -> Sequence[Any]:
        return (boxes.start[2],)

    def emit(self, builder: Builder, box: Box) -> None:
        builder.out(self.value, box)
        if box.sizes[1] != 2 or box.steps[2:] != (1, 1, 1):
            raise Unsupported(f"{self.value.name}: states in an irregular order")
        starts = builder.starts(box)
        first, count = box.start[2], box.sizes[2]
        _, _, _, rows, columns = box.sizes
        gates = self._gates(builder, box)
        states = builder.read(
            self.around(),
            [
                (AffineOffset(0), 1, 1),
                (AffineOffset(0), 2, 1),
                (AffineOffset(0), self.units, 1),
                (starts[3], rows + 1, 1),
                (starts[4], columns + 2 * self.reach, 1),
            ],
        ).order([3, 4, 1, 2])
        weights = [self._cut(first, count, tap) for tap in range(self.weight.shape[2])]
        dtype, seen = self.value.data.dtype, self.weight.dtype
        for row, column, width in self.groups(rows, columns):
            around = {
                place: states.narrow(0, row + place[0], 1).narrow(1, column + place[1], width)
                for place in {*self.taps, self.cell, (1, self.reach)}
            }
            hidden_states, cells = (
                {place: one.narrow(2, kind, 1).order([1, 3]) for place, one in around.items()} for kind in range(2)
            )
            own_hidden, own_cell = (of[1, self.reach].narrow(1, first, count) for of in (hidden_states, cells))
            pre = builder.scratch((width, 4 * count), dtype)
            o, f, i, g = (pre.narrow(1, k * count, count) for k in range(4))
            given = [one.narrow(0, row, 1).narrow(1, column, width).order([1, 2]) for one in gates]
            for k, (place, weight) in enumerate(zip(self.taps, weights, strict=True)):
                added = pre if k else given[0] if len(given) == 1 else None
                builder.product(pre, hidden_states[place], weight, added)
            for target, gate in zip((o, f, i, g), given, strict=False) if len(given) > 1 else ():
                builder.pointwise("add", target, target, gate)
            builder.pointwise("sigmoid", f, f)
            builder.pointwise("mul", f, f, cells[self.cell].narrow(1, first, count))
            builder.pointwise("gate", g, g, i)
            builder.pointwise("add", own_cell, f, g)
            hidden = own_hidden if seen == dtype else builder.scratch((width, count), seen)
            builder.pointwise("gate", hidden, own_cell, o)
            if seen != dtype:  # hidden states are rounded to the model's dtype
                builder.pointwise("copy", own_hidden, hidden)

    def _gates(self, builder: Builder, box: Box) -> list[View]:
        """Those of the units of a box, (rows, columns, 4 units) where they lie side by side, or else one by one."""
        _, _, first, *places = builder.starts(box)
        count, *sizes = box.sizes[2:]
        around = [(start, size, 1) for start, size in zip(places, sizes, strict=True)]

        def read(start: AffineOffset, size: int) -> View:
            region = [(AffineOffset(0), 1, 1), (start, size, 1), *around]
            return builder.read(self.gates, region).order([2, 3, 1])

        if count == self.units:
            found = read(AffineOffset(0), 4 * count)
            if found.strides[-1] == 1:
                return [found]
        return [read(first + k * self.units, count) for k in range(4)]

    def _cut(self, first: int, count: int, tap: int) -> View:
        """The weights (h, 4 count) of some units for a tap."""
        if (first, count, tap) not in self._cuts:
            weight = self.weight.unflatten(0, (4, -1))[:, first : first + count, :, tap].permute(2, 0, 1)
            self._cuts[first, count, tap] = constant(weight, (self.units, 4 * count))
        return self._cuts[first, count, tap]

    def whole(self, gates: Tensor) -> Tensor:
        """The states (n, 1, 2, h, H, W) of whole images from their gates (n, 1, 4h, H, W)."""
        given = [gates.flatten(0, 1), self.weight.to(gates.device), *self.value.args[2:3]]
        name = self.value.op_name
        hidden, _, cell = getattr(torch.ops.fastgen, f"{name}_saving")(
            *given[: 3 if name == "diagonal_lstm" else 2], False
        )
        return torch.stack((hidden.to(cell.dtype), cell), 1).unsqueeze(1)

    @property
    @abstractmethod
    def taps(self) -> list[Place]:
        """Where the hidden state that each tap of the weight meets lies, of a pixel at (1, reach)."""

    @property
    @abstractmethod
    def cell(self) -> Place:
        """Where the cell state lies that a pixel at (1, reach) goes on from."""

    @abstractmethod
    def groups(self, rows: int, columns: int) -> Iterator[tuple[int, int, int]]:
        """The pixels of a box in the order of their states: row, first column and number of those that come at once."""


class DiagonalScan(Scan):
    """A state comes from the pixel above and from the one to the left, or to the right where reversed."""

    @property
    def reverse(self) -> bool:
        return bool(self.value.args[2])

    def before(self, times: Tensor, fill: int) -> Tensor:
        if self.reverse:
            times = times.flip(1)
        up_to = times.cummax(0).values.cummax(1).values
        padded = F.pad(up_to, (1, 0, 1, 0), value=fill)
        found = torch.maximum(padded[:-1, 1:], padded[1:, :-1])
        return found.flip(1) if self.reverse else found

    @property
    def taps(self) -> list[Place]:
        return [(0, 1), self.cell]

    @property
    def cell(self) -> Place:
        return 1, 2 if self.reverse else 0

    def groups(self, rows: int, columns: int) -> Iterator[tuple[int, int, int]]:
        for row in range(rows):
            for column in reversed(range(columns)) if self.reverse else range(columns):
                yield row, column, 1


class RowScan(Scan):
    """A state comes from the k pixels around it in the row above; the cell state from the one above it."""

    @property
    def reach(self) -> int:
        return self.weight.shape[2] // 2

    def before(self, times: Tensor, fill: int) -> Tensor:
        found = torch.full_like(times, fill)
        for row in range(1, len(times)):
            above = torch.maximum(times[row - 1], found[row - 1])
            if self.reach:
                windows = F.pad(above, (self.reach, self.reach), value=fill).unfold(0, 2 * self.reach + 1, 1)
                above = windows.amax(1)
            found[row] = above
        return found

    @property
    def taps(self) -> list[Place]:
        return [(0, tap) for tap in range(self.weight.shape[2])]

    @property
    def cell(self) -> Place:
        return 0, self.reach

    def groups(self, rows: int, columns: int) -> Iterator[tuple[int, int, int]]:
        for row in range(rows):
            yield row, 0, columns
