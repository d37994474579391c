"""The scans of PixelRNN: a cell at a time, each once, from the states around it that are there already.

The value of a scan holds hidden and cell states, (1, 2, h, H, W), of which the model sees the hidden ones.
"""

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgen.sampling.plan.builder import Builder
from fastgen.sampling.plan.layout import Box
from fastgen.sampling.plan.program import Linear
from fastgen.sampling.rules.base import Analysis, Rule
from fastgen.sampling.trace.graph import CONSTANT, NEVER, Map, Operand, Unsupported, Value


class Scan(Rule):
    """What the diagonal and the Row LSTM share. Subclasses say which neighbours of a pixel its state comes from."""

    keeps_state = True

    def __init__(self, value: Value, analysis: Analysis) -> None:
        super().__init__(value, analysis)
        self.gates, weight = value.args[:2]
        if weight.map is None or weight.map.value.kind != "constant":
            raise Unsupported(f"{value.name}: an LSTM whose weights depend on the input")
        self.weight = analysis.data(weight)
        self.units = self.weight.shape[1]
        self._cuts: dict[Any, Tensor] = {}

    @property
    def options(self) -> tuple[Any, ...]:
        """Of the operator, behind gates and weight."""
        return ()

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

    def refine(self, latest: Tensor) -> Tensor:
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

    def fixed(self, box: Box) -> tuple[int, ...]:
        return (box.start[2],)

    def emit(self, builder: Builder, box: Box) -> None:
        builder.out(self.value, box)
        if box.sizes[1] != 2 or box.steps[2:] != (1, 1, 1):
            raise Unsupported(f"{self.value.name}: states in an irregular order")
        starts = builder.starts(box)
        first, count = box.start[2], box.sizes[2]
        _, _, _, rows, columns = box.sizes
        pieces = [
            builder.read(
                self.gates,
                [
                    (Linear(0), 1, 1),
                    (Linear(gate * self.units + first), count, 1),
                    (starts[3], rows, 1),
                    (starts[4], columns, 1),
                ],
            )
            for gate in range(4)
        ]
        states = builder.read(
            self.around(),
            [
                (Linear(0), 1, 1),
                (Linear(0), 2, 1),
                (Linear(0), self.units, 1),
                (starts[3], rows + 1, 1),
                (starts[4], columns + 2 * self.reach, 1),
            ],
        )
        if (first, count) not in self._cuts:
            weight = self.weight.unflatten(0, (4, -1))[:, first : first + count].flatten(0, 1)
            self._cuts[first, count] = self.packed(weight)
        gates = [piece.order([1, 2, 3]) for piece in pieces]
        builder.emit(self.run, gates, states.order([1, 2, 3, 4]), self._cuts[first, count], first)

    def whole(self, gates: Tensor) -> Tensor:
        """The states (n, 1, 2, h, H, W) of whole images from their gates (n, 1, 4h, H, W)."""
        given = [gates.flatten(0, 1), self.weight.to(gates.device), *self.value.args[2:3]]
        name = self.value.op._schema.name.split("::")[1]
        hidden, _, cell = getattr(torch.ops.fastgen, f"{name}_saving")(
            *given[: 3 if name == "diagonal_lstm" else 2], False
        )
        return torch.stack((hidden, cell), 1).unsqueeze(1)

    @abstractmethod
    def packed(self, weight: Tensor) -> Tensor:
        """The weights (4 units, h, taps) of some units as `run` takes them."""

    @abstractmethod
    def run(self, gates: list[Tensor], states: Tensor, weight: Tensor, first: int) -> None:
        """Fills in the states of a box.

        Args:
            gates: four tensors (n, units, rows, columns) in the order o, f, i, g.
            states: (n, 2, h, rows + 1, columns + 2 * reach), the box with the row above it and columns beside it.
            weight: as `packed` gives it.
            first: number of the first unit of the box.
        """


def _cell(gates: list[Tensor], recurrent: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """(n, units, ...): the new hidden and cell state; recurrent (n, 4 * units, ...)."""
    o, f, i, g = (gate + term for gate, term in zip(gates, recurrent.chunk(4, 1), strict=True))
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


class DiagonalScan(Scan):
    """A state comes from the pixel above and from the one to the left, or to the right where reversed."""

    @property
    def reverse(self) -> bool:
        return bool(self.value.args[2])

    @property
    def options(self) -> tuple[Any, ...]:
        return (self.reverse,)

    def before(self, times: Tensor, fill: int) -> Tensor:
        if self.reverse:
            times = times.flip(1)
        up_to = times.cummax(0).values.cummax(1).values
        padded = F.pad(up_to, (1, 0, 1, 0), value=fill)
        found = torch.maximum(padded[:-1, 1:], padded[1:, :-1])
        return found.flip(1) if self.reverse else found

    def packed(self, weight: Tensor) -> Tensor:
        return torch.cat((weight[..., 0], weight[..., 1]), 1).T.contiguous()  # (2h, 4 units), up then beside

    def run(self, gates: list[Tensor], states: Tensor, weight: Tensor, first: int) -> None:
        units, rows, columns = gates[0].shape[1:]
        beside = 2 if self.reverse else 0
        for row in range(rows):
            for column in reversed(range(columns)) if self.reverse else range(columns):
                hidden = torch.cat((states[:, 0, :, row, column + 1], states[:, 0, :, row + 1, column + beside]), 1)
                cell = states[:, 1, first : first + units, row + 1, column + beside]
                at = [gate[:, :, row, column] for gate in gates]
                found = _cell(at, hidden @ weight, cell)
                for kind in range(2):
                    states[:, kind, first : first + units, row + 1, column + 1] = found[kind]


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

    def packed(self, weight: Tensor) -> Tensor:
        return weight.contiguous()

    def run(self, gates: list[Tensor], states: Tensor, weight: Tensor, first: int) -> None:
        units, rows, columns = gates[0].shape[1:]
        for row in range(rows):
            recurrent = F.conv1d(states[:, 0, :, row], weight)
            here = slice(self.reach, self.reach + columns)
            cell = states[:, 1, first : first + units, row, here]
            found = _cell([gate[:, :, row] for gate in gates], recurrent, cell)
            for kind in range(2):
                states[:, kind, first : first + units, row + 1, here] = found[kind]
