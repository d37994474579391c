"""Against float64, mpmath and torch.distributions: values, gradients, layouts, extremes."""

import math

import mpmath
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from fastgen.ops import reparameterize_kl
from fastgen.ops.reparameterize_kl import reparameterize_kl_reference
from tests.ops.reparameterize_kl_truth import IMPLS, gradients, inputs, truth

pytest.importorskip("triton")
FINITE = torch.finfo(torch.float32).max


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5,), (1, 1), (3, 37), (16, 37), (2, 2, 3, 5), (67, 3), (2, 2500)])
def test_values_and_gradients_equal_float64(shape, dtype, impl, device):
    variables = inputs(shape, dtype, device)
    mu, logvar, eps = variables
    z, kl = reparameterize_kl(mu, logvar, eps=eps, free_bits=0.1, impl=impl)
    assert z.dtype == dtype and kl.dtype == torch.float32 and kl.shape == shape[:1]
    expected_z, expected_kl, expected_grads = truth(variables, free_bits=0.1)
    # Arithmetic is float32 whatever the storage; what is stored in half precision is rounded once.
    rounding = 2e-6 + (0 if dtype == torch.float32 else torch.finfo(dtype).eps)
    torch.testing.assert_close(z.double(), expected_z, rtol=rounding, atol=rounding)
    torch.testing.assert_close(kl.double(), expected_kl, rtol=2e-6, atol=1e-6)
    for grad, expected in zip(gradients(z, kl, variables), expected_grads, strict=True):
        torch.testing.assert_close(grad.double(), expected, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("impl", IMPLS)
def test_kl_is_exact_over_the_whole_range(impl, device):
    small = [s * 10.0**e for e in range(-30, 0) for s in (-1.0, 1.0, 0.37)]
    logvar = torch.tensor(
        [*small, *torch.linspace(-0.99, 0.99, 34).tolist(), *torch.linspace(-100, 80, 361).tolist()], device=device
    )
    _, kl = reparameterize_kl(torch.zeros_like(logvar), logvar, eps=torch.zeros_like(logvar), impl=impl)
    with mpmath.workdps(60):
        expected = [float((mpmath.expm1(v) - mpmath.mpf(v)) / 2) for v in logvar.double().tolist()]
    assert kl.min() >= 0
    torch.testing.assert_close(kl.double().cpu(), torch.tensor(expected).double(), rtol=2e-6, atol=1e-37)


@pytest.mark.parametrize("impl", IMPLS)
def test_standard_deviation_is_exact_over_the_whole_range(impl, device):
    logvar = torch.linspace(-100, 80, 721, device=device)
    z, _ = reparameterize_kl(torch.zeros_like(logvar), logvar, eps=torch.ones_like(logvar), impl=impl)
    torch.testing.assert_close(z.double(), (logvar.double() / 2).exp(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_out_of_range_stays_finite_and_is_pulled_back(impl, device):
    extreme = [-FINITE, -1e20, -200.0, -100.5, 80.5, 1000.0, 1e20, FINITE]
    logvar = torch.tensor([extreme, extreme[::-1]], device=device, requires_grad=True)
    mu = torch.tensor([[0.0] * 8, [FINITE] * 8], device=device, requires_grad=True)
    z, kl = reparameterize_kl(mu, logvar, eps=torch.zeros_like(mu), impl=impl)
    assert z.isfinite().all() and kl.isfinite().all() and (kl >= 0).all()
    grad_mu, grad_logvar = torch.autograd.grad(kl.sum(), (mu, logvar))
    torch.testing.assert_close(grad_mu, mu.detach())
    torch.testing.assert_close(grad_logvar, 0.5 * torch.expm1(logvar.detach().clamp(-100, 80)))
    (grad_of_z,) = torch.autograd.grad(
        reparameterize_kl(mu, logvar, eps=torch.ones_like(mu), impl=impl)[0].sum(), logvar
    )
    assert (grad_of_z == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_below_the_range_only_the_linear_term_goes_on(impl, device):
    logvar = torch.tensor([-100.0, -200.0, 80.0, 81.0], device=device)
    _, kl = reparameterize_kl(torch.zeros_like(logvar), logvar, impl=impl)
    high = 0.5 * math.expm1(80) - 40
    torch.testing.assert_close(kl.double().cpu(), torch.tensor([49.5, 99.5, high, high]).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("which", [0, 1])
def test_nan_gives_nan_in_its_row_alone(which, impl, device):
    variables = [torch.zeros(3, 5, device=device) for _ in range(2)]
    variables[which][1, 2] = math.nan
    z, kl = reparameterize_kl(*variables, free_bits=0.5, impl=impl)
    assert kl.isnan().tolist() == [False, True, False]
    assert z.isnan().nonzero().tolist() == [[1, 2]]


def test_agrees_with_torch_distributions(device):
    mu, logvar, _ = inputs((7, 11), device=device)
    posterior = Normal(mu, (logvar / 2).exp())
    expected = kl_divergence(posterior, Normal(torch.zeros_like(mu), torch.ones_like(mu))).sum(1)
    torch.testing.assert_close(reparameterize_kl(mu, logvar, impl="triton")[1], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_free_bits_bound_each_dimension_and_stop_its_gradient(impl, device):
    mu = torch.tensor([[0.0, 3.0]], device=device, requires_grad=True)
    logvar = torch.full((1, 2), 0.1, device=device, requires_grad=True)
    _, kl = reparameterize_kl(mu, logvar, free_bits=0.5, impl=impl)
    torch.testing.assert_close(kl.item(), 0.5 + 0.5 * (math.expm1(0.1) - 0.1 + 9), rtol=1e-6, atol=0)
    for grad in torch.autograd.grad(kl.sum(), (mu, logvar)):
        assert grad[0, 0] == 0 and grad[0, 1] > 0


LAYOUTS = {
    "halves": lambda x: torch.cat((x, x), 1).chunk(2, dim=1)[0],
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "every second": lambda x: torch.repeat_interleave(x, 2, 3)[..., ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_changes_nothing(layout, device):
    variables = inputs((2, 3, 4, 5), device=device)
    z, kl = reparameterize_kl(variables[0], variables[1], eps=variables[2], impl="triton")
    strided = [LAYOUTS[layout](x.detach()).requires_grad_() for x in variables]
    assert not strided[0].is_contiguous()
    z2, kl2 = reparameterize_kl(strided[0], variables[1], eps=strided[2], impl="triton")
    assert torch.equal(z, z2) and (z2.stride() == strided[0].stride() or layout != "channels last")
    torch.testing.assert_close(kl, kl2, rtol=1e-6, atol=0)  # the sum is in the order of the memory
    grads = gradients(z, kl, variables)
    grads2 = gradients(z2, kl2, (strided[0], variables[1], strided[2]))
    assert all(torch.equal(a, b) for a, b in zip(grads, grads2, strict=True))


def test_halves_and_channels_last_are_not_copied():
    from fastgen.kernels.vae.layout import Rows, as_rows

    half = torch.randn(2, 6, 4, 5).chunk(2, dim=1)[1]
    last = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    assert as_rows((0, 1, 2, 3), half, None) == ((half, None), Rows(2, 1, 60, ((120, 0, 1), None)))
    tensors, rows = as_rows((0, 1, 2, 3), half, last)
    assert tensors[1] is last and rows == Rows(2, 3, 20, ((120, 20, 1), (60, 1, 3)))


@pytest.mark.parametrize("free_bits", [0.0, 0.1])
@pytest.mark.parametrize("rows, columns", [(1, 20), (25, 20), (110, 20), (14, 12), (9, 100), (5, 200)])
def test_rows_without_gaps(rows, columns, free_bits, device):
    """Short rows one behind the other in a tile, dense and in one half of a layer."""
    variables = inputs((rows, columns), device=device)
    expected_z, expected_kl, expected = truth(variables, free_bits=free_bits)
    halves = [torch.cat((x, x), 1).detach().chunk(2, 1)[1].requires_grad_() for x in variables]
    for mu, logvar, eps in (variables, halves):
        z, kl = reparameterize_kl(mu, logvar, eps=eps, free_bits=free_bits, impl="triton")
        torch.testing.assert_close(z.double(), expected_z, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(kl.double(), expected_kl, rtol=2e-6, atol=1e-6)
        for grad, wanted in zip(gradients(z, kl, (mu, logvar, eps)), expected, strict=True):
            torch.testing.assert_close(grad.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(3, 8, 6, 6), (2, 40, 5, 8), (2, 3, 5, 7)])
@pytest.mark.parametrize("given", [True, False])
def test_two_orders_of_memory(size, given, device):
    """The log-variance lies in another order than the mean: by tiles, and where groups of four straddle, divided."""
    mu, logvar, eps = inputs(size, device=device)
    last = logvar.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    results = []
    for variables in ((mu, logvar, eps), (mu, last, eps)):
        torch.manual_seed(4)
        z, kl = reparameterize_kl(*variables[:2], eps=variables[2] if given else None, impl="triton")
        weights = torch.arange(z.numel(), device=device).view_as(z).sin()
        grads = torch.autograd.grad((z * weights).sum() + (kl * weights.flatten(1)[:, 0]).sum(), variables[: 2 + given])
        results.append((z, *grads))
        torch.testing.assert_close(kl, reparameterize_kl_reference(*variables[:2], eps=variables[2])[1])
    for one, other in zip(*results, strict=True):  # compiled, each layout contracts multiply-adds of its own
        torch.testing.assert_close(one, other, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 6), (16, 37)])
def test_expanded_gradients_are_read_by_their_strides(shape, device):
    mu, logvar, eps = inputs(shape, device=device)
    z, kl = reparameterize_kl(mu, logvar, eps=eps, impl="triton")
    grads = torch.autograd.grad(z.sum() + 2 * kl.sum(), (mu, logvar))
    torch.testing.assert_close(grads[0], 1 + 2 * mu)
    torch.testing.assert_close(grads[1], 0.5 * (logvar / 2).exp() * eps + torch.expm1(logvar))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2)])
@pytest.mark.parametrize("part", ["z", "kl", "both"])
def test_only_what_is_asked_for(part, wanted, impl, device):
    variables = [x.detach() for x in inputs((3, 5), device=device)]
    for index in wanted:
        variables[index].requires_grad_()
    z, kl = reparameterize_kl(variables[0], variables[1], eps=variables[2], impl=impl)
    loss = {"z": z.square().sum(), "kl": kl.square().sum(), "both": z.square().sum() + kl.square().sum()}[part]
    if not loss.requires_grad:
        return
    mu, logvar, eps = wide = [x.detach().double().requires_grad_() for x in variables]
    z, kl = reparameterize_kl_reference(mu, logvar, eps=eps)
    expected_loss = {"z": z.square().sum(), "kl": kl.square().sum(), "both": z.square().sum() + kl.square().sum()}[part]
    asked = [variables[index] for index in wanted]
    grads = torch.autograd.grad(loss, asked, allow_unused=True)
    expected = torch.autograd.grad(expected_loss, [wide[index] for index in wanted], allow_unused=True)
    for grad, exact, x in zip(grads, expected, asked, strict=True):
        exact = torch.zeros_like(x) if exact is None else exact.to(x.dtype)
        torch.testing.assert_close(torch.zeros_like(x) if grad is None else grad, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0,)])
def test_empty(shape, impl, device):
    mu, logvar, _ = inputs(shape, device=device)
    z, kl = reparameterize_kl(mu, logvar, impl=impl)
    assert z.shape == shape and torch.equal(kl, torch.zeros(shape[0], device=device))
    assert torch.autograd.grad(z.sum() + kl.sum(), mu)[0].shape == shape


def test_mixed_dtypes_widen(device):
    mu = torch.randn(3, 4, device=device, dtype=torch.bfloat16, requires_grad=True)
    logvar = torch.randn(3, 4, device=device, requires_grad=True)
    z, kl = reparameterize_kl(mu, logvar, impl="triton")
    assert z.dtype == torch.float32
    grads = torch.autograd.grad(z.sum() + kl.sum(), (mu, logvar))
    assert [grad.dtype for grad in grads] == [torch.bfloat16, torch.float32]


def test_float64_keeps_its_precision(device):
    mu, logvar, eps = (x.detach().double().requires_grad_() for x in inputs((3, 4), device=device))
    kl = reparameterize_kl(mu, logvar, eps=eps, impl="triton")[1]
    expected = 0.5 * (torch.expm1(logvar) - logvar + mu.square()).sum(1)
    torch.testing.assert_close(kl, expected, rtol=1e-13, atol=1e-13)

    def function(mu, logvar, eps):
        return reparameterize_kl(mu, logvar, eps=eps, free_bits=0.01)

    assert torch.autograd.gradcheck(function, (mu, logvar, eps))
    assert torch.autograd.gradgradcheck(function, (mu, logvar, eps))


@pytest.mark.gpu
def test_offsets_beyond_int32():
    rows, columns = 2, 2**30 + 8
    mu = torch.zeros(rows, columns, device="cuda", dtype=torch.bfloat16)
    mu[1, -1] = 3
    z, kl = reparameterize_kl(mu, mu.new_zeros(()).expand_as(mu), eps=mu, impl="triton")
    assert z[1, -1] == 6 and kl.tolist()[0] == 0 and abs(kl.tolist()[1] - 4.5) < 1e-4


def test_a_layout_changes_nothing_where_rows_share_a_sector(device):
    """Both rows write the sector, and must write the same: ptxemu finds a race where they do not."""
    mu, logvar, eps = (torch.randn(8, 129, device=device, requires_grad=True) for _ in range(3))
    grad_kl = torch.arange(1.0, 9.0, device=device)
    grads = []
    for impl in ("triton", "reference"):
        kl = reparameterize_kl(mu, logvar, eps=eps, impl=impl)[1]
        grads.append(torch.autograd.grad(kl, (mu, logvar), grad_kl))
    for found, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
