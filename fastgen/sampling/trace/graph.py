"""The traced network of one image: values that are computed, and where every operand takes its elements from.

Data movement is never a step of its own. A `Value` is the result of a computation (or an input, or a constant); an
`Operand` says, element by element, which value it reads: by an affine `Map` (slices, permutations, padding, shifts) or,
where no such map exists, by a tensor of element numbers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

CONSTANT = -2  # ready time of what depends on no input at all
READY = -1  # ready time of what depends on no pixel (but maybe on the condition)
NEVER = 2**30  # time of what nobody needs


class Unsupported(Exception):
    """This model cannot be taken by the engine; the text says why.

    Attributes:
        graph: of one image by itself, where an image depends on others of its batch.
    """

    def __init__(self, message: str, graph: "Graph | None" = None) -> None:
        super().__init__(message)
        self.graph = graph


class RandomNumbers(Unsupported):
    """The model draws random numbers in its forward pass."""


@cache
def name_of(op: Any) -> str:
    return op._schema.name.split("::")[1]


@dataclass(eq=False)
class Value:
    """One tensor of the network that is computed, given or constant.

    Attributes:
        kind: "levels", "condition", "constant", "computed", or "random", on which no output may depend.
        shape: of one image, with the leading 1 of its batch where the model has it.
        data: the tensor of the traced run, contiguous.
        op, args, kwargs: the ATen operator and its arguments; tensors among them are `Operand`s.
        output: which output of the operator this is.
        module: qualified name of the module whose forward computed it.
        base: number of its first element; elements are numbered in row-major order. 0 for a constant none of whose
            elements is moved one by one, which has no numbers.
    """

    kind: str
    shape: tuple[int, ...]
    data: Tensor
    op: Any = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    output: int = 0
    module: str = ""
    index: int = -1
    base: int = 0

    @property
    def numel(self) -> int:
        return self.data.numel()

    @property
    def op_name(self) -> str:
        """Of the operator, without its library and overload."""
        return name_of(self.op)

    @property
    def name(self) -> str:
        if self.op is None:
            return self.kind
        op = str(self.op).split(".")[1]
        return f"{op} in {self.module}" if self.module else op

    @property
    def operands(self) -> list["Operand"]:
        found: list[Operand] = []
        for argument in (*self.args, *self.kwargs.values()):
            for one in argument if isinstance(argument, (list, tuple)) else (argument,):
                if isinstance(one, Operand):
                    found.append(one)
        return found

    def compute(self, *tensors: Tensor) -> Tensor:
        """The value of one image from the tensors of its `operands`, in their order."""
        given = dict(zip(map(id, self.operands), tensors, strict=True))
        args, kwargs = (map_arguments(one, lambda operand: given[id(operand)]) for one in (self.args, self.kwargs))
        found = self.op(*args, **kwargs)
        return found[self.output] if isinstance(found, (tuple, list)) else found


@cache
def _own_steps(rank: int) -> tuple[tuple[int, ...], ...]:
    """Of a map that reads each element in its own place."""
    return tuple(tuple(int(k == d) for k in range(rank)) for d in range(rank))


@dataclass(frozen=True)
class Map:
    """Element i of an operand is the element start + sum_d i_d * steps[d] of a value; outside of it stand zeros."""

    value: Value
    shape: tuple[int, ...]
    start: tuple[int, ...]
    steps: tuple[tuple[int, ...], ...]

    @staticmethod
    def identity(value: Value) -> "Map":
        rank = len(value.shape)
        return Map(value, value.shape, (0,) * rank, _own_steps(rank))

    @cached_property
    def is_identity(self) -> bool:
        rank = len(self.value.shape)
        return self.shape == self.value.shape and self.steps == _own_steps(rank) and not any(self.start)

    @cached_property
    def along(self) -> list[list[tuple[int, int]]]:
        """For each dimension of the value, those of the operand that step along it, and by how much."""
        return [[(d, step[k]) for d, step in enumerate(self.steps) if step[k]] for k in range(len(self.start))]

    def within(self, shape: tuple[int, ...], start: Sequence[int], steps: Sequence[Sequence[int]]) -> "Map":
        """The map of a view: its element i is the element start + sum_d i_d * steps[d] of this operand."""

        def along(coordinates: Sequence[int]) -> tuple[int, ...]:
            return tuple(sum(c * step[k] for c, step in zip(coordinates, self.steps, strict=True)) for k in ranks)

        ranks = range(len(self.start))
        first = tuple(a + b for a, b in zip(self.start, along(start), strict=True))
        return Map(self.value, shape, first, tuple(along(step) for step in steps))

    @cached_property
    def bounds(self) -> list[tuple[int, int]]:
        """The least and the greatest coordinate along each dimension of the value."""
        found = []
        for low, along in zip(self.start, self.along, strict=True):
            reach = [step * (self.shape[d] - 1) for d, step in along]
            found.append((low + sum(min(r, 0) for r in reach), low + sum(max(r, 0) for r in reach)))
        return found

    @property
    def padded(self) -> bool:
        return any(low < 0 or high >= size for (low, high), size in zip(self.bounds, self.value.shape, strict=True))

    def pad(self, before: Sequence[int], after: Sequence[int]) -> "Map | None":
        """More zeros around (fewer elements where negative); None where not zeros but elements lie there."""
        start = list(self.start)
        shape = list(self.shape)
        for d, (low, high) in enumerate(zip(before, after, strict=True)):
            if low > 0 or high > 0:
                along = [k for k, step in enumerate(self.steps[d]) if step]
                if not self._may_pad(d, along, low, high):
                    return None
            for k, step in enumerate(self.steps[d]):
                start[k] -= low * step
            shape[d] += low + high
        if any(size < 0 for size in shape):
            return None
        return Map(self.value, tuple(shape), tuple(start), self.steps)

    def _may_pad(self, d: int, along: list[int], low: int, high: int) -> bool:
        if len(along) != 1 or self.steps[d][along[0]] < 0:
            return False
        k, step = along[0], self.steps[d][along[0]]
        if any(other[k] for e, other in enumerate(self.steps) if e != d and self.shape[e] > 1):
            return False
        first, last = self.start[k], self.start[k] + step * (self.shape[d] - 1)
        return (low <= 0 or first - step < 0) and (high <= 0 or last + step >= self.value.shape[k])

    def read(self, source: Tensor, fill: int) -> Tensor:
        """The operand's view of a tensor of the value's shape, `fill` standing for the zeros around."""
        if self.is_identity:
            return source
        shape, bounds = self.value.shape, self.bounds
        lows = [max(0, -low) for low, _ in bounds]
        highs = [max(0, high - size + 1) for (_, high), size in zip(bounds, shape, strict=True)]
        if any(lows) or any(highs):
            room = [lo + size + hi for lo, size, hi in zip(lows, shape, highs, strict=True)]
            kept = [t == 0 and size == r for t, size, r in zip(source.stride(), shape, room, strict=True)]
            inner = source[tuple(slice(0, 1) if k else slice(None) for k in kept)]
            wide = source.new_full([1 if k else r for k, r in zip(kept, room, strict=True)], fill)
            wide[tuple(slice(lo, lo + size) for lo, size in zip(lows, inner.shape, strict=True))] = inner
            source = wide.expand(room)
        strides = source.stride()
        offset = source.storage_offset() + sum((s + lo) * t for s, lo, t in zip(self.start, lows, strides, strict=True))
        steps = [sum(k * t for k, t in zip(step, strides, strict=True)) for step in self.steps]
        return source.as_strided(self.shape, steps, offset)


@dataclass(frozen=True, eq=False)
class Operand:
    """What an operation reads: by `map`, or by `ids`, the numbers of elements (0 stands for a zero)."""

    graph: "Graph"
    shape: tuple[int, ...]
    map: Map | None = None
    ids: Tensor | None = None

    def element_ids(self) -> Tensor:
        if self.ids is not None:
            return self.ids
        assert self.map is not None
        value = self.map.value
        base = self.graph.number(value)
        return self.map.read(torch.arange(base, base + value.numel).view(value.shape), 0)

    @cached_property
    def parts(self) -> list[tuple[Value, Tensor, Tensor]]:
        """Of ids: for each value the places in the operand, and the elements of the value that lie there."""
        assert self.ids is not None
        flat = self.ids.reshape(-1)
        found = []
        for value in self.values:
            places = torch.nonzero((flat >= value.base) & (flat < value.base + value.numel)).flatten()
            found.append((value, places, flat[places] - value.base))
        return found

    def read(self, of: Callable[[Value], Tensor], fill: Any, dtype: torch.dtype | None = None) -> Tensor:
        """The operand's view of a quantity `of` each value, `fill` standing for zeros around."""
        if self.map is not None:
            return self.map.read(of(self.map.value), fill)
        parts = [(places, of(value).reshape(-1)[numbers]) for value, places, numbers in self.parts]
        dtype = dtype or (parts[0][1].dtype if parts else torch.float32)
        found = torch.full((self.numel,), fill, dtype=dtype)
        for places, elements in parts:
            found[places] = elements.to(dtype)
        return found.view(self.shape)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        if self.map is None and not self.values:
            return torch.float32  # zeros alone, as in `read`
        return (self.map.value if self.map is not None else self.values[-1]).data.dtype

    @cached_property
    def values(self) -> list[Value]:
        if self.map is not None:
            return [self.map.value]
        assert self.ids is not None
        return self.graph.values_of(self.ids)


