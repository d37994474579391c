"""What the engine asks of an operation, and the quantities that it keeps for all elements."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastgen.sampling.trace.element_times import Distinct, ElementTimes, compact, kinds_of, shrunk
from fastgen.sampling.trace.graph import CONSTANT, NEVER, Graph, Map, Operand, Value

if TYPE_CHECKING:
    from fastgen.sampling.machine.language import View
    from fastgen.sampling.plan.builder import Builder
    from fastgen.sampling.plan.indexed import Region
    from fastgen.sampling.plan.layout import Box
    from fastgen.sampling.plan.schedule import Boxes

SOFTMAX_ZERO = -1e4  # what is below by this much vanishes in a softmax
NEXT_TO_NOTHING = 1e-20  # a share of a softmax that may be taken for a mask's, where only what is certain counts
NOWHERE = torch.zeros((), dtype=torch.bool)


class Analysis:
    """Ready times of all elements, and which of them are constants that are zero, or so low that a softmax gives zero.

    The ready time of an element is the draw index of the last level that it depends on.

    Args:
        certain: whether the times are those of certain dependences. What depends on no level for certain is then taken
            for the constant that it was in the traced run.
    """

    def __init__(self, graph: Graph, certain: bool = False) -> None:
        self.graph = graph
        self.certain = certain
        self._ready = ElementTimes(CONSTANT)
        self._distinct = Distinct()
        self._zero: dict[Value, Tensor] = {}  # of the values that were asked for
        self._softmax_zero: dict[Value, Tensor] = {}
        self._told: dict[Value, Tensor] = {}  # what rules know to be low, besides constants
        self._falling: dict[int, Operand] = {}
        self._known: dict[Any, tuple[Tensor, Tensor]] = {}

    def set(self, value: Value, ready: Tensor, softmax_zero: Tensor | None = None) -> None:
        self._ready.set(value, self._distinct.shrunk(ready))
        for known in (self._zero, self._softmax_zero, self._told):
            known.pop(value, None)
        if softmax_zero is not None and softmax_zero.any():
            self._told[value] = shrunk(softmax_zero.expand(value.shape))

    def holds(self, value: Value, data: Tensor, zeros: bool) -> bool:
        """Whether a computed value, with other data, would have the same constants that vanish in a softmax, and, where
        `zeros` matter, the same that are zero."""
        constant = compact(self.ready_of(value)) == CONSTANT
        if value.kind != "computed" or not constant.any():
            return True
        pairs = [(value.data == 0, data == 0)] if zeros else []
        if data.is_floating_point():
            pairs.append((value.data <= SOFTMAX_ZERO, data <= SOFTMAX_ZERO))
        return all(torch.equal(old & constant, new & constant) for old, new in pairs)

    def coarsen(self, draws: int) -> None:
        """Ready times in an order in which so many draws that follow each other are one."""
        if draws > 1:
            self._ready.change(lambda ready: coarser(ready, draws))

    def ready_of(self, value: Value) -> Tensor:
        return self._ready.of(value)

    def ready(self, operand: Operand) -> Tensor:
        where = operand.map
        if where is None or where.is_identity:
            return self._ready.read(operand, CONSTANT)
        key = "read", where.shape, where.start, where.steps
        return self.once(key, self.ready_of(where.value), lambda times: where.read(times, CONSTANT))

    def zero(self, operand: Operand) -> Tensor:
        return operand.read(self._zero_of, True, torch.bool)

    def softmax_zero(self, operand: Operand) -> Tensor:
        return operand.read(self._softmax_zero_of, False, torch.bool)

    def _zero_of(self, value: Value) -> Tensor:
        if value not in self._zero:
            vanishes = self.certain and value.kind != "constant" and value.data.is_floating_point()
            self._zero[value] = self._where(
                value, lambda data: data.abs() <= NEXT_TO_NOTHING if vanishes else data == 0
            )
        return self._zero[value]

    def _softmax_zero_of(self, value: Value) -> Tensor:
        if value not in self._softmax_zero:
            real = value.data.is_floating_point()
            low = self._where(value, lambda data: data <= SOFTMAX_ZERO) if real else NOWHERE.expand(value.shape)
            self._softmax_zero[value] = shrunk(low | self._told[value]) if value in self._told else low
        return self._softmax_zero[value]

    def _where(self, value: Value, holds: Callable[[Tensor], Tensor]) -> Tensor:
        """The elements that are constants of which it holds."""
        ready = compact(self.ready_of(value))
        constant = ready < 0 if self.certain else ready == CONSTANT
        if not constant.any():
            return NOWHERE.expand(value.shape)
        around = _around(constant)
        inner = holds(value.data[around])
        if not inner.numpy().any():  # for which torch takes several times as long
            return NOWHERE.expand(value.shape)
        found = NOWHERE.repeat(value.shape)
        found[around] = inner & constant[around]
        return shrunk(found)

    def constant(self, data: Tensor) -> Operand:
        """A constant of the rule's own, to be read like the network's."""
        value = self.graph.add(Value("constant", tuple(data.shape), data.contiguous()))
        return Operand(self.graph, value.shape, map=Map.identity(value))

    def once(self, key: Any, times: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """What is computed of these times, once for all operations of the same key that are given the same tensor."""
        key = key, id(times)
        if key not in self._known:
            self._known[key] = times, compute(times)  # held, so that no other tensor takes its identity
        return self._known[key][1]

    def falling(self, size: int) -> Operand:
        """A constant that holds the numbers size, ..., 2, 1."""
        if size not in self._falling:
            self._falling[size] = self.constant(torch.arange(size, 0, -1, dtype=torch.float32))
        return self._falling[size]

    def data(self, operand: Operand) -> Tensor:
        return self.graph.data_of(operand)


def _around(places: Tensor) -> tuple[slice, ...]:
    """The least box that holds all that are true; whole along dimensions of size 1, which may stand for more."""
    where = np.argwhere(places.numpy())
    ends = zip(places.shape, where.min(0), where.max(0), strict=True)
    return tuple(slice(None) if size == 1 else slice(first, last + 1) for size, first, last in ends)


def coarser(ready: Tensor, draws: int) -> Tensor:
    """Ready times in an order in which so many draws that follow each other are one."""
    return ready if draws == 1 else torch.where(ready < 0, ready, ready.div(draws, rounding_mode="floor"))


class Rule(ABC):
    """One operation of the network. Subclasses say what depends on what, and compute parts of the result.

    Attributes:
        keeps_state: whether elements of the value are read to compute others of it.
        sees_zeros: whether constants that are zero change what depends on what.
        channels: the dimension of the value that products read along; None where that is the plan's affair.
    """

    keeps_state = False
    sees_zeros = True
    channels: int | None = None

    def __init__(self, value: Value, analysis: Analysis) -> None:
        self.value = value
        self.analysis = analysis
        self._hides: dict[Operand, Operand] = {}

    @abstractmethod
    def ready(self) -> tuple[Tensor, Tensor | None]:
        """Ready times of the value's elements, and which of them are low, where the rule knows."""

    def needed_within(self, latest: Tensor) -> Tensor:
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

    def seen(self, builder: "Builder", operand: Operand, region: "Region", hidden: Tensor | None) -> "View":
        """A region of an operand, -inf where it is `hidden`: what lies there may not have been computed."""
        found = builder.read(operand, region)
        if hidden is None:
            return found
        if operand not in self._hides:
            self._hides[operand] = self.analysis.constant(hidden.float())
        target = builder.scratch(found.sizes, found.memory.dtype)
        builder.pointwise("hide", target, found, builder.broadcast(self._hides[operand], region))
        return target

    def fixed(self, boxes: "Box | Boxes") -> Sequence[Any]:
        """What besides the sizes of a box its program depends on: numbers, or (boxes,) of many at once."""
        return ()

    @abstractmethod
    def emit(self, builder: "Builder", box: "Box") -> None:
        """Writes the computation of the box."""

    @property
    def multiply_adds(self) -> float:
        """Of one element of the value, with dense kernels."""
        return 0


