"""Which instructions are joined for the step machine of GPUs, and that no number changes by it, to the last bit."""

import random

import numpy as np
import pytest
import torch
from triton import language
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

from fastgen.models import GatedPixelCNN, PixelCNN
from fastgen.sampling.machine.gpu.fusion import Fused, fuse
from fastgen.sampling.machine.language import AffineOffset, Lookup, Memory, Pointwise, Product, View, constant
from fastgen.sampling.machine.parts import part_of
from tests.sampling.machine.gpu_case import Blocks, N, run
from tests.sampling.models import planned

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy


@pytest.fixture(autouse=True)
def columns_in_any_place_sum_alike(monkeypatch):
    """NumPy's product in float32 rounds the last columns in another way than the others on some processors; a kernel's
    does not know where a column stands."""
    rounded = interpreter.InterpreterBuilder.create_dot

    def exact(self, a, b, d, *options):
        wide = (TensorHandle(one.data.astype(np.float64), language.float64) for one in (a, b, d))
        found = rounded(self, *wide, *options)
        return TensorHandle(found.data.astype(d.data.dtype), d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", exact)


class Author:
    """Writes instructions over blocks, results that nothing else reads into scratch memory."""

    def __init__(self):
        self.blocks, self.instructions = Blocks(), []

    def given(self, *sizes):
        return self.blocks.view(torch.randn(N, *sizes))

    def product(self, rows, columns, added=None, **options):
        depth = rows.sizes[-1]
        out = self.result((*rows.sizes[:-1], columns), **options)
        self.instructions.append(Product(out, rows, constant(torch.randn(depth, columns) / depth**0.5), added))
        return out

    def result(self, sizes, kind="scratch", out=None):
        if out is not None:
            return out
        stored = self.blocks.empty(*sizes)
        memory = stored.memory
        own = Memory(kind, 1000 + memory.number, memory.numel, memory.dtype)
        self.blocks.data[own] = self.blocks.data.pop(memory)
        return View(own, stored.sizes, stored.strides, stored.offset, 0)

    def do(self, op, *operands, sizes=None, **options):
        sizes = next(one for one in operands if isinstance(one, View)).sizes if sizes is None else sizes
        out = self.result(sizes, **options)
        self.instructions.append(Pointwise(op, out, operands))
        return out

    def joined(self):
        """Ops of head and links, + before what is kept."""
        return [" ".join(("+" if kept else "") + op for op, kept in ops(one)) for one in fuse(self.instructions)]

    def check(self, *views):
        """Plays them joined and one by one; what is kept must be equal, and none of these views NaN."""
        results = []
        for join in (None, fuse):
            run(self.blocks, self.instructions, join=join)
            results.append({view: self.blocks.read(view).clone() for view in views})
        for view in views:
            assert not results[0][view].isnan().any()
            assert torch.equal(results[0][view], results[1][view])


def ops(one):
    return [(one.head.op, one.kept), *((link.op, link.kept) for link in one.links)]


def test_a_product_takes_what_follows_number_by_number():
    author = Author()
    x, map_, again = author.given(5, 7), author.given(5, 90), author.given(5, 90)
    y = author.do("relu", author.do("add", author.product(x, 90, map_), again), kind="stored")
    author.product(author.do("mul", 0.5, y, sizes=y.sizes), 3, kind="stored")
    assert author.joined() == ["product add +relu +mul", "+product"]
    author.check(y, author.instructions[-1].out)


@pytest.mark.parametrize("half", [1, 5, 32, 70])
def test_a_product_takes_a_gate_of_its_columns(half):
    author = Author()
    x, map_, residual = author.given(5, 7), author.given(5, 2 * half), author.given(5, half)
    y = author.do("add", map_, author.product(x, 2 * half, constant(torch.randn(2 * half))))
    a, b = y.narrow(1, 0, half), y.narrow(1, half, half)
    gated = author.do("mul", author.do("tanh", a), author.do("sigmoid", b))
    found = author.do("add", residual, gated, kind="stored")
    assert author.joined() == ["product add gate +add"]
    author.check(found)


def test_a_gate_without_tanh_and_one_whose_product_others_read():
    author = Author()
    y = author.product(author.given(5, 7), 40)
    a, b = y.narrow(1, 0, 20), y.narrow(1, 20, 20)
    other = author.product(y, 8, kind="stored")
    found = author.do("mul", author.do("sigmoid", b), a, kind="stored")
    assert author.joined() == ["+product +glu", "+product"]
    author.check(found, other, y)


def test_halves_in_the_wrong_order_and_of_other_columns_are_no_gate_of_a_product():
    for first, second in ((20, 0), (0, 19), (0, 0)):
        author = Author()
        y = author.product(author.given(5, 7), 40)
        a, b = y.narrow(1, first, 20), y.narrow(1, second, 20)
        found = author.do("mul", author.do("tanh", a), author.do("sigmoid", b), kind="stored")
        assert author.joined() == ["+product", "+gate"]
        author.check(found)


def test_a_function_that_something_else_reads_is_in_no_gate():
    author = Author()
    a, b = author.given(6), author.given(6)
    t = author.do("tanh", a)
    found = author.do("mul", t, author.do("sigmoid", b))
    last = author.do("sub", found, t, kind="stored")
    assert author.joined() == ["+tanh", "sigmoid mul +sub"] or author.joined()[0].startswith("+tanh")
    author.check(last)


def test_chains_begin_with_levels_and_lookups():
    author = Author()
    levels = author.blocks.view(torch.randint(5, (N, 4)))
    x = author.do("sub", author.do("div", author.do("copy", levels), 4.0), 1.0, kind="stored")
    found = author.result((4, 70))
    author.instructions.append(Lookup(found, constant(torch.randn(5, 70)), levels))
    y = author.do("add", found, author.given(4, 70), kind="stored")
    assert author.joined() == ["copy_int64 div +sub", "lookup +add"]
    author.check(x, y)


def test_dimensions_in_another_order_are_followed():
    author = Author()
    y = author.product(author.given(3, 4, 7), 10)
    turned, other = y.order([2, 0, 1]), author.given(10, 1, 4)
    out = author.do("mul", turned, other, kind="stored", sizes=(10, 3, 4))
    assert author.joined() == ["product +mul"]
    author.check(out)


def test_what_comes_between_keeps_its_order():
    """What the next one reads is written in between; what it writes is read in between, or written."""
    author = Author()
    x, other = author.given(8), author.given(8)
    y = author.do("neg", x)
    author.do("exp", x, out=other)
    a = author.do("add", y, other, kind="stored")
    z = author.do("abs", x)
    b = author.do("relu", other, kind="stored")
    author.do("square", z, out=other)
    assert author.joined() == ["+neg", "+exp +add", "+abs", "+relu", "+square"]
    author.check(a, b, other)


def test_what_is_written_over_in_place_is_another_value():
    author = Author()
    y = author.do("maximum", author.given(8), -0.5)
    author.do("minimum", y, 0.5, out=y)
    found = author.do("copy", y, kind="stored")
    assert author.joined() == ["+maximum", "+minimum +copy"]
    author.check(found)


def test_rows_of_a_product_are_not_written_over():
    author = Author()
    x = author.given(5, 40)
    y = author.product(x, 40)
    author.do("relu", y, out=x)
    assert author.joined() == ["+product", "+relu"]
    author.check(x)


def test_a_link_reads_nothing_that_its_head_has_written():
    author = Author()
    y = author.product(author.given(5, 7), 40)
    z = author.do("relu", y)
    found = author.do("sub", z, y, kind="stored")
    twice = author.do("add", z, z, kind="stored")
    assert author.joined() == ["+product +relu", "+sub", "+add"]
    author.check(found, twice)


def test_what_moves_is_another_value():
    author = Author()
    y = author.do("neg", author.given(8), kind="stored")
    moving = View(y.memory, (8,), (1,), AffineOffset(0, (1,)), 0)
    instructions = [*author.instructions, Pointwise("abs", author.blocks.empty(8), (moving,))]
    assert [ops(one) for one in fuse(instructions)] == [[("neg", True)], [("abs", True)]]


SMOOTH = ("copy", "neg", "relu", "tanh", "sigmoid", "silu", "gelu", "abs", "square", "exp", "elu")
PAIRS = ("add", "sub", "mul", "maximum", "gate", "glu")


@pytest.mark.parametrize("seed", range(12))
def test_random_programs_give_the_same_joined(seed):
    torch.manual_seed(seed)
    draw, author = random.Random(seed), Author()
    columns = draw.choice([2, 6, 66])
    values = [author.product(author.given(3, 5), columns), author.given(3, columns), author.given(3, columns)]
    last = values[0]
    for _ in range(14):
        kind = draw.choice(["scratch", "scratch", "stored"])
        if last.sizes[-1] == columns and draw.random() < 0.15:
            a, b = (last.narrow(1, start, columns // 2) for start in (0, columns // 2))
            wide = author.do("gate", a, b, kind=kind)
            last = author.product(wide, columns, kind=kind)
        elif draw.random() < 0.2:
            last = author.product(last, columns, draw.choice([None, draw.choice(values)]), kind=kind)
        elif draw.random() < 0.5:
            op = draw.choice(SMOOTH)
            out = last if draw.random() < 0.3 else None
            last = author.do(op, last, *((0.5,) if op == "elu" else ()), kind=kind, out=out)
        else:
            operands = [last, draw.choice([draw.choice(values), 0.7])]
            draw.shuffle(operands)
            last = author.do(draw.choice(PAIRS), *operands, kind=kind, sizes=last.sizes)
        last = author.do("minimum", author.do("maximum", last, -2.0), 2.0, kind=kind)
        values.append(last)
    kept = [one.out for one in author.instructions if one.out.memory.kind == "stored"]
    assert len(fuse(author.instructions)) < len(author.instructions)
    author.check(last, *kept)


@pytest.mark.parametrize(("build", "before", "after"), [(GatedPixelCNN, 18, 9), (PixelCNN, 20, 10)])
def test_a_step_has_few_instructions(build, before, after):
    model = build((1, 6, 6), 4, channels=8, layers=2)
    plan = planned(model, model.shape)
    served = [step.program for step in plan.steps]
    program = plan.programs[max(set(served), key=served.count)]
    assert (len(program.instructions), len(fuse(program.instructions))) == (before, after)


def test_instructions_that_are_not_joined_are_as_they_were():
    author = Author()
    author.product(author.given(5, 7), 40, kind="stored")
    author.do("exp", author.given(3), kind="stored")
    assert fuse(author.instructions) == [Fused(part_of(one, half=True)) for one in author.instructions]
