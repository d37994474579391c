"""The instructions of the step machine of GPUs, in Triton's interpreter, against what `machine.definitions` says."""

import functools
import math

import pytest
import torch

from fastgen.kernels.sampler import words
from fastgen.sampling.machine import definitions
from fastgen.sampling.machine.language import AffineOffset, Lookup, Pointwise, Product, Rowwise, View, constant
from fastgen.sampling.machine.parts import HALF
from tests.sampling.machine.gpu_case import Blocks, N, run

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, where a number is not finite

SPECIAL = torch.tensor(
    [0.0, -0.0, 1e-30, -1e-30, 1e-7, -1e-7, 1e-3, -1e-3, 0.3, -0.34, 0.5, -0.7, 1, -1, 2.5, -9, 20, -30, 60, -87.2]
    + [88.2, 88.5, -103, 200, -200, math.inf, -math.inf, math.nan]
)
SELECTED = (torch.bool, torch.float32, torch.float32)
MASKED = ("hide", "erase", "keep")
OF_TWO = (
    *("add", "sub", "mul", "div", "maximum", "minimum", "gate", "glu", "elu", "leaky_relu", "eq", "lt", "le"),
    *MASKED,
)


def numbers_of(op):
    """One operand or two; the second is a number where torch takes no tensor."""
    values = torch.cat((SPECIAL, torch.linspace(-95, 95, 60), torch.linspace(-1.5, 1.5, 60)))
    a = values.expand(N, 2, -1).contiguous()
    if op in ("elu", "leaky_relu", "maximum", "minimum"):
        return a, 0.3
    b = torch.where(torch.arange(len(values)) % 5 > 0, values.roll(17), values).expand(N, 1, -1).contiguous()
    return (a, (b > 0).float() if op in MASKED else b) if op in OF_TWO else (a,)


@functools.cache
def pointwise_results():
    """All ops in one launch."""
    blocks, instructions, outs = Blocks(), [], {}
    for op in definitions.POINTWISE:
        operands = [blocks.view(x) if isinstance(x, torch.Tensor) else x for x in numbers_of(op)]
        outs[op] = blocks.empty(*numbers_of(op)[0].shape[1:])
        instructions.append(Pointwise(op, outs[op], tuple(operands)))
    run(blocks, instructions)
    return {op: blocks.read(view) for op, view in outs.items()}


def as_defined(op, *operands):
    return definitions.POINTWISE[op](*operands, out=torch.empty_like(operands[0]))


@pytest.mark.parametrize("op", definitions.POINTWISE)
def test_functions_are_as_near_to_the_truth_as_torch_is(op):
    found, operands = pointwise_results()[op], numbers_of(op)
    theirs = as_defined(op, *operands)
    truth = as_defined(op, *(x.double() if isinstance(x, torch.Tensor) else x for x in operands))
    told = ~operands[0].isinf() | (not op.startswith("gelu"))  # there torch itself is of two minds
    assert torch.equal(found.isnan() & told, theirs.isnan() & told)
    assert torch.equal(found.isinf() & told, theirs.isinf() & told)
    fine = truth.isfinite() & theirs.isfinite()
    bound = 4e-7 * truth.abs() + 1.2e-38 + (theirs - truth).abs()  # three units in the last place more than torch's
    if op in (
        "exp",
        "softplus",
        "expm1",
        "sigmoid",
        "silu",
        "gate",
        "glu",
    ):  # compiled, exp(x) is 2 to the power of a rounded product
        bound = bound + 1.2e-7 * (operands[-1].abs() * truth.abs()).nan_to_num(0)
    if op.startswith("gelu"):
        bound = bound + 1e-7 * operands[0].abs()  # far below zero it is the small difference of 1 and 1
    assert ((found - truth).abs() <= bound)[fine].all()


def test_every_op_of_the_language_is_there():
    assert set(words.OPS) >= {*definitions.POINTWISE, *definitions.ROWWISE}


