"""Random programs over random views: the C++ machine and torch make the same of the same instructions."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

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
from tests.sampling.machine.played import Blocks, N, by_machine, by_torch

SMOOTH = ("copy", "neg", "relu", "tanh", "sigmoid", "silu", "gelu", "gelu_tanh", "elu", "leaky_relu", "abs", "square")
PAIRS = ("add", "sub", "mul", "maximum", "minimum", "gate", "glu", "hide", "erase")
ROWS = ("softmax", "log_softmax", "sum", "mean", "amax", "normalized")
STARTS = 4  # the box of a step begins at one of so many places along each of two dimensions


class Author:
    """Writes instructions over a pool of views; what an instruction reads has been written or filled."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.blocks = Blocks()

    def sizes(self, dims, most=7, last=70):
        return (*(self.random.randint(1, most) for _ in range(dims - 1)), self.random.choice([1, 2, 5, 31, 33, last]))

    def view(self, sizes, fill, last_dense=False):
        """Of a new memory, in a random order of dimensions, with gaps, and moving at random."""
        order = list(range(len(sizes)))
        if last_dense:
            order = [*self.random.sample(order[:-1], len(order) - 1), order[-1]]
        else:
            self.random.shuffle(order)
        gap = 1 if last_dense else self.random.choice([1, 1, 2])
        room = [size + self.random.randint(0, 1) * (d != order[-1]) for d, size in enumerate(sizes)]
        strides = tuple(gap * stride for stride in dense_strides(room, order))
        moves = self.random.random() < 0.5
        coefficients = tuple(self.random.randint(0, 3) for _ in range(2)) if moves else ()
        offset = AffineOffset(self.random.randint(0, 5), coefficients)
        numel = gap * math.prod(room) + 5 + 3 * STARTS * 2
        memory = self.blocks.new(numel)
        if fill:
            self.blocks.blocks[memory].normal_()
        return View(memory, sizes, strides, offset, 0)

    def operand(self, sizes):
        """Of these sizes, broadcast along some dimensions; of images or a constant."""
        own = tuple(1 if self.random.random() < 0.2 else size for size in sizes)
        found = constant(torch.randn(own)) if self.random.random() < 0.2 else self.view(own, True)
        return found.expand(sizes)

    def instruction(self, pool):
        kind = self.random.choice(["one", "pair", "product", "contract", "rowwise", "lookup"])
        old = [view for view in pool if self.random.random() < 0.7]
        source = self.random.choice(old) if old else None
        if kind in ("one", "pair"):
            sizes = self.sizes(self.random.randint(1, 3)) if source is None else source.sizes
            first = self.operand(sizes) if source is None else source
            in_place = source is not None and self.random.random() < 0.3
            out = source if in_place else self.view(sizes, False)
            if kind == "one":
                op = self.random.choice(SMOOTH)
                return Pointwise(op, out, (first, *{"elu": (0.5,), "leaky_relu": (0.1,)}.get(op, ())))
            op = self.random.choice(PAIRS)
            second = 0.3 if op in ("add", "mul", "maximum") and self.random.random() < 0.2 else self.operand(sizes)
            if op in ("hide", "erase"):
                second = constant(torch.randint(2, sizes).float())
            return Pointwise(op, out, (first, second))
        if kind == "product":
            rows = source if source is not None and source.strides[-1] == 1 else None
            rows = self.view(self.sizes(2), True, last_dense=True) if rows is None else rows
            depth, columns = rows.sizes[-1], self.random.choice([1, 16, 32, 45, 100])
            weight = constant(torch.randn(depth, columns) / depth**0.5)
            out = self.view((*rows.sizes[:-1], columns), False, last_dense=True)
            added = self.random.choice(
                [None, constant(torch.randn(columns)), self.view(out.sizes, True, last_dense=True)]
            )
            return Product(out, rows, weight, added)
        if kind == "contract":
            batch, m, depth, columns = (self.random.choice([1, 2, 3, 18]) for _ in range(4))
            rows, weight = self.view((batch, m, depth), True), self.view((batch, depth, columns), True)
            if self.random.random() < 0.3:
                weight = replace(weight, sizes=(1, *weight.sizes[1:])).expand(weight.sizes)
            out = self.view((batch, m, columns), False)
            return Product(out, rows, weight, self.random.choice([None, self.operand(out.sizes)]))
        if kind == "rowwise":
            op = self.random.choice(ROWS)
            source = self.view(self.sizes(2), True) if source is None else source
            last = source.sizes[-1] if op in ("softmax", "log_softmax", "normalized") else 1
            numbers = (1e-2,) if op == "normalized" else ()
            return Rowwise(op, self.view((*source.sizes[:-1], last), False), source, numbers)
        sizes, depth = self.sizes(2)[:1], self.random.choice([1, 5, 40])
        index = self.blocks.holding(torch.randint(6, (N, *sizes)))
        table = constant(torch.randn(6, depth)) if self.random.random() < 0.5 else self.view((6, depth), True)
        return Lookup(self.view((*sizes, depth), False), table, index)

    def program(self):
        pool, found = [], []
        while len(found) < self.random.randint(2, 9):
            one = self.instruction(pool)
            try:
                part_of(one)
            except Unknown:  # more dimensions than the machine has
                continue
            found.append(one)
            pool.append(one.out)
        return found


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("seed", range(48))
def test_machine_and_torch_make_the_same_of_a_random_program(seed, threads):
    torch.manual_seed(seed)
    author = Author(seed)
    instructions = author.program()
    program = Program(instructions)
    starts = np.array([[author.random.randrange(STARTS) for _ in range(2)] for _ in range(3)])
    for offsets in program.offsets([starts], np.zeros((3, 0), dtype=np.int64)):
        ours, theirs = author.blocks.copy(), author.blocks.copy()
        by_machine(ours, instructions, offsets, threads)
        by_torch(theirs, instructions, offsets)
        for memory, block in theirs.blocks.items():  # whole blocks: what lies between places stays NaN
            torch.testing.assert_close(ours.blocks[memory], block, atol=3e-5, rtol=3e-5, equal_nan=True)


def test_random_programs_hold_every_instruction_and_move():
    """The test above would not be worth much otherwise."""
    programs = [Author(seed).program() for seed in range(48)]
    parts = [part_of(one).op for program in programs for one in program]
    assert {*SMOOTH, *PAIRS, *ROWS, "product", "contract", "lookup"} - set(parts) == set()
    assert sum(bool(Program(program).moving()) for program in programs) > 30
    outs = [[one.out for one in program] for program in programs]
    assert sum(len(set(one)) < len(one) for one in outs) > 5  # something is written twice