@dataclass(eq=False)
class Graph:
    """All values of the network in the order in which they were computed, and its output."""

    values: list[Value] = field(default_factory=list)
    numbered: list[Value] = field(default_factory=list)
    output: Operand = field(init=False)
    result: Tensor = field(init=False)  # the output of the traced run
    numel: int = 1  # element 0 is the zero outside of images
    remarks: list[str] = field(default_factory=list)
    reads: list[bool | int | float] = field(default_factory=list)  # that depend on the input, by the model's own code
    _bases: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long), init=False, repr=False)

    def add(self, value: Value) -> Value:
        value.index = len(self.values)
        self.values.append(value)
        if value.kind != "constant":
            self.number(value)
        return value

    def number(self, value: Value) -> int:
        """Number of the value's first element."""
        if value.base == 0:
            value.base = self.numel
            self.numel += value.numel
            self.numbered.append(value)
        return value.base

    def whole(self, value: Value) -> Operand:
        return Operand(self, value.shape, map=Map.identity(value))

    def zero(self, dtype: torch.dtype) -> Value:
        """A constant that holds one zero, element 0."""
        for value in self.values:
            fits = value.kind == "constant" and value.shape == (1,) and value.base == 0 and value.data.dtype == dtype
            if fits and value.data[0] == 0:
                return value
        return self.add(Value("constant", (1,), torch.zeros(1, dtype=dtype)))

    def leave_out_unused(self) -> None:
        """Only what the output depends on stays, and what is given. Raises RandomNumbers where that is random."""
        used, pending = set(), [*self.output.values]
        while pending:
            value = pending.pop()
            if value not in used:
                used.add(value)
                pending += [source for operand in value.operands for source in operand.values]
        for value in used:
            if value.kind == "random":
                where = f" in module {value.module!r}" if value.module else ""
                raise RandomNumbers(f"{value.op_name} draws random numbers{where}")
        self.values = [one for one in self.values if one in used or one.kind not in ("computed", "random")]
        for number, value in enumerate(self.values):
            value.index = number

    def values_of(self, ids: Tensor) -> list[Value]:
        if len(self._bases) < len(self.numbered):
            self._bases = torch.tensor([value.base for value in self.numbered])
        numbers = torch.searchsorted(self._bases, ids.reshape(-1).unique(), right=True) - 1
        return [self.numbered[k] for k in numbers.unique().tolist() if k >= 0]

    def data_of(self, operand: Operand) -> Tensor:
        """The operand's elements in the traced run."""
        return operand.read(lambda value: value.data, 0)


def coordinates(numbers: Tensor, shape: Sequence[int]) -> Tensor:
    """Of elements by their numbers in row-major order, (..., dimensions). `torch.unravel_index` imports sympy first."""
    found: list[Tensor] = []
    for size in reversed(shape):
        found.insert(0, numbers % size)
        numbers = numbers // size
    return torch.stack(found, -1) if found else numbers.new_zeros((*numbers.shape, 0))


def map_arguments(arguments: Any, change: Callable[[Any], Any], kind: type = Operand) -> Any:
    """The same arguments with every operand, or whatever is of that kind, changed, inside lists too."""
    if isinstance(arguments, kind):
        return change(arguments)
    if isinstance(arguments, (list, tuple)):
        return type(arguments)([map_arguments(one, change, kind) for one in arguments])
    if isinstance(arguments, dict):
        return {key: map_arguments(one, change, kind) for key, one in arguments.items()}
    return arguments