@pytest.mark.parametrize("depth", [1, 7, 150])
def test_ops_along_rows(depth):
    blocks, instructions, outs = Blocks(), [], {}
    x = torch.randn(N, depth, 3) * 3 + 2
    source = blocks.view(x).order([1, 0])
    for op in definitions.ROWWISE:
        width = depth if op in ("softmax", "log_softmax", "normalized") else 1
        outs[op] = blocks.empty(3, width)
        instructions.append(Rowwise(op, outs[op], source, (1e-5,) if op == "normalized" else ()))
    run(blocks, instructions)
    for op, view in outs.items():
        rows = x.transpose(1, 2).double()
        truth = definitions.ROWWISE[op](rows, *([1e-5] if op == "normalized" else []))
        torch.testing.assert_close(blocks.read(view).double(), truth, atol=3e-6, rtol=3e-6, msg=op)


def test_products():
    blocks, instructions, expected = Blocks(), [], []
    for depth, columns in ((1, 1), (7, 31), (40, 64), (65, 97)):
        x, weight = torch.randn(N, 6, depth), torch.randn(depth, columns)
        for added in (None, torch.randn(columns), torch.randn(N, 6, columns)):
            out = blocks.empty(6, columns)
            view = None if added is None else constant(added) if added.dim() == 1 else blocks.view(added)
            instructions.append(Product(out, blocks.view(x), constant(weight), view))
            truth = x.double() @ weight.double()
            expected.append((out, truth if added is None else truth + added))
    run(blocks, instructions)
    for out, truth in expected:
        torch.testing.assert_close(blocks.read(out).double(), truth, atol=1e-4, rtol=1e-5)


