"""What the engine asks of an operation, and the quantities that it keeps for all elements."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastgen.sampling.trace.graph import CONSTANT, NEVER, Graph, Map, Operand, Value

if TYPE_CHECKING:
    from fastgen.sampling.plan.builder import Builder
    from fastgen.sampling.plan.layout import Box

LOW = -1e4  # what is below by this much vanishes in a softmax


class Analysis:
    """Ready times of all elements, and which of them are constants that are zero, or so low that a softmax gives zero.

    The ready time of an element is the place in the drawing order of the last pixel (or channel) that it depends on.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._ready = graph.new_store(CONSTANT)
        self._zero: dict[Value, Tensor] = {}  # of the values that have any
        self._low: dict[Value, Tensor] = {}

    def grow(self) -> None:
        """Makes room for values that have been numbered since."""
        more = self.graph.numel - len(self._ready)
        self._ready = torch.cat((self._ready, self._ready.new_full((more,), CONSTANT)))

    def set(self, value: Value, ready: Tensor, low: Tensor | None = None) -> None:
        self.graph.of(self._ready, value).copy_(ready)
        for known in (self._zero, self._low):
            known.pop(value, None)
        constant = ready == CONSTANT
        if constant.any():
            self._zero[value] = constant & (value.data == 0)
            if value.data.is_floating_point():
                very_low = constant & (value.data <= LOW)
                low = very_low if low is None else low | very_low
        if low is not None and low.any():
            self._low[value] = low.expand(value.shape)

    def coarsen(self, draws: int) -> None:
        """Ready times in an order in which so many draws that follow each other are one."""
        if draws > 1:
            self._ready = coarser(self._ready, draws)

    def ready_of(self, value: Value) -> Tensor:
        return self.graph.of(self._ready, value)

    def ready(self, operand: Operand) -> Tensor:
        return operand.read(self._ready, CONSTANT)

    def zero(self, operand: Operand) -> Tensor:
        if operand.map is not None and operand.map.value.base == 0:
            return operand.map.read((operand.map.value.data == 0).to(torch.uint8), 1).bool()
        return self._flags(operand, self._zero, 1)

    def low(self, operand: Operand) -> Tensor:
        if operand.map is not None and operand.map.value.base == 0:
            data = operand.map.value.data
            low = (data <= LOW) if data.is_floating_point() else torch.zeros_like(data, dtype=torch.bool)
            return operand.map.read(low.to(torch.uint8), 0).bool()
        return self._flags(operand, self._low, 0)

    def _flags(self, operand: Operand, known: dict[Value, Tensor], outside: int) -> Tensor:
        """The operand's view of what is known of some values and false of all others; `outside` for zeros around."""
        if operand.map is not None:
            value = operand.map.value
            if value not in known and not (outside and operand.map.padded):
                return torch.zeros((), dtype=torch.bool).expand(operand.shape)
            flags = known.get(value, torch.zeros((), dtype=torch.bool)).expand(value.shape)
            return operand.map.read(flags.to(torch.uint8), outside).bool()
        assert operand.ids is not None
        found = (operand.ids == 0) & bool(outside)
        for value in operand.values if known else []:
            if value in known:
                places = (operand.ids >= value.base) & (operand.ids < value.base + value.numel)
                found[places] = known[value].reshape(-1)[operand.ids[places] - value.base]
        return found

    def constant(self, data: Tensor) -> Operand:
        """A constant of the rule's own, to be read like the network's."""
        value = self.graph.add(Value("constant", tuple(data.shape), data.contiguous()))
        return Operand(self.graph, value.shape, map=Map.identity(value))

    def data(self, operand: Operand) -> Tensor:
        return self.graph.data_of(operand)


def coarser(ready: Tensor, draws: int) -> Tensor:
    """Ready times in an order in which so many draws that follow each other are one."""
    return ready if draws == 1 else torch.where(ready < 0, ready, ready.div(draws, rounding_mode="floor"))


