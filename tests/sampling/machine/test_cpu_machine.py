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
    Product,
    Rowwise,
    View,
    constant,
)
from fastgen.sampling.machine.parts import Unknown, part_of
from tests.sampling.machine.played import Blocks, N, by_machine, by_torch

VALUES = torch.tensor(
    [0.0, -0.0, 1e-30, -1e-30, 1e-7, -1e-7, 1e-3, -1e-3, 0.3, -0.34, 0.5, -0.7, 1, -1, 2.5, -9, 20, -30, 60, -87.2]
    + [88.2, 88.5, 88.7, -103, 200, -200, math.inf, -math.inf, math.nan]
)
TWO = ("add", "sub", "mul", "div", "maximum", "minimum", "gate", "glu", "hide", "erase")
NUMBERS = {"elu": (0.7,), "leaky_relu": (0.02,)}
ONE = [name for name in definitions.POINTWISE if name not in TWO]
OWN = ("copy_int64", "move_int64", "product", "contract", "lookup")  # of instructions that are no ops of definitions


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
    if name in ("hide", "erase"):
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
    if name not in ("gate", "glu", "hide", "erase"):
        assert torch.equal(played(name, (a, 0.3), (5, 1, 70), threads), defined(name, a, 0.3))
    if name in ("add", "sub", "mul", "div"):
        assert torch.equal(played(name, (0.3, a), (5, 1, 70), threads), defined(name, 0.3, a))


def test_a_number_fills():
    for number in (0.0, -math.inf, 0.1):
        assert torch.equal(played("copy", (number,), (4, 37)), torch.full((N, 4, 37), number))


# --- products


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("depth", "columns"), [(1, 1), (7, 31), (40, 32), (65, 97), (3, 200)])
@pytest.mark.parametrize("start", ["none", "bias", "map", "itself"])
def test_products_with_constants(depth, columns, start, threads):
    blocks = Blocks()
    x, weight = torch.randn(N, 5, depth), torch.randn(depth, columns)
    rows, out, added = blocks.holding(x), blocks.result(5, columns), None
    truth = x.double() @ weight.double()
    if start == "bias":
        data = torch.randn(columns)
        added, truth = constant(data), truth + data
    elif start != "none":
        data = torch.randn(N, 5, columns)
        added, truth = blocks.holding(data), truth + data
    out = added if start == "itself" else out
    by_machine(blocks, [Product(out, rows, constant(weight), added)], threads=threads)
    torch.testing.assert_close(blocks.read(out).double(), truth, atol=1e-6 * depth, rtol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
def test_rows_of_a_product_may_overlap_and_skip(threads):
    """A 1x3 convolution with stride 2 over pixels of 8 channels, and weights that lie transposed."""
    blocks = Blocks()
    x, weight = torch.randn(N, 11, 8), torch.randn(40, 24)
    pixels = blocks.holding(x)
    rows = replace(pixels, sizes=(5, 24), strides=(16, 1))
    transposed = constant(weight)
    by_machine(
        blocks,
        [Product(out := blocks.result(5, 40), rows, replace(transposed, sizes=(24, 40), strides=(1, 24)))],
        threads=threads,
    )
    truth = x.double().flatten(1).unfold(1, 24, 16) @ weight.T.double()
    torch.testing.assert_close(blocks.read(out).double(), truth, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scattered", ["rows", "result", "added"])
def test_rows_and_columns_of_a_product_may_lie_apart(scattered):
    blocks = Blocks()
    x, weight, more = torch.randn(N, 5, 7), torch.randn(7, 3), torch.randn(N, 5, 3)
    turned = [blocks.holding(one.mT.contiguous()).order([1, 0]) for one in (x, more)]
    rows = turned[0] if scattered == "rows" else blocks.holding(x)
    added = turned[1] if scattered == "added" else blocks.holding(more)
    out = blocks.result(3, 5).order([1, 0]) if scattered == "result" else blocks.result(5, 3)
    by_machine(blocks, [Product(out, rows, constant(weight), added)])
    truth = x.double() @ weight.double() + more.double()
    torch.testing.assert_close(blocks.read(out).double(), truth, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("m", "depth", "columns"), [(1, 1, 1), (1, 7, 33), (4, 16, 5), (3, 37, 40), (1, 70, 12)])
@pytest.mark.parametrize("side_by_side", ["columns", "depth", "neither"])
@pytest.mark.parametrize("start", ["none", "bias", "map"])
def test_products_of_two_computed_factors(m, depth, columns, side_by_side, start, threads):
    """Side by side in the weight lie its columns (as in weights times values of an attention) or its depth (scores)."""
    blocks = Blocks()
    x, weight = torch.randn(N, 2, m, depth), torch.randn(N, 2, depth, columns)
    rows, out, added = blocks.holding(x), blocks.result(2, m, columns), None
    if side_by_side == "columns":
        factor = blocks.holding(weight)
    elif side_by_side == "depth":
        factor = blocks.holding(weight.mT.contiguous()).order([0, 2, 1])
    else:
        wide = torch.full((N, 2, depth, columns, 2), math.nan)
        wide[..., 0] = weight
        factor = replace(
            blocks.holding(wide).narrow(3, 0, 1),
            sizes=(2, depth, columns),
            strides=(2 * depth * columns, 2 * columns, 2),
        )
    truth = x.double() @ weight.double()
    if start == "bias":
        data = torch.randn(columns)
        added, truth = constant(data), truth + data
    elif start == "map":
        data = torch.randn(N, 2, m, columns)
        added, truth = blocks.holding(data), truth + data
    by_machine(blocks, [Product(out, rows, factor, added)], threads=threads)
    torch.testing.assert_close(blocks.read(out).double(), truth, atol=1e-6 * depth, rtol=1e-5)


@pytest.mark.parametrize("play", [by_machine, by_torch])
def test_each_image_has_its_own_computed_weight(play):
    """Also where it has two dimensions, as a constant has."""
    blocks, x, weight = Blocks(), torch.randn(N, 3, 20), torch.randn(N, 20, 6)
    out = blocks.result(3, 6)
    play(blocks, [Product(out, blocks.holding(x), blocks.holding(weight))])
    torch.testing.assert_close(blocks.read(out).double(), x.double() @ weight.double(), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
def test_batches_of_products_broadcast(threads):
    """Heads that share their keys, and a weight that all images share."""
    x, shared = torch.randn(N, 4, 3, 20), torch.randn(N, 1, 20, 6)
    fixed = torch.randn(4, 20, 6)
    blocks = Blocks()
    rows, out, other = blocks.holding(x), blocks.result(4, 3, 6), blocks.result(4, 6, 3)
    result = Product(out, rows, blocks.holding(shared).expand((4, 20, 6)))
    turned = Product(other.order([0, 2, 1]), rows, constant(fixed))  # its columns do not lie side by side
    by_machine(blocks, [result, turned], threads=threads)
    torch.testing.assert_close(blocks.read(out).double(), x.double() @ shared.double(), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(blocks.read(other).mT.double(), x.double() @ fixed.double(), atol=2e-5, rtol=1e-5)


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_integers_move_and_become_numbers(dtype, threads):
    blocks = Blocks()
    levels = torch.randint(-(2**20), 2**20, (N, 6, 70))
    source = blocks.holding(levels)
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
