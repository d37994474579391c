"""The reparameterization as an operator: registered, compiled, under autocast; its arguments and its launches."""

import math

import pytest
import torch

from fastgen.ops import reparameterize_kl
from tests.ops.reparameterize_kl_truth import IMPLS, inputs

pytest.importorskip("triton")


def test_repeats_bit_for_bit(device):
    mu, logvar, eps = inputs((3, 5000), device=device)
    first, second = (reparameterize_kl(mu, logvar, eps=eps, impl="triton") for _ in range(2))
    assert torch.equal(first[1], second[1]) and torch.equal(first[0], second[0])


@pytest.mark.parametrize("given", [True, False])
def test_operator_is_registered_correctly(given, device):
    mu, logvar, eps = inputs((3, 6), device=device)
    eps = eps if given else None
    seed = torch.tensor([5], device=device)
    torch.library.opcheck(torch.ops.fastgen.reparameterize_kl, (mu, logvar, eps, seed, 0.1))
    mu, logvar, eps = (None if x is None else x.detach() for x in (mu, logvar, eps))
    arguments = (mu, None, mu, logvar, eps, seed, 0.0, [True, True, given])
    torch.library.opcheck(torch.ops.fastgen.reparameterize_kl_backward, arguments)


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_in_one_graph(impl, device):
    mu, logvar, eps = inputs((3, 6), device=device)

    def loss(mu, logvar, eps):
        z, kl = reparameterize_kl(mu, logvar, eps=eps, free_bits=0.1, impl=impl)
        _, other = reparameterize_kl(mu, logvar, impl=impl)
        return z.square().sum() + kl.sum() + other.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(mu, logvar, eps)
    expected = loss(mu, logvar, eps)
    torch.testing.assert_close(compiled, expected)
    for a, b in zip(*(torch.autograd.grad(x, (mu, logvar, eps)) for x in (compiled, expected)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_computes_in_float32(impl, device):
    x, weight = torch.randn(4, 8, device=device), torch.randn(12, 8, device=device, requires_grad=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        mu, logvar = torch.nn.functional.linear(x, weight).chunk(2, dim=1)
        z, kl = reparameterize_kl(mu, logvar, impl=impl)
    assert z.dtype == torch.bfloat16 and kl.dtype == torch.float32
    (z.float().sum() + kl.sum()).backward()
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"mu": 3.0}, TypeError, "mu must be a float tensor, got float"),
        ({"logvar": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "logvar must be a float tensor, got torch.int64"),
        ({"logvar": torch.zeros(3, 2)}, ValueError, r"logvar must have the shape of mu, \(2, 3\), got \(3, 2\)"),
        ({"eps": torch.zeros(2, 1)}, ValueError, "eps must have the shape of mu"),
        ({"mu": torch.zeros(()), "logvar": torch.zeros(())}, ValueError, "batch dimension"),
        ({"free_bits": -0.5}, ValueError, "free_bits must be finite and not negative, got -0.5"),
        ({"free_bits": math.nan}, ValueError, "free_bits"),
        ({"free_bits": "1"}, TypeError, "free_bits must be a number, got str"),
        ({"generator": 3}, TypeError, "generator must be a torch.Generator or None, got int"),
        (
            {"generator": torch.Generator(), "eps": torch.zeros(2, 3)},
            ValueError,
            "eps and generator exclude each other",
        ),
        ({"impl": "cuda"}, ValueError, "impl must be one of"),
    ],
)
def test_bad_arguments_are_named(change, error, words):
    arguments = {"mu": torch.zeros(2, 3), "logvar": torch.zeros(2, 3), **change}
    with pytest.raises(error, match=words):
        reparameterize_kl(arguments.pop("mu"), arguments.pop("logvar"), **arguments)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("sizes", [(1, 1), (1, 10**7), (10**6, 2), (256, 2048), (8, 1023), (7, 1025), (1024, 4096)])
def test_the_launch_covers_every_column_once(sizes, itemsize):
    from fastgen.kernels.vae.layout import Rows, tiles_of

    count, columns = sizes
    tiles = tiles_of(Rows(count, 1, columns, ((columns, 0, 1),)), itemsize)
    before = max(tiles.ALIGNED, 4) - 1 if tiles.ODD or tiles.ALIGNED else 0  # what a group may have before its row
    assert tiles.splits * tiles.tiles * tiles.IN >= columns + before
    assert (tiles.splits - 1) * tiles.tiles * tiles.IN < columns + before
    assert tiles.splits <= 1024 and tiles.ROWS * tiles.OUT * tiles.IN == 1024
    sector = 32 // itemsize
    aligned = columns % 4 and columns >= sector and count * columns % sector == 0
    assert (sector if aligned else 0) == tiles.ALIGNED


@pytest.mark.parametrize("sizes", [(1, 20), (128, 20), (10**6, 20), (640, 100), (128, 40), (640, 200), (7, 12)])
def test_packed_tiles_hold_whole_rows(sizes):
    from fastgen.kernels.vae.layout import Rows, tiles_of

    count, columns = sizes
    tiles = tiles_of(Rows(count, 1, columns, ((2 * columns, 0, 1), (columns, 0, 1))), 4)
    assert tiles.PACKED and tiles.splits == tiles.tiles == 1 and tiles.held * columns % 8 == 0
    assert 0 < tiles.held * columns <= tiles.IN and tiles.held <= tiles.ROWS and columns <= 4 * tiles.OUT
    rows = Rows(count, 1, columns, ((columns, 0, 2), (columns, 0, 1)))
    assert not tiles_of(rows, 4).PACKED and not tiles_of(Rows(64, 1, 1024, ((1024, 0, 1),)), 4).PACKED


@pytest.mark.parametrize("sizes", [(3, 4), (3, 2000), (2000, 4), (64, 1024), (33, 36)])
def test_tiles_of_two_dimensions_cover_every_number_once(sizes):
    from fastgen.kernels.vae.layout import Rows, tiles_of

    outer, inner = sizes
    tiles = tiles_of(Rows(5, outer, inner, ((outer * inner, inner, 1), (outer * inner, 1, outer))), 4)
    count = -(-outer // tiles.OUT) * -(-inner // tiles.IN)
    assert tiles.OUT > 1 and (tiles.splits - 1) * tiles.tiles < count <= tiles.splits * tiles.tiles
    assert tiles.ROWS * tiles.OUT * tiles.IN == 1024
    assert min(tiles.OUT, outer) >= 32 or inner < 32 or outer <= tiles.OUT


def test_second_derivative_of_the_kernel_is_refused(device):
    mu, logvar, eps = inputs((2, 3), device=device)
    z, _ = reparameterize_kl(mu, logvar, eps=eps, impl="triton")
    (grad,) = torch.autograd.grad(z.square().sum(), mu, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()