class Rule(ABC):
    """One operation of the network. Subclasses say what depends on what, and compute parts of the result.

    Attributes:
        keeps_state: whether elements of the value are read to compute others of it.
    """

    keeps_state = False

    def __init__(self, value: Value, analysis: Analysis) -> None:
        self.value = value
        self.analysis = analysis

    @abstractmethod
    def ready(self) -> tuple[Tensor, Tensor | None]:
        """Ready times of the value's elements, and which of them are low, where the rule knows."""

    def refine(self, latest: Tensor) -> Tensor:
        """When each element is needed, by others of this value too."""
        return latest

    @abstractmethod
    def needs(self, times: Tensor) -> Iterator[tuple[Operand, Tensor]]:
        """Each operand with the least time at which an element of it is needed; NEVER where it is not.

        Args:
            times: when each element of the value is computed; NEVER where it is not computed.
        """

    def reads(self) -> list[Operand]:
        """Operands as they are read, with what padding puts around them."""
        return self.value.operands

    def fixed(self, box: "Box") -> tuple[Any, ...]:
        """What besides the sizes of the box the program depends on."""
        return ()

    @abstractmethod
    def emit(self, builder: "Builder", box: "Box") -> None:
        """Writes the computation of the box."""

    @property
    def multiply_adds(self) -> float:
        """Of one element of the value, with dense kernels."""
        return 0


def constant_operand(operand: Any) -> bool:
    return operand.map is not None and operand.map.value.kind == "constant"


def argument(value: Value, name: str) -> Any:
    """An argument of the value's operator by its name, the default where it was not given; None without one."""
    for k, one in enumerate(value.op._schema.arguments):
        if one.name == name:
            return value.args[k] if k < len(value.args) else value.kwargs.get(name, one.default_value)
    return None


def batched_arguments(value: Value, dims: Sequence[int]) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of the value's operator for operands with a further dimension of images in front.

    Args:
        dims: what its argument `dim` stands for; empty where it has none.
    """
    args, kwargs = list(value.args), dict(value.kwargs)
    for k, one in enumerate(value.op._schema.arguments):
        if dims and one.name == "dim":
            moved = [d + 1 for d in dims] if isinstance(argument(value, "dim"), (list, tuple)) else dims[0] + 1
            if one.kwarg_only or one.name in kwargs:
                kwargs["dim"] = moved
            else:
                args += [other.default_value for other in value.op._schema.arguments[len(args) : k + 1]]
                args[k] = moved
    return args, kwargs


@cache
def result_of(op: Any, output: int) -> Callable[..., Tensor]:
    """The operator as a function of one result."""
    if len(op._schema.returns) == 1:
        return op
    return lambda *args, **kwargs: op(*args, **kwargs)[output]


def reduce_to(times: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The least over the dimensions along which a tensor of this shape was broadcast."""
    while times.dim() > len(shape):
        times = times.amin(0)
    for d, size in enumerate(shape):
        if size == 1 and times.shape[d] > 1:
            times = times.amin(d, keepdim=True)
    return times


def groups_of(rows: Tensor, limit: int | None = None) -> list[tuple[Tensor, Tensor]] | None:
    """Equal rows: (numbers of the rows, the row) each; None where there are more kinds than the limit."""
    flat = rows.reshape(len(rows), -1)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(-(2**40), 2**40, (flat.shape[1],), generator=generator)
    keys = (flat.long() * weights).sum(1)
    kinds, inverse = keys.unique(return_inverse=True)
    if limit is not None and len(kinds) > limit:
        return None
    members = [torch.nonzero(inverse == k).flatten() for k in range(len(kinds))]
    return [(numbers, rows[numbers[0]]) for numbers in members]


def never(shape: Any) -> Tensor:
    return torch.full(tuple(shape), NEVER, dtype=torch.int32)
