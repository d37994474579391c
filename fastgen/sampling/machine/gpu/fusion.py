"""Joins instructions of a program for the step machine of GPUs, where an instruction costs more than what it computes:

    a product, and the pointwise operations that follow it: sums, ReLU, a gate of two halves of its columns
    pointwise operations, one after the other

The first is the head; the others, its links, take the result from registers. A link rounds its result as an instruction
does, and no compiler sees two of them at a time: joined or not, results are the same to the last bit. (Those of a gate
in half precision are not: its two functions are not rounded before they are multiplied.)
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from fastgen.sampling.machine.language import Instruction, Memory, Pointwise, View, views_of
from fastgen.sampling.machine.parts import DIMS, Part, Side, Unknown, collapse, part_of


@dataclass(frozen=True)
class Link:
    """value = op(value, operand)

    Attributes:
        operand: None where there is no other, or where it is the other half of the columns.
        out: where the value is stored,
        kept: where anything else reads it.
        half: columns of a half, where the operands are the two halves; as many columns there are from here on.
    """

    op: str
    operand: Side | float | None
    out: Side
    kept: bool = True
    half: int = 0


@dataclass(frozen=True)
class Fused:
    """An instruction of the step machine of GPUs.

    Attributes:
        kept: whether the result of the head is stored.
    """

    head: Part
    links: tuple[Link, ...] = ()
    kept: bool = True

    @property
    def half(self) -> int:
        return max((link.half for link in self.links), default=0)

    @property
    def sides(self) -> list[Side]:
        """Of the head and of each link the result, where it is stored, and the operands."""
        found = self.head.sides if self.kept else self.head.sides[1:]
        for link in self.links:
            if link.kept:
                found.append(link.out)
            if isinstance(link.operand, Side):
                found.append(link.operand)
        return found

    @property
    def views(self) -> tuple[View, ...]:
        """What it reads and writes."""
        weight = () if self.head.weight is None else (self.head.weight,)
        return (*(side.view for side in self.sides), *weight)

    def collapsed(self) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
        """As of a part."""
        return collapse(self.head.sizes, self.sides)


def fuse(instructions: Sequence[Instruction]) -> list[Fused]:
    """Raises Unknown."""
    instructions = _with_gates(instructions)
    readers = _users(instructions, reading=True)
    found: list[Fused] = []
    taken: set[int] = set()
    for k, one in enumerate(instructions):
        if k in taken:
            continue
        group = _Group(part_of(one, half=True), readers)
        seen = k
        while group.grows and (number := next((m for m in readers.get(group.memory, ()) if m > seen), None)):
            if number not in taken:
                between = [instructions[m] for m in range(seen + 1, number) if m not in taken]
                if group.takes(instructions[number], number, between):
                    taken.add(number)
                else:
                    group.skip([instructions[number]])
            seen = number
        found.append(group.fused)
    return found


def _users(instructions: Sequence[Instruction], *, reading: bool) -> dict[Memory, list[int]]:
    """The numbers of the instructions that read a memory, or that write it."""
    found: dict[Memory, list[int]] = {}
    for k, one in enumerate(instructions):
        out, *inputs = views_of(one)
        for view in inputs if reading else [out]:
            found.setdefault(view.memory, []).append(k)
    return found


def _with_gates(instructions: Sequence[Instruction]) -> list[Instruction]:
    """With one op for tanh(a) * sigmoid(b), one for a * sigmoid(b), where nothing else reads the two functions."""
    readers, writers = (_users(instructions, reading=one) for one in (True, False))
    found: dict[int, Instruction] = dict(enumerate(instructions))

    def origin(view: View | float, op: str, reader: int) -> tuple[int, View] | None:
        """The instruction that computes a view by this op for this reader alone, and its operand."""
        if not isinstance(view, View) or view.memory.kind != "scratch" or readers[view.memory] != [reader]:
            return None
        (number, *more) = writers[view.memory]
        one = instructions[number]
        if more or not isinstance(one, Pointwise) or one.op != op or not _is(one.out, view):
            return None
        (operand,) = one.operands
        again = isinstance(operand, View) and any(number < m < reader for m in writers.get(operand.memory, ()))
        return None if again or not isinstance(operand, View) or operand.sizes != view.sizes else (number, operand)

    for k, one in enumerate(instructions):
        if isinstance(one, Pointwise) and one.op == "mul":
            for a, b in (one.operands, one.operands[::-1]):
                first, second = origin(a, "tanh", k), origin(b, "sigmoid", k)
                if second is None:
                    continue
                gate = Pointwise("gate" if first else "glu", one.out, (first[1] if first else a, second[1]))
                with suppress(Unknown):
                    part_of(gate, half=True)
                    found[k] = gate
                    for gone in (first, second) if first else (second,):
                        del found[gone[0]]
                    break
    return list(found.values())


def _is(a: View, b: View) -> bool:
    """Whether two views of one memory that do not move are of the same elements in the same order."""
    fixed = not a.moves and not b.moves and a.offset.const == b.offset.const
    return fixed and (a.sizes, _strides(a)) == (b.sizes, _strides(b))


def _strides(view: View) -> tuple[int, ...]:
    return tuple(stride if size > 1 else 0 for size, stride in zip(view.sizes, view.strides, strict=True))


class _Group:
    """A head and its links so far.

    Attributes:
        value: where the last one's result would be stored.
    """

    def __init__(self, head: Part, readers: Mapping[Memory, Sequence[int]]) -> None:
        self.fused = Fused(head)
        self.value = head.out
        self.sizes = head.sizes
        # Pointwise operations, lookups and products with weights that are the same for all images.
        self.grows = head.op == "product" or (not head.depth and head.op not in ("move_int64", "to_int64"))
        self._readers = readers
        self._read = {view.memory for view in self.fused.views if view is not head.out.view}
        self._written = {head.out.view.memory}
        self._skipped_reads: set[Memory] = set()
        self._skipped_writes: set[Memory] = set()

    @property
    def memory(self) -> Memory:
        return self.value.view.memory

    def skip(self, instructions: Sequence[Instruction]) -> None:
        """What they do comes after all that this one does."""
        for one in instructions:
            out, *inputs = views_of(one)
            self._skipped_writes.add(out.memory)
            self._skipped_reads |= {view.memory for view in inputs}

    def takes(self, one: Instruction, number: int, between: Sequence[Instruction]) -> bool:
        """Whether an instruction, `number` of the program, has become the next link, though it then comes before
        those between."""
        self.skip(between)
        if not isinstance(one, Pointwise) or part_of(one, half=True).op != one.op:
            return False
        link = self._link(one)
        if link is None or self.memory in self._skipped_writes:
            return False
        out, others = one.out.memory, {view.memory for view in one.inputs} - {self.memory}
        # What a tile of a joined instruction reads, no other one may write, and it itself neither before.
        if out in self._read | self._written | self._skipped_reads | self._skipped_writes:
            return False
        if others & (self._written | self._skipped_writes):
            return False
        alone = self.memory.kind == "scratch" and set(self._readers[self.memory]) == {number}
        links, kept = self.fused.links, self.fused.kept
        if not alone:
            pass
        elif links:
            links = (*links[:-1], replace(links[-1], kept=False))
        else:
            kept = False
        found = Fused(self.fused.head, (*links, link), kept)
        if len(found.collapsed()[0]) > DIMS - 1:
            return False
        self.fused, self.value = found, link.out
        if link.half:
            self.sizes = (*self.sizes[:-1], link.half)
        self._read |= others
        self._written.add(out)
        return True

    def _link(self, one: Pointwise) -> Link | None:
        """Where one operand is the value, or two are its halves."""
        if one.op in ("gate", "glu") and self.fused.head.op == "product" and not self.fused.half:
            (a, b), half = one.operands, self.sizes[-1] // 2
            if half and self.sizes[-1] == 2 * half and isinstance(a, View) and isinstance(b, View):
                halves = self._begins(a, 0) and self._begins(b, half * self.value.strides[-1])
                dims = self._dims(a, one.out, (*self.sizes[:-1], half)) if halves else None
                if dims is not None and (a.sizes, _strides(a)) == (b.sizes, _strides(b)):
                    return Link(one.op, None, _placed(one.out, one.out, dims), half=half)
        operands = one.operands
        for value, *others in (operands, operands[::-1]) if one.op in ("add", "mul") else (operands,):
            if isinstance(value, View) and self._begins(value, 0):
                dims = self._dims(value, one.out, self.sizes)
                (other,) = others or (None,)
                if dims is None or (isinstance(other, View) and other.memory == self.memory):
                    continue
                operand = _placed(other, one.out, dims) if isinstance(other, View) else other
                return Link(one.op, operand, _placed(one.out, one.out, dims))
        return None

    def _begins(self, view: View, further: int) -> bool:
        """Whether a view begins so many numbers behind the beginning of the value."""
        own = self.value.view
        return (
            view.memory == own.memory
            and not view.moves
            and not own.moves
            and (view.offset.const == own.offset.const + further)
        )

    def _dims(self, view: View, out: View, sizes: Sequence[int]) -> list[int | None] | None:
        """For every dimension of the value, which has these sizes, that of `out` along which `view` goes through it;
        None for one of size 1. None where the view is not all of the value."""
        strides = view.expand(out.sizes).strides
        left = {(size, stride): d for d, (size, stride) in enumerate(zip(out.sizes, strides, strict=True)) if size > 1}
        found: list[int | None] = []
        for size, stride in zip(sizes, self.value.strides, strict=True):
            if size == 1:
                found.append(None)
            elif (size, stride) in left:
                found.append(left.pop((size, stride)))
            else:
                return None
        many = sum(size > 1 for size in out.sizes)
        return None if left or many != sum(d is not None for d in found) else found


def _placed(view: View, out: View, dims: Sequence[int | None]) -> Side:
    strides = view.expand(out.sizes).strides
    return Side(view, tuple(0 if d is None else strides[d] for d in dims))
