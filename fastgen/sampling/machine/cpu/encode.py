"""Translates the instructions of a step program into those of the machine, as far as it knows them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from fastgen.sampling.plan.program import Instruction, Linear, Memory, View
from fastgen.sampling.rules.kernels import Slab
from fastgen.sampling.rules.matmul import linear
from fastgen.sampling.rules.out_variants import relu

# Functions of one operand, and of two, which may be numbers; named as the machine and torch name them.
UNARY = {"neg", "tanh", "sigmoid", "exp", "expm1", "silu", "square", "abs", "sqrt", "reciprocal"}
BINARY = {"add", "sub", "mul", "div"}


class Unknown(Exception):
    """The machine has no such instruction."""


@dataclass(frozen=True)
class Side:
    """What an instruction reads or writes: a part of what a view shows, without the images; columns come last."""

    view: View
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    extra: int = 0  # from the view's own first element to the first of the part

    @staticmethod
    def of(view: View, sizes: Sequence[int] | None = None) -> "Side":
        """All that the view shows, broadcast to these sizes."""
        if sizes is not None:
            if len(view.sizes) > len(sizes):
                raise Unknown
            expanded = view.expand(sizes)
            return Side(view, expanded.sizes, expanded.strides)
        return Side(view, view.sizes, view.strides)


@dataclass(frozen=True)
class Part:
    """One instruction of the machine. All sides have the sizes of the result.

    A product's first operand has stride 0 along the columns, and `weight` (depth, columns) takes the second's place.
    """

    op: str
    out: Side
    inputs: tuple[Side | float | None, ...]
    weight: Tensor | None = None


def translate(instruction: Instruction) -> list[Part]:
    """Raises Unknown."""
    function, args, out = instruction.function, instruction.args, instruction.kwargs.get("out")
    if instruction.result is not None or set(instruction.kwargs) - {"out"}:
        raise Unknown
    if function is Tensor.copy_:
        found = [_copy(*args)]
    elif not isinstance(out, View):
        raise Unknown
    elif function in (torch.mm, torch.addmm):
        added, rows, weight = (None, *args) if function is torch.mm else args
        found = [_product(Side.of(out), Side.of(rows), weight, added)]
    elif function is linear:
        x, weight, bias = args
        found = [_product(Side.of(out), Side.of(x), weight, bias)]
    elif isinstance(function, Slab):
        found = _slab(function, out, *args)
    else:
        found = [_pointwise(function, args, out)]
    for part in found:
        _check(part)
    return found


def _copy(target: Any, source: Any) -> Part:
    if not isinstance(target, View) or not isinstance(source, View):
        raise Unknown
    op = "copy_int64" if source.memory.dtype == torch.int64 else "copy_"
    return Part(op, Side.of(target), (Side.of(source, target.sizes),))


def _pointwise(function: Any, args: tuple[Any, ...], out: View) -> Part:
    name = function._schema.name.split("::")[1] if hasattr(function, "_schema") else function.__name__
    if function is relu or (name == "clamp_min" and args[1:] == (0,)):
        name, args = "relu", args[:1]
    elif name == "pow" and args[1:] == (2,):
        name, args = "square", args[:1]
    elif name == "elu" and set(args[2:]) <= {1}:
        args = (args[0], args[1] if len(args) > 1 else 1.0)
    elif name == "leaky_relu":
        args = (args[0], args[1] if len(args) > 1 else 0.01)
    elif len(args) != (1 if name in UNARY else 2 if name in BINARY else -1):
        raise Unknown
    inputs: list[Side | float] = []
    for one in args:
        if isinstance(one, View):
            inputs.append(Side.of(one, out.sizes))
        elif isinstance(one, (int, float)) or (isinstance(one, Tensor) and one.dim() == 0):
            inputs.append(float(one))
        else:
            raise Unknown
    return Part(name, Side.of(out), tuple(inputs))


def _product(out: Side, rows: Side, weight: Any, added: Any) -> Part:
    """out (..., N) = rows (..., K) @ weight (K, N) + added, which broadcasts to the result."""
    if not isinstance(weight, Tensor) or weight.dtype != torch.float32 or rows.strides[-1] not in (0, 1):
        raise Unknown
    if (rows.strides[-1] == 0 and len(weight) > 1) or len(rows.sizes) != len(out.sizes):
        raise Unknown
    shared = Side(rows.view, out.sizes, (*rows.strides[:-1], 0), rows.extra)
    if isinstance(added, View):
        added = Side.of(added, out.sizes)
    elif isinstance(added, Tensor):
        added = _vector(added, out.sizes)
    return Part("linear", out, (shared, added), weight)


def _vector(bias: Tensor, sizes: Sequence[int]) -> Side:
    """A constant along the columns."""
    if bias.dim() != 1 or bias.dtype != torch.float32:
        raise Unknown
    return Side.of(constant_view(bias), sizes)


def _slab(call: Slab, out: View, x: View, weight: Tensor, added: Any) -> list[Part]:
    """A convolution as products: one for every tap, or for taps that lie side by side with all of their channels."""
    if call.groups != 1 or weight.dtype != torch.float32:
        raise Unknown
    rank = len(call.stride)
    order = [0, *range(2, 2 + rank), 1]
    target, seen = Side.of(out.order(order)), x.order(order)
    target = replace(target, view=out)
    if isinstance(added, View):
        added = replace(Side.of(added.order(order)), view=added)
    channels, kernel = weight.shape[1], weight.shape[2:]
    together = channels > 1 or kernel[-1] > 1
    together = together and seen.strides[-1] in (0, 1) and seen.strides[-2] * call.dilation[-1] == channels
    if not together and channels > 1 and seen.strides[-1] != 1:
        raise Unknown
    along = kernel[:-1] if together else kernel
    parts: list[Part] = []
    for tap in product(*map(range, along)):
        extra = sum(k * d * s for k, d, s in zip(tap, call.dilation, seen.strides[1:], strict=False))
        index: Any = (slice(None), slice(None), *tap)
        of_tap = weight[index]  # (O, I), or (O, I, kw)
        matrix = of_tap.flatten(1).mT if not together else of_tap.permute(2, 1, 0).flatten(0, 1)
        steps = (seen.strides[0], *(s * step for s, step in zip(seen.strides[1:], call.stride, strict=False)), 1)
        rows = Side(x, (*target.sizes[:-1], len(matrix)), steps, extra)
        part = _product(target, rows, matrix.contiguous(), added)
        parts.append(replace(part, inputs=(part.inputs[0], target)) if parts else part)
    return parts


def constant_view(data: Tensor) -> View:
    """A constant that no step moves."""
    return View(Memory("constant", data.numel(), data.dtype, data), (data.numel(),), (1,), Linear(0), 0)


def _check(part: Part) -> None:
    """Raises Unknown for other numbers than float32, and for more dimensions than the machine has."""
    for side in (part.out, *part.inputs):
        if isinstance(side, Side):
            wanted = torch.int64 if part.op == "copy_int64" and side is not part.out else torch.float32
            if side.view.memory.dtype != wanted:
                raise Unknown
    if part.op == "linear":
        sides = [side for side in (part.out, part.inputs[1]) if isinstance(side, Side)]
        if any(side.strides[-1] != 1 for side in sides if side.sizes[-1] > 1):
            raise Unknown
    if len(collapsed(part)[0]) > 4:
        raise Unknown


def collapsed(part: Part) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Sizes of the result with the least dimensions, columns last, and strides of all sides along them."""
    sides = [side for side in (part.out, *part.inputs) if isinstance(side, Side)]
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in sides]
    last = len(part.out.sizes) - 1
    for d, size in enumerate(part.out.sizes):
        if size == 1 and d != last:
            continue
        here = [side.strides[d] if size > 1 else 0 for side in sides]
        # Columns stay by themselves, so that all parts that compute a map share it among threads in one way.
        mergeable = sizes and d != last
        if mergeable and all(old[-1] == size * new for old, new in zip(strides, here, strict=True)):
            sizes[-1] *= size
            for old, new in zip(strides, here, strict=True):
                old[-1] = new
        else:
            sizes.append(size)
            for old, new in zip(strides, here, strict=True):
                old.append(new)
    if not sizes:
        sizes, strides = [1], [[0] for _ in sides]
    assert math.prod(sizes) == math.prod(part.out.sizes)
    return tuple(sizes), [tuple(one) for one in strides]
