"""Times of elements, kept as small as they are the same along a dimension: `ElementTimes`.

The draw indices of two channels of 3x3 pixels that are drawn together are nine numbers, expanded to (1, 2, 3, 3) with
stride 0. What rules compute from such times they compute from the nine numbers (`compact`) and expand again, so that a
network of many channels costs no more to analyse than one of few.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastgen.sampling.trace.graph import Map, Operand, Value


class ElementTimes:
    """A time for each element of each value, expanded where it is the same along a dimension.

    Args:
        fill: the time of all elements of values that have been given none.
    """

    def __init__(self, fill: int) -> None:
        self._fill = torch.tensor(fill, dtype=torch.int32)
        self._known: dict[Value, Tensor] = {}

    def of(self, value: Value) -> Tensor:
        return self._known[value] if value in self._known else self._fill.expand(value.shape)

    def set(self, value: Value, times: Tensor) -> None:
        self._known[value] = times if times.shape == value.shape else times.expand(value.shape)

    def change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Changes each time by itself."""
        self._known = {value: change(compact(times)).expand(value.shape) for value, times in self._known.items()}

    def read(self, operand: Operand, fill: int) -> Tensor:
        return operand.read(self.of, fill, torch.int32)

    def scatter_min(self, operand: Operand, wanted: Tensor) -> None:
        """times = min(times, wanted) at the elements of computed values that the operand reads; NEVER where nothing has
        been wanted yet."""
        wanted = wanted if wanted.shape == operand.shape else wanted.expand(operand.shape)
        if operand.map is not None:
            value = operand.map.value
            if value.kind == "computed" and value not in self._known and operand.map.is_identity:
                self.set(value, wanted)
            elif value.kind == "computed":
                self.set(value, scatter_min(operand.map, self.of(value), wanted))
            return
        for value, places, numbers in operand.parts:
            if value.kind == "computed":
                flat = self.of(value).reshape(-1).clone()
                flat.scatter_reduce_(0, numbers, wanted.reshape(-1)[places], "amin")
                self.set(value, flat.view(value.shape))


class Distinct:
    """One tensor for all times that are equal: most operations of a network are done at a few sets of times."""

    def __init__(self) -> None:
        self._by_contents: dict[bytes, Tensor] = {}
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}  # by identity: what was given, and what was found

    def shrunk(self, times: Tensor) -> Tensor:
        """Those times, expanded along each dimension along which they are the same."""
        if id(times) not in self._seen:
            found = shrunk(times)
            core = compact(found).contiguous()
            key = bytes(str((tuple(found.shape), tuple(core.shape))), "ascii") + core.numpy().tobytes()
            found = self._by_contents.setdefault(key, found)
            self._seen[id(times)] = self._seen[id(found)] = times, found
        return self._seen[id(times)][1]


def compact(tensor: Tensor) -> Tensor:
    """The tensor with size 1 along all dimensions along which it is expanded (has stride 0), to be broadcast."""
    if 0 not in tensor.stride():
        return tensor
    return tensor[tuple(slice(0, 1) if t == 0 else slice(None) for t in tensor.stride())]


def shrunk(tensor: Tensor) -> Tensor:
    """The tensor, expanded along each dimension along which its elements are the same."""
    shape, tensor = tensor.shape, compact(tensor)
    numbers = tensor.numpy()  # which compares faster
    for d in range(numbers.ndim):
        if numbers.shape[d] > 1 and (numbers == (first := numbers.take([0], d))).all():
            numbers, tensor = first, tensor.narrow(d, 0, 1)
    return tensor.expand(shape)


def kinds_of(rows: Tensor) -> tuple[int, Tensor]:
    """How many kinds of rows there are, and which one each is."""
    if rows.stride(0) == 0:
        return 1, torch.zeros(len(rows), dtype=torch.long)
    flat = compact(rows).reshape(len(rows), -1)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(-(2**40), 2**40, (flat.shape[1],), generator=generator)
    kinds, inverse = (flat.long() * weights).sum(1).unique(return_inverse=True)
    return len(kinds), inverse


def _minimum(target: Tensor, wanted: Tensor, region: Sequence[slice]) -> Tensor:
    """The target with min(target, wanted) in a region of it."""
    shape = target.shape
    target, wanted = compact(target), compact(wanted)
    sizes = [len(range(*one.indices(size))) for one, size in zip(region, shape, strict=True)]
    whole = [n == size for n, size in zip(sizes, shape, strict=True)]
    if all(whole):
        return torch.minimum(target, wanted).expand(shape)
    grown = [1 if w and target.shape[k] == wanted.shape[k] == 1 else shape[k] for k, w in enumerate(whole)]
    target = target.expand(grown).clone(memory_format=torch.contiguous_format)
    inner = target[tuple(slice(None) if w else one for w, one in zip(whole, region, strict=True))]
    inner.copy_(torch.minimum(inner, wanted))
    return target.expand(shape)


def scatter_min(where: Map, target: Tensor, wanted: Tensor) -> Tensor:
    """min(target, wanted) of the value's shape, each element of `wanted` at the element of the value it reads."""
    shape = list(where.shape)
    for d in range(len(shape)):  # several elements that read one: the least of them
        if shape[d] > 1 and not any(where.steps[d]):
            shape[d] = 1
            wanted = compact(wanted).amin(d, keepdim=True).expand(shape)
    if 0 in shape:
        return target
    narrowed = Map(where.value, tuple(shape), where.start, where.steps)
    along = _dimension_of_each(narrowed)
    if along is None:
        ids = narrowed.read(torch.arange(1, target.numel() + 1).view(where.value.shape), 0)
        flat = torch.cat((target.new_zeros(1), target.reshape(-1)))
        flat.scatter_reduce_(0, ids.reshape(-1), wanted.reshape(-1), "amin")
        return flat[1:].view(target.shape)
    region = []
    for k, by in enumerate(along):
        first, size = where.start[k], where.value.shape[k]
        step = 1 if by is None else where.steps[by][k]
        low = max(0, -(first // step))  # elements before `low` and from `high` on read zeros around the value
        high = min(1 if by is None else shape[by], (size - 1 - first) // step + 1)
        if low >= high:
            return target
        if by is not None and (low > 0 or high < shape[by]):
            wanted = wanted.narrow(by, low, high - low)
        begin = first + low * step
        region.append(slice(begin, begin + (high - low - 1) * step + 1, step))
    moved = [one for one in along if one is not None]
    wanted = wanted.permute([*moved, *(k for k in range(len(shape)) if k not in moved)])  # the rest have size 1
    wanted = wanted[(slice(None),) * len(moved) + (0,) * (len(shape) - len(moved))]
    return _minimum(target, wanted[tuple(None if one is None else slice(None) for one in along)], region)


def _dimension_of_each(where: Map) -> list[int | None] | None:
    """For each dimension of the value the one of the operand that steps along it; None where two do, or one steps
    along two, or backwards."""
    found: list[int | None] = [None] * len(where.start)
    for d, (size, step) in enumerate(zip(where.shape, where.steps, strict=True)):
        along = [k for k, s in enumerate(step) if s] if size > 1 else []
        if len(along) > 1 or any(found[k] is not None or step[k] < 0 for k in along):
            return None
        for k in along:
            found[k] = d
    return found