def test_rows_and_columns_of_a_product_may_lie_apart():
    x, weight, more = torch.randn(N, 5, 7), torch.randn(7, 3), torch.randn(N, 5, 3)
    blocks, found = Blocks(), []
    for scattered in ("rows", "result", "added"):
        rows, added = (
            blocks.view(one.mT.contiguous()).order([1, 0]) if scattered == name else blocks.view(one)
            for name, one in (("rows", x), ("added", more))
        )
        stored = blocks.empty(3, 5) if scattered == "result" else blocks.empty(5, 3)
        out = stored.order([1, 0]) if scattered == "result" else stored
        found.append((scattered, stored, Product(out, rows, constant(weight), added)))
    run(blocks, [one for _, _, one in found])
    truth = x.double() @ weight.double() + more.double()
    for scattered, stored, _ in found:
        told = blocks.read(stored).mT if scattered == "result" else blocks.read(stored)
        torch.testing.assert_close(told.double(), truth, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_products_with_computed_weights(transposed):
    """Heads, queries and keys: (2, 5, 19) @ (2, 19, 37), and what broadcasts to that."""
    a, b = torch.randn(N, 2, 5, 19), torch.randn(N, 2, 19, 37)
    added = torch.randn(N, 1, 5, 37)
    blocks = Blocks()
    weight = blocks.view(b.mT.contiguous()).order([0, 2, 1]) if transposed else blocks.view(b)
    outs = [blocks.empty(2, 5, 37) for _ in range(2)]
    rows = blocks.view(a)
    run(blocks, [Product(outs[0], rows, weight), Product(outs[1], rows, weight, blocks.view(added))])
    truth = a.double() @ b.double()
    torch.testing.assert_close(blocks.read(outs[0]).double(), truth, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(blocks.read(outs[1]).double(), truth + added, atol=1e-5, rtol=1e-5)


def test_levels_and_lookups():
    blocks = Blocks()
    levels, table = torch.randint(9, (N, 4)), torch.randn(9, 70)
    index = blocks.view(levels)
    found, floats = blocks.empty(4, 70), blocks.empty(4)
    moved, back = (blocks.empty(4, dtype=torch.int64) for _ in range(2))
    run(blocks, [
        Lookup(found, constant(table), index), Pointwise("copy", floats, (index,)), Pointwise("copy", moved, (index,)),
        Pointwise("copy", back, (floats,)),
    ])  # fmt: skip
    assert torch.equal(blocks.read(found), table[levels])
    assert torch.equal(blocks.read(floats), levels.float())
    assert torch.equal(blocks.read(moved), levels) and torch.equal(blocks.read(back), levels)


def test_conditions_are_numbers():
    """A selection that drawn levels decide: 0 and 1 in the place of what is false and true."""
    x = torch.cat((SPECIAL, torch.randn(20))).expand(N, -1).contiguous()
    blocks = Blocks()
    source, condition, kept, rest = blocks.view(x), *(blocks.empty(x.shape[1], dtype=dtype) for dtype in SELECTED)
    run(blocks, [
        Pointwise("lt", condition, (source, 0.3)), Pointwise("keep", kept, (source, condition)),
        Pointwise("erase", rest, (-math.inf, condition)), Pointwise("add", rest, (rest, kept)),
    ])  # fmt: skip
    assert torch.equal(blocks.read(condition), (x < 0.3).float())
    torch.testing.assert_close(blocks.read(rest), torch.where(x < 0.3, x, -math.inf), atol=0, rtol=0, equal_nan=True)


def test_views_move_by_the_offsets_of_a_step():
    blocks = Blocks()
    source = blocks.view(torch.arange(12.0).repeat(N, 1))
    view = View(source.memory, (4,), (1,), AffineOffset(2, (3,)), 0)
    out = blocks.empty(4)
    run(blocks, [Pointwise("copy", out, (view,))], offsets=[99, 8], slots={view: 1})
    assert torch.equal(blocks.read(out), torch.tensor([8.0, 9, 10, 11]).repeat(N, 1))


def test_rows_of_rings_move_over_themselves_before_the_step():
    blocks = Blocks()
    x = torch.arange(3.0 * 300).view(N, 300)
    ring = blocks.view(x)
    numbers = blocks.view(torch.arange(9).view(N, 3))
    out = blocks.empty(300)
    moves = [(ring, slice(0, 290), slice(10, 300)), (numbers, slice(0, 2), slice(1, 3))]
    run(blocks, [Pointwise("copy", out, (ring,))], moves=moves)
    assert torch.equal(blocks.read(out), torch.cat((x[:, 10:], x[:, 290:]), 1))
    assert blocks.read(numbers).tolist() == [[1, 2, 2], [4, 5, 5], [7, 8, 8]]


@pytest.mark.parametrize("dtype", HALF)
def test_results_are_rounded_as_torch_rounds(dtype):
    """To the nearest, ties to even; to infinity and to zero, too."""
    step = torch.finfo(dtype).eps
    ties = 1 + step * torch.arange(9) / 4
    edges = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).tiny, torch.finfo(dtype).tiny * step])
    x = torch.cat((SPECIAL, ties, -ties, *(edges * factor for factor in (0.5, 0.999, 1, 1.001, 1.5, 2))))
    x = torch.cat((x, torch.randn(100))).expand(N, -1)
    blocks = Blocks()
    found, total = blocks.empty(x.shape[1], dtype=dtype), blocks.empty(x.shape[1], dtype=dtype)
    source = blocks.view(x)
    run(blocks, [Pointwise("copy", found, (source,)), Pointwise("add", total, (source, found))])
    copied = x.to(dtype)
    torch.testing.assert_close(blocks.read(found), copied.float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(blocks.read(total), (x + copied).to(dtype).float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", HALF)
def test_products_and_rows_in_half_precision_are_summed_in_float32(dtype):
    x, weight, added = torch.randn(N, 6, 70).to(dtype), torch.randn(70, 37).to(dtype), torch.randn(37).to(dtype)
    blocks = Blocks()
    rows, out, wide = blocks.view(x), blocks.empty(6, 37, dtype=dtype), blocks.empty(6, 37)
    softmax, contracted = blocks.empty(6, 70, dtype=dtype), blocks.empty(6, 6, dtype=dtype)
    run(blocks, [
        Product(out, rows, constant(weight), constant(added)), Product(wide, rows, constant(weight)),
        Rowwise("softmax", softmax, rows), Product(contracted, rows, rows.order([1, 0])),
    ])  # fmt: skip
    truth, eps = x.double() @ weight.double(), torch.finfo(dtype).eps
    torch.testing.assert_close(blocks.read(wide).double(), truth, atol=1e-5, rtol=1e-5)
    for view, exact in (
        (out, truth + added.double()),
        (softmax, x.double().softmax(-1)),
        (contracted, x.double() @ x.double().mT),
    ):
        found = blocks.read(view)
        assert torch.equal(found, found.to(dtype).float())
        torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=eps / 2 + 1e-6)