def cut(found: Tensor, dim: int, start: int, size: int, step: int) -> Tensor:
    """Part of a result (n, ...) along one dimension of the images."""
    return found[(slice(None),) * (dim + 1) + (slice(start, start + (size - 1) * step + 1, step),)]


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

    def result(*args: Any, **kwargs: Any) -> Tensor:
        return op(*args, **kwargs)[output]

    result.__qualname__ = op._schema.name  # by which it is told that the machines do not know it
    return result


def reduce_to(times: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The least over the dimensions along which a tensor of this shape was broadcast."""
    if times.shape == shape:
        return times
    times = compact(times)
    extra = times.dim() - len(shape)
    dims = [*range(extra), *(d + extra for d, size in enumerate(shape) if size == 1 and times.shape[d + extra] > 1)]
    times = times.amin(dims, keepdim=True) if dims else times
    return times[(0,) * extra].expand(shape)


def reduced(times: Tensor, dims: Sequence[int], reduce: Callable[..., Tensor]) -> Tensor:
    """amax or amin over some dimensions, kept with size 1; expanded along the others where `times` is. Of no times the
    greatest is CONSTANT, the least NEVER."""
    if not dims:
        return times
    shape = [1 if d in dims else size for d, size in enumerate(times.shape)]
    if times.numel() == 0:
        return torch.full((), CONSTANT if reduce is torch.amax else NEVER, dtype=torch.int32).expand(shape)
    return reduce(compact(times), tuple(dims), keepdim=True).expand(shape)


def groups_of(rows: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Equal rows: (numbers of the rows, the row) each."""
    kinds, inverse = kinds_of(rows)
    members = [torch.nonzero(inverse == k).flatten() for k in range(kinds)]
    return [(numbers, rows[numbers[0]]) for numbers in members]


def never(shape: Any) -> Tensor:
    return torch.full((), NEVER, dtype=torch.int32).expand(tuple(shape))
