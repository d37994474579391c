"""As an operator: registration, compilation, autocast, second derivatives; and its arguments."""

import math

import pytest
import torch

from fastgen.ops import reparameterize_kl
from tests.ops.latent_inputs import inputs

pytest.importorskip("triton")
IMPLS = ("reference", "triton")


def test_second_derivative_of_the_kernel_is_refused(device):
    mu, logvar, eps = inputs((2, 3), device=device)
    z, _ = reparameterize_kl(mu, logvar, eps=eps, impl="triton")
    (grad,) = torch.autograd.grad(z.square().sum(), mu, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


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
        ({"impl": "cuda"}, ValueError, "impl must be one of"),
    ],
)
def test_bad_arguments_are_named(change, error, words):
    arguments = {"mu": torch.zeros(2, 3), "logvar": torch.zeros(2, 3), **change}
    with pytest.raises(error, match=words):
        reparameterize_kl(arguments.pop("mu"), arguments.pop("logvar"), **arguments)
