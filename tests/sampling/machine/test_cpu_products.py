"""Products of the step machine of the CPU, with constants and of two computed factors, against float64."""

import math
from dataclasses import replace

import pytest
import torch

from fastgen.sampling.machine.language import Product, constant
from tests.sampling.machine.played import Blocks, N, by_machine, by_torch


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


@pytest.mark.parametrize("count", range(1, 10))
def test_a_sum_does_not_depend_on_the_number_of_rows(count):
    """That a thread has: all of them, those of its image, or the columns of all."""
    blocks = Blocks()
    x, weight, more = torch.randn(N, count, 70), torch.randn(70, 200), torch.randn(N, count, 200)
    rows, added, found = blocks.holding(x), blocks.holding(more), []
    for threads in (1, N, N + 1):
        by_machine(blocks, [Product(out := blocks.result(count, 200), rows, constant(weight), added)], threads=threads)
        found.append(blocks.read(out))
    truth = x.double() @ weight.double() + more.double()
    torch.testing.assert_close(found[0].double(), truth, atol=7e-5, rtol=1e-5)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


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


@pytest.mark.parametrize("start", ["none", "map"])
@pytest.mark.parametrize("groups", [1, 3, 9, 40, 71])
def test_groups_side_by_side(groups, start):
    """As of a depthwise convolution; shared by any number of threads, to the last bit."""
    x, weight, before = torch.randn(N, 33, groups), torch.randn(33, groups), torch.randn(N, groups)
    found = []
    for threads in (1, 2, 3):
        blocks = Blocks()
        out = blocks.result(groups, 1, 1)
        rows = blocks.holding(x).order([1, 0]).as_strided((groups, 1, 33), (1, 0, groups))
        factor = constant(weight).as_strided((groups, 33, 1), (1, groups, 0))
        added = None if start == "none" else blocks.holding(before).as_strided((groups, 1, 1), (1, 0, 0))
        by_machine(blocks, [Product(out, rows, factor, added)], threads=threads)
        found.append(blocks.read(out).flatten(1))
    truth = (x.double() * weight.double()).sum(1) + (0 if start == "none" else before.double())
    torch.testing.assert_close(found[0].double(), truth, atol=1e-5, rtol=1e-5)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


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
