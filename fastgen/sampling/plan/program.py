"""Programs: the instructions of one step, with views of memory that move from step to step.

A program is made once for all steps that compute boxes of the same sizes. All memory is allocated before it runs, so
that a step is a list of operators with `out=`, whose only new tensors are views at the offsets of that step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgen.sampling.plan.layout import dense_strides


@dataclass(frozen=True)
class Linear:
    """const + sum_d coefficients[d] * start[d], where start is that of the box of a task."""

    const: int | Fraction
    coefficients: tuple[int | Fraction, ...] = ()

    def __add__(self, other: "Linear | int") -> "Linear":
        if not isinstance(other, Linear):
            return Linear(self.const + other, self.coefficients)
        ours, theirs = self.coefficients, other.coefficients
        length = max(len(ours), len(theirs))
        ours, theirs = ours + (0,) * (length - len(ours)), theirs + (0,) * (length - len(theirs))
        return Linear(self.const + other.const, tuple(a + b for a, b in zip(ours, theirs, strict=True)))

    def __mul__(self, factor: int | Fraction) -> "Linear":
        return Linear(self.const * factor, tuple(factor * c for c in self.coefficients))

    def at(self, start: Sequence[int]) -> int:
        found = self.const + sum(c * s for c, s in zip(self.coefficients, start, strict=False))
        assert found == int(found)
        return int(found)

    def over(self, starts: np.ndarray) -> np.ndarray:
        """At many starts (steps, dimensions)."""
        used = np.array([float(c) for c in self.coefficients])
        return np.rint(float(self.const) + starts[:, : len(used)] @ used).astype(np.int64)


@dataclass(frozen=True, eq=False)
class Memory:
    """A block of memory for each image: "stored" (of a value), "scratch" (of a program), or "constant" (for all)."""

    kind: str
    numel: int
    dtype: torch.dtype
    data: Tensor | None = None


@dataclass(frozen=True)
class View:
    """Part of a memory block: sizes and strides without the images' own; where it begins in a step of a task.

    `listed` takes the place of the offset where no formula gives it: position of the offset in the payload of a step.
    """

    memory: Memory
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: Linear
    task: int
    listed: int | None = None

    @property
    def moves(self) -> bool:
        return self.listed is not None or any(self.offset.coefficients)

    def order(self, dims: Sequence[int]) -> "View":
        """The view with these of its dimensions, in this order; those left out have size 1."""
        return replace(self, sizes=tuple(self.sizes[d] for d in dims), strides=tuple(self.strides[d] for d in dims))

    def expand(self, sizes: Sequence[int]) -> "View":
        """Broadcast to more dimensions in front, and along those of size 1."""
        extra = len(sizes) - len(self.sizes)
        have, strides = (1,) * extra + self.sizes, (0,) * extra + self.strides
        return replace(
            self,
            sizes=tuple(sizes),
            strides=tuple(0 if old != new else stride for old, new, stride in zip(have, sizes, strides, strict=True)),
        )

    def narrow(self, dim: int, start: int, size: int, step: int = 1) -> "View":
        sizes, strides = list(self.sizes), list(self.strides)
        sizes[dim], strides[dim] = size, strides[dim] * step
        moved = self.offset + start * self.strides[dim]
        return replace(self, sizes=tuple(sizes), strides=tuple(strides), offset=moved)

    def unsqueeze(self, dim: int) -> "View":
        sizes, strides = list(self.sizes), list(self.strides)
        sizes.insert(dim, 1)
        strides.insert(dim, 0)
        return replace(self, sizes=tuple(sizes), strides=tuple(strides))

    def collapse(self) -> "View":
        """With neighbouring dimensions as one where they lie in memory as one, and without those of size 1."""
        sizes: list[int] = []
        strides: list[int] = []
        for size, stride in zip(self.sizes, self.strides, strict=True):
            if size == 1:
                continue
            if sizes and strides[-1] == size * stride:
                sizes[-1], strides[-1] = sizes[-1] * size, stride
            else:
                sizes.append(size)
                strides.append(stride)
        return replace(self, sizes=tuple(sizes), strides=tuple(strides))

    @property
    def numel(self) -> int:
        return torch.Size(self.sizes).numel()


@dataclass(frozen=True)
class Temporary:
    """The result of an instruction that makes a tensor of its own."""

    number: int


@dataclass
class Instruction:
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Temporary | None

    def views(self) -> list[View]:
        return [one for one in _leaves((self.args, self.kwargs)) if isinstance(one, View)]


@dataclass
class Check:
    """Where a box must lie relative to another of the same step: linear(of task) == start[dim] of other + distance."""

    linear: Linear
    task: int
    other: int
    dim: int
    distance: int


@dataclass
class Program:
    """The instructions of a step; `key` tells which steps it serves."""

    instructions: list[Instruction] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    temporaries: int = 0

    def views(self) -> list[View]:
        """Those that move, each once, in the order of their first use."""
        found: dict[View, None] = {}
        for instruction in self.instructions:
            for view in instruction.views():
                if view.moves:
                    found.setdefault(view)
        return list(found)

    def offsets(self, starts: list[np.ndarray], payloads: list[list[Any]]) -> list[list[Any]]:
        """For every step it serves, the offsets of its moving views.

        Args:
            starts: task -> (steps, dimensions), the starts of its boxes.
            payloads: step -> what `listed` points into.
        """
        columns = []
        for view in self.views():
            if view.listed is not None:
                columns.append([payload[view.listed] + view.offset.at(()) for payload in payloads])
            else:
                columns.append(view.offset.over(starts[view.task]).tolist())
        rows = zip(*columns, strict=True) if columns else [()] * len(payloads)
        return [[*row, *payload] for row, payload in zip(rows, payloads, strict=True)]

    def source(self, instructions: Sequence[Instruction] | None = None) -> tuple[str, dict[str, Any]]:
        """Python source of a function of the offsets that runs the instructions (all of them where None), and the
        names in it that stand for functions and views.
        """
        names: dict[str, Any] = {}
        lines = ["def run(o):"]
        moving = {view: k for k, view in enumerate(self.views())}
        made: set[View] = set()
        static: dict[View, str] = {}
        functions: dict[Any, str] = {}

        def text(argument: Any) -> str:
            if isinstance(argument, View):
                if argument.moves:
                    return f"v{moving[argument]}"
                if argument not in static:
                    static[argument] = f"s{len(static)}"
                    names[static[argument]] = argument
                return static[argument]
            if isinstance(argument, Temporary):
                return f"t{argument.number}"
            if isinstance(argument, Listed):
                return f"o[{len(moving) + argument.number}]"
            if isinstance(argument, (list, tuple)):
                inner = ", ".join(text(one) for one in argument)
                return f"[{inner}]" if isinstance(argument, list) else f"({inner},)"
            if argument is None or isinstance(argument, (bool, int, str)):
                return repr(argument)
            name = f"c{len(names)}"
            names[name] = argument
            return name

        for instruction in self.instructions if instructions is None else instructions:
            for view in instruction.views():
                if view.moves and view not in made:
                    made.add(view)
                    k = moving[view]
                    names[f"m{k}"] = view
                    lines.append(f"    v{k} = strided(m{k}, z{k}, y{k}, o[{k}])")
            name = functions.setdefault(instruction.function, f"f{len(functions)}")
            names[name] = instruction.function
            inner = [text(one) for one in instruction.args]
            inner += [f"{key}={text(one)}" for key, one in instruction.kwargs.items()]
            call = f"{name}({', '.join(inner)})"
            lines.append(f"    {'' if instruction.result is None else f't{instruction.result.number} = '}{call}")
        if len(lines) == 1:
            lines.append("    pass")
        return "\n".join(lines), names

    def bind(
        self,
        n: int,
        tensors: Callable[[Memory], Tensor],
        on_device: Callable[[Any], Any],
        instructions: Sequence[Instruction] | None = None,
    ) -> Callable[[list[Any]], None]:
        """A function of a step's offsets that runs the program, or some of its instructions, on batches of n images."""
        source, names = self.source(instructions)
        space: dict[str, Any] = {"strided": torch.as_strided}
        for name, what in names.items():
            if isinstance(what, View):
                memory = tensors(what.memory)
                rows = 0 if what.memory.kind == "constant" else memory.stride(0)
                sizes, strides = (n, *what.sizes), (rows, *what.strides)
                if name[0] == "m":
                    space[name], space["z" + name[1:]], space["y" + name[1:]] = memory, sizes, strides
                else:
                    space[name] = memory.as_strided(sizes, strides, what.offset.at(()))
            else:
                space[name] = on_device(what)
        exec(compile(source, "<fastgen step program>", "exec"), space)
        return space["run"]


@dataclass(frozen=True)
class Listed:
    """An argument taken from the payload of the step."""

    number: int


def scratch(sizes: Sequence[int], dtype: torch.dtype, order: Sequence[int] | None = None) -> View:
    """A new block of these sizes, contiguous with its dimensions in the given order."""
    order = range(len(sizes)) if order is None else order
    memory = Memory("scratch", torch.Size(sizes).numel(), dtype)
    return View(memory, tuple(sizes), dense_strides(sizes, order), Linear(0), 0)


def _leaves(arguments: Any) -> list[Any]:
    if isinstance(arguments, dict):
        arguments = list(arguments.values())
    if isinstance(arguments, (list, tuple)):
        return [leaf for one in arguments for leaf in _leaves(one)]
    return [arguments]
