"""Random programs over random views: both machines and torch make the same of the same instructions."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastgen.sampling.machine import definitions
from fastgen.sampling.machine.language import (
    AffineOffset,
    Lookup,
    Pointwise,
    Product,
    Program,
    Rowwise,
    View,
    constant,
    dense_strides,
)
from fastgen.sampling.machine.parts import Unknown, part_of
from tests.sampling.machine.gpu_case import by_gpu_machine
from tests.sampling.machine.played import Blocks, N, by_machine, by_torch

SMOOTH = (
    *("copy", "neg", "relu", "tanh", "sigmoid", "silu", "gelu", "gelu_tanh", "elu", "leaky_relu", "abs", "square"),
    *("softplus", "erf"),
)
STEEP = ("exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "reciprocal", "div")  # of numbers around 1
PAIRS = ("add", "sub", "mul", "maximum", "minimum", "gate", "glu")
CONDITIONS = ("eq", "lt", "le")
SELECTIONS = ("hide", "erase", "keep")
ROWS = ("softmax", "log_softmax", "sum", "mean", "amax", "normalized")
OWN = ("product", "contract", "lookup", "copy_int64", "to_int64", "move_int64")  # of instructions that are no ops
STARTS = 4  # the box of a step begins at one of so many places along each of two dimensions
SEEDS = range(72)


class Author:
    """Writes instructions over a pool of views; what an instruction reads has been written or filled.

    Attributes:
        listed: how many views have an offset of their own in every step.
    """

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.blocks = Blocks()
        self.listed = 0

    def sizes(self, dims, most=7, last=70):
        return (*(self.random.randint(1, most) for _ in range(dims - 1)), self.random.choice([1, 2, 5, 31, 33, last]))

    def view(self, sizes, fill=False, last_dense=False, dtype=torch.float32):
        """Of a new memory, in a random order of dimensions, with gaps, and moving at random."""
        order = list(range(len(sizes)))
        if last_dense:
            order = [*self.random.sample(order[:-1], len(order) - 1), order[-1]]
        else:
            self.random.shuffle(order)
        gap = 1 if last_dense else self.random.choice([1, 1, 2])
        room = [size + self.random.randint(0, 1) * (d != order[-1]) for d, size in enumerate(sizes)]
        strides = tuple(gap * stride for stride in dense_strides(room, order))
        coefficients, listed = (), None
        moves = self.random.random()
        if moves < 0.4:
            coefficients = tuple(self.random.randint(0, 3) for _ in range(2))
        elif moves < 0.6:
            listed, self.listed = self.listed, self.listed + 1
        offset = AffineOffset(self.random.randint(0, 5), coefficients)
        memory = self.blocks.new(
            gap * math.prod(room) + 5 + 3 * STARTS * 2, dtype, math.nan if dtype.is_floating_point else -9
        )
        if fill:
            self.blocks.blocks[memory].normal_()
        return View(memory, sizes, strides, offset, 0, listed)

    def operand(self, sizes):
        """Of these sizes, broadcast along some dimensions; of images or a constant."""
        own = tuple(1 if self.random.random() < 0.2 else size for size in sizes)
        found = constant(torch.randn(own)) if self.random.random() < 0.2 else self.view(own, fill=True)
        return found.expand(sizes)

    def condition(self, sizes, source):
        """An instruction that compares the source, or whole numbers, some of which are equal."""
        out = self.view(sizes, dtype=torch.bool)
        if self.random.random() < 0.5:
            operands = [self.view(sizes, fill=True) for _ in range(2)]
            for one in operands:
                self.blocks.blocks[one.memory].round_()
        else:
            operands = [source, self.random.choice([self.random.uniform(-1, 1), self.operand(sizes)])]
            self.random.shuffle(operands)
        return Pointwise(self.random.choice(CONDITIONS), out, tuple(operands))

    def pointwise(self, kind, source):
        sizes = self.sizes(self.random.randint(1, 3)) if source is None else source.sizes
        first = self.operand(sizes) if source is None else source
        out = source if source is not None and self.random.random() < 0.3 else self.view(sizes)
        if kind == "one":
            op = self.random.choice(SMOOTH)
            return [Pointwise(op, out, (first, *{"elu": (0.5,), "leaky_relu": (0.1,)}.get(op, ())))]
        if kind == "steep":
            op = self.random.choice(STEEP)
            given = [self.view(sizes, fill=True) for _ in range(1 + (op == "div"))]
            for one in given:
                self.blocks.blocks[one.memory].uniform_(0.5, 1.5)
            return [Pointwise(op, self.view(sizes), tuple(given))]
        if kind == "select":
            condition = self.condition(sizes, first)
            return [condition, Pointwise(self.random.choice(SELECTIONS), out, (first, condition.out))]
        op = self.random.choice(PAIRS)
        number = op in ("add", "mul", "maximum", "minimum") and self.random.random() < 0.2
        return [Pointwise(op, out, (first, 0.3 if number else self.operand(sizes)))]

    def product(self, source):
        rows = source if source is not None and source.strides[-1] == 1 else None
        rows = self.view(self.sizes(2), fill=True, last_dense=True) if rows is None else rows
        depth, columns = rows.sizes[-1], self.random.choice([1, 16, 32, 45, 100])
        weight = constant(torch.randn(depth, columns) / depth**0.5)
        out = self.view((*rows.sizes[:-1], columns), last_dense=True)
        added = [None, constant(torch.randn(columns)), self.view(out.sizes, fill=True, last_dense=True)]
        return [Product(out, rows, weight, self.random.choice(added))]

    def contract(self, grouped):
        """A product in a batch, with computed weights or, as of a convolution in groups, constant ones."""
        batch, m, depth, columns = (self.random.choice([1, 2, 3, 18]) for _ in range(4))
        rows = self.view((batch, m, depth), fill=True)
        weight = (
            constant(torch.randn(batch, depth, columns)) if grouped else self.view((batch, depth, columns), fill=True)
        )
        if not grouped and self.random.random() < 0.3:
            weight = replace(weight, sizes=(1, *weight.sizes[1:])).expand(weight.sizes)
        out = self.view((batch, m, columns))
        return [Product(out, rows, weight, self.random.choice([None, self.operand(out.sizes)]))]

    def rowwise(self, source):
        op = self.random.choice(ROWS)
        source = self.view(self.sizes(2), fill=True) if source is None else source
        if op == "sum" and source.sizes[-1] > 1:  # a running one is of what comes before a place
            source = source.narrow(len(source.sizes) - 1, 0, self.random.randint(1, source.sizes[-1]))
        last = source.sizes[-1] if op in ("softmax", "log_softmax", "normalized") else 1
        return [Rowwise(op, self.view((*source.sizes[:-1], last)), source, (1e-2,) if op == "normalized" else ())]

    def lookup(self):
        sizes, depth = self.sizes(2)[:1], self.random.choice([1, 5, 40])
        index = self.blocks.holding(torch.randint(6, (N, *sizes)))
        table = constant(torch.randn(6, depth)) if self.random.random() < 0.5 else self.view((6, depth), fill=True)
        return [Lookup(self.view((*sizes, depth)), table, index)]

    def place_of_greatest(self):
        """Of rows, or of their negatives: as a rule writes it, moved, looked up, and as a number again."""
        row = self.view((self.random.randint(1, 4), self.random.choice([2, 5, 33])), fill=True)
        rows, count = row.sizes
        found = []
        if self.random.random() < 0.5:
            found.append(Pointwise("neg", self.view(row.sizes), (row,)))
            row = found[-1].out
        greatest, first = self.view((rows, 1)), self.view((rows, 1))
        are, numbered = self.view(row.sizes, dtype=torch.bool), self.view(row.sizes)
        place, moved = (self.view((rows, 1), dtype=torch.int64) for _ in range(2))
        found += [
            Rowwise("amax", greatest, row),
            Pointwise("eq", are, (row, greatest.expand(row.sizes))),
            Pointwise("mul", numbered, (are, constant(torch.arange(count, 0, -1.0)).expand(row.sizes))),
            Rowwise("amax", first, numbered),
            Pointwise("sub", first, (float(count), first)),
            Pointwise("copy", place, (first,)),
            Pointwise("copy", moved, (place,)),
            Lookup(self.view((rows, 7)), constant(torch.randn(count, 7)), moved.narrow(1, 0, 1).order([0])),
            Pointwise("copy", self.view((rows, 1)), (place,)),
        ]
        return found

    def instructions(self, pool):
        kinds = (
            "one",
            "one",
            "pair",
            "steep",
            "select",
            "product",
            "contract",
            "grouped",
            "rowwise",
            "lookup",
            "place",
        )
        kind = self.random.choice(kinds)
        old = [view for view in pool if view.memory.dtype == torch.float32 and self.random.random() < 0.7]
        source = self.random.choice(old) if old else None
        if kind == "product":
            return self.product(source)
        if kind in ("contract", "grouped"):
            return self.contract(kind == "grouped")
        if kind == "rowwise":
            return self.rowwise(source)
        if kind == "lookup":
            return self.lookup()
        return self.place_of_greatest() if kind == "place" else self.pointwise(kind, source)

    def program(self):
        pool, found = [], []
        while len(found) < self.random.randint(2, 9):
            more = self.instructions(pool)
            try:
                for one in more:
                    part_of(one)
            except Unknown:  # more dimensions than the machine has
                continue
            found += more
            pool += [one.out for one in more]
        return found

    def offsets(self, program, steps):
        starts, listed = (
            np.array([[self.random.randrange(STARTS) for _ in range(count)] for _ in range(steps)]).reshape(
                steps, count
            )
            for count in (2, self.listed)
        )
        return program.offsets([starts], listed)


def written(seed, steps):
    """A random program, its blocks, and offsets of some steps."""
    torch.manual_seed(seed)
    author = Author(seed)
    instructions = author.program()
    return author.blocks, instructions, author.offsets(Program(instructions), steps)


def check(blocks, instructions, offsets, play):
    ours, theirs = blocks.copy(), blocks.copy()
    play(ours, instructions, offsets)
    by_torch(theirs, instructions, offsets)
    for memory, block in theirs.blocks.items():  # whole blocks: what lies between places stays as it was
        torch.testing.assert_close(ours.blocks[memory], block, atol=3e-5, rtol=3e-5, equal_nan=True)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("seed", SEEDS)
def test_machine_and_torch_make_the_same_of_a_random_program(seed, threads):
    blocks, instructions, steps = written(seed, 3)
    for offsets in steps:
        check(blocks, instructions, offsets, lambda *given: by_machine(*given, threads))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy
@pytest.mark.parametrize("seed", SEEDS)
def test_the_machine_of_gpus_and_torch_make_the_same_of_a_random_program(seed):
    blocks, instructions, (offsets,) = written(seed, 1)
    check(blocks, instructions, offsets, by_gpu_machine)


def test_random_programs_hold_every_instruction_and_move():
    """The tests above would not be worth much otherwise."""
    programs = [written(seed, 1)[1] for seed in SEEDS]
    parts = [part_of(one).op for program in programs for one in program]
    assert {*definitions.POINTWISE, *definitions.ROWWISE, *OWN} - set(parts) == set()
    assert sum(bool(Program(program).moving()) for program in programs) > 50
    outs = [[one.out for one in program] for program in programs]
    assert sum(len(set(one)) < len(one) for one in outs) > 5  # something is written twice
    assert sum(view.listed is not None for one in outs for view in one) > 20
