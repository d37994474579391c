"""Every instruction of the step machine of the CPU: against float64, and on results that were NaN."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from fastgen.sampling.machine import definitions
from fastgen.sampling.machine.cpu.build import machine
from fastgen.sampling.machine.language import (
    AffineOffset,
    Call,
    Lookup,
    Memory,
    Pointwise,
    Rowwise,
    View,
    constant,
)
from fastgen.sampling.machine.parts import Unknown, part_of
from tests.sampling.machine.played import Blocks, N, by_machine

VALUES = torch.tensor(
    [0.0, -0.0, 1e-30, -1e-30, 1e-7, -1e-7, 1e-3, -1e-3, 0.3, -0.34, 0.5, -0.7, 1, -1, 2.5, -9, 20, -30, 60, -87.2]
    + [88.2, 88.5, 88.7, -103, 200, -200, math.inf, -math.inf, math.nan]
)
MASKED = ("hide", "erase", "keep")
COMPARED = ("eq", "lt", "le")
TWO = ("add", "sub", "mul", "div", "maximum", "minimum", "gate", "glu", *MASKED, *COMPARED)
NUMBERS = {"elu": (0.7,), "leaky_relu": (0.02,)}
ONE = [name for name in definitions.POINTWISE if name not in TWO]
OWN = (
    "copy_int64",
    "to_int64",
    "move_int64",
    "product",
    "contract",
    "lookup",
)  # of instructions that are no ops of definitions


def test_the_machine_knows_every_op_and_no_other():
    assert {*definitions.POINTWISE, *definitions.ROWWISE, *OWN} == set(machine().ops)


def played(op, operands, sizes, threads=1):
    """What the machine makes of operands: tensors (N, ...) or numbers."""
    blocks = Blocks()
    out = blocks.result(*sizes)
    given = tuple(blocks.holding(one) if isinstance(one, torch.Tensor) else one for one in operands)
    by_machine(blocks, [Pointwise(op, out, given)], threads=threads)
    return blocks.read(out)


def defined(op, *operands):
    """What torch makes of them."""
    shape = torch.broadcast_shapes(*(one.shape for one in operands if isinstance(one, torch.Tensor)))
    dtype = next(one.dtype for one in operands if isinstance(one, torch.Tensor))
    return definitions.POINTWISE[op](*operands, out=torch.empty(shape, dtype=dtype))


@pytest.mark.parametrize("name", ONE)
def test_functions_are_as_near_to_the_truth_as_torch_is(name):
    x = torch.cat((VALUES, torch.linspace(-95, 95, 1000), torch.linspace(-1, 1, 1001))).expand(N, -1).contiguous()
    numbers = NUMBERS.get(name, ())
    found = played(name, (x, *numbers), x.shape[1:])
    truth, theirs = defined(name, x.double(), *numbers), defined(name, x, *numbers)
    assert torch.equal(found.isnan(), truth.isnan())
    assert torch.equal(found.isinf(), (truth if name == "gelu" else theirs).isinf())  # torch's gelu of inf is NaN
    fine = truth.isfinite() & theirs.isfinite()
    bound = 4e-7 * truth.abs() + 2e-45  # three units in the last place; torch's own reach two
    if name in ("sigmoid", "silu"):
        bound = bound + 1e-36  # where exp(-x) has overflowed
    if name in ("gelu", "gelu_tanh"):  # 1 + erf, or 1 + tanh, cancel: an error relative to x, for torch too
        bound = 4e-7 * x.abs() + 2e-45
    assert ((found - truth).abs() <= bound)[fine].all()


@pytest.mark.parametrize("name", TWO)
def test_two_operands_of_every_kind(name):
    """All pairs of special values, NaN and infinities among them, and many others."""
    a, b = (one.flatten() for one in torch.meshgrid(VALUES, VALUES, indexing="ij"))
    a, b = torch.cat((a, torch.randn(500) * 3)), torch.cat((b, torch.randn(500) * 3))
    if name in MASKED:
        b = torch.cat((b[:-500], torch.randint(2, (500,)).float()))
    a, b = a.expand(N, -1).contiguous(), b.expand(N, -1).contiguous()
    if name in ("gate", "glu"):
        if name == "glu":
            a = a.masked_fill(a.isinf(), 1e30)  # an infinity times what float32 takes for 0
        found, truth = played(name, (a, b), a.shape[1:]), defined(name, a.double(), b.double())
        assert torch.equal(found.isnan(), truth.isnan())
        fine = ~truth.isnan()
        assert ((found - truth).abs() <= 6e-7 * truth.abs() + 1e-36 * (1 + a.abs()))[fine].all()
    else:
        torch.testing.assert_close(
            played(name, (a, b), a.shape[1:]), defined(name, a, b), atol=0, rtol=0, equal_nan=True
        )


@pytest.mark.parametrize("name", TWO)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_two_operands_broadcast(name, threads):
    a, b = torch.randn(N, 5, 1, 70), torch.randn(N, 1, 3, 70)
    close = {"atol": 1e-6, "rtol": 1e-6} if name in ("gate", "glu") else {"atol": 0, "rtol": 0}
    torch.testing.assert_close(played(name, (a, b), (5, 3, 70), threads), defined(name, a, b), **close)
    torch.testing.assert_close(
        played(name, (a, b[:, 0, :1, :1]), (5, 1, 70), threads), defined(name, a, b[:, :1, :1, :1]), **close
    )
    if name not in ("gate", "glu", *MASKED):
        assert torch.equal(played(name, (a, 0.3), (5, 1, 70), threads), defined(name, a, 0.3))
    if name in ("add", "sub", "mul", "div", *COMPARED):
        assert torch.equal(played(name, (0.3, a), (5, 1, 70), threads), defined(name, 0.3, a))


def test_a_number_fills():
    for number in (0.0, -math.inf, 0.1):
        assert torch.equal(played("copy", (number,), (4, 37)), torch.full((N, 4, 37), number))


# --- along rows


def rows_of(kind):
    x = torch.randn(N, 6, 37)
    if kind == "hidden":
        x[:, :, 5:20] = -math.inf
        x[:, 0, :36] = -math.inf  # one alone is left
    elif kind == "large":
        x = x * 1000 + 1e5
    elif kind == "steady":  # next to no variance about a mean that is not small
        x = 3 + 1e-4 * x
    elif kind == "equal":
        x = torch.full_like(x, 0.7)
    return x


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("kind", ["plain", "hidden", "large", "steady", "equal"])
@pytest.mark.parametrize("op", definitions.ROWWISE)
def test_ops_along_rows(op, kind, layout, threads):
    if kind == "hidden" and op not in ("softmax", "log_softmax", "amax"):
        return
    x = rows_of(kind)
    numbers = (1e-5,) if op == "normalized" else ()
    truth, theirs = (definitions.ROWWISE[op](one, *numbers) for one in (x.double(), x))
    blocks = Blocks()
    if layout == "rows":
        source, out = blocks.holding(x), blocks.result(*truth.shape[1:])
    else:
        source = blocks.holding(x.mT.contiguous()).order([1, 0])
        out = blocks.result(truth.shape[2], truth.shape[1]).order([1, 0])
    by_machine(blocks, [Rowwise(op, out, source, numbers)], threads=threads)
    found = blocks.read(out).double()
    infinite = truth.isinf()
    assert torch.equal(found.isinf(), infinite) and torch.equal(found[infinite], truth[infinite])
    error = (found - truth)[~infinite].abs().max()
    assert not error.isnan()
    # No further from the truth than torch is, but for units in the last place of what there is to tell.
    assert error <= 2 * (theirs.double() - truth)[~infinite].abs().max() + 4e-7 * truth[~infinite].abs().max()


@pytest.mark.parametrize("op", [op for op in definitions.ROWWISE if op not in ("sum", "mean", "amax")])
def test_ops_along_rows_in_place(op):
    blocks = Blocks()
    x = torch.randn(N, 6, 37)
    view = blocks.holding(x)
    numbers = (1e-5,) if op == "normalized" else ()
    by_machine(blocks, [Rowwise(op, view, view, numbers)])
    torch.testing.assert_close(blocks.read(view), definitions.ROWWISE[op](x, *numbers), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("op", definitions.ROWWISE)
def test_a_row_that_holds_nan_is_nan_and_no_other(op):
    x = torch.randn(N, 6, 37)
    x[:, 2, 11] = math.nan
    numbers = (1e-5,) if op == "normalized" else ()
    truth = definitions.ROWWISE[op](x, *numbers)
    blocks = Blocks()
    source, out = blocks.holding(x), blocks.result(*truth.shape[1:])
    by_machine(blocks, [Rowwise(op, out, source, numbers)])
    assert torch.equal(blocks.read(out).isnan(), truth.isnan())


# --- look-ups, integers


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("of_images", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_lookups(of_images, transposed, threads):
    blocks = Blocks()
    index = torch.randint(9, (N, 4, 5))
    table = torch.randn(N, 9, 33) if of_images else torch.randn(9, 33)
    lying = table.mT.contiguous() if transposed else table
    view = blocks.holding(lying) if of_images else constant(lying)
    view = view.order([1, 0]) if transposed else view
    out = blocks.result(4, 5, 33)
    by_machine(blocks, [Lookup(out, view, blocks.holding(index))], threads=threads)
    truth = torch.stack([(table[b] if of_images else table)[index[b]] for b in range(N)])
    assert torch.equal(blocks.read(out), truth)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("given", "dtype"), [(torch.int64, torch.float32), (torch.int64, torch.int64), (torch.float32, torch.int64)]
)
def test_integers_move_and_become_numbers_and_numbers_integers(given, dtype, threads):
    blocks = Blocks()
    levels = torch.randint(-(2**20), 2**20, (N, 6, 70))
    source = blocks.holding(levels.to(given))
    out = blocks.result(35, 3, dtype=dtype).order([1, 0])
    by_machine(blocks, [Pointwise("copy", out, (source.narrow(0, 1, 3, 2).narrow(1, 0, 35, 2),))], threads=threads)
    assert torch.equal(blocks.read(out), levels[:, 1::2, ::2].to(dtype))


# --- views


def test_views_move_by_the_offsets_of_a_step():
    blocks = Blocks()
    source = Memory("stored", -1, 12, torch.float32)
    blocks.blocks[source] = torch.arange(12.0).repeat(N, 1)
    view = View(source, (4,), (1,), AffineOffset(2, (3,)), 0)
    target = Memory("stored", -2, 9, torch.float32)
    blocks.blocks[target] = torch.full((N, 9), math.nan)
    out = View(target, (4,), (1,), AffineOffset(0, (1,)), 0)
    by_machine(blocks, [Pointwise("copy", out, (view,))], offsets=(3, 8))  # in the order of their use
    expected = torch.tensor([math.nan] * 3 + [8.0, 9, 10, 11] + [math.nan] * 2).repeat(N, 1)
    assert torch.equal(blocks.blocks[target].nan_to_num(-1), expected.nan_to_num(-1))


@pytest.mark.parametrize("case", ["half", "double", "call", "six dimensions", "from half"])
def test_what_the_machine_does_not_know_is_left_to_torch(case):
    blocks = Blocks()
    view = blocks.holding(torch.zeros(N, 4, 4))
    half, double = (blocks.holding(torch.zeros(N, 4, 4, dtype=dtype)) for dtype in (torch.bfloat16, torch.float64))
    far = replace(view, sizes=(2,) * 6, strides=(700, 300, 100, 30, 10, 3))
    with pytest.raises(Unknown):
        part_of(
            {
                "half": Pointwise("add", half, (half, 1.0)),
                "double": Rowwise("softmax", double, double),
                "call": Call(torch.erf, (view,)),
                "six dimensions": Pointwise("neg", far, (far,)),
                "from half": Pointwise("copy", view, (half,)),
            }[case]
        )


def test_gelu_of_torch_cannot_be_trusted_with_a_result_that_is_not_contiguous():
    """So that `definitions` copies; this is the definition, whatever torch does."""
    x = torch.randn(3, 8)
    out = torch.full((8, 3), math.nan).T
    definitions.POINTWISE["gelu"](x, out=out)
    assert torch.equal(out, F.gelu(x))
