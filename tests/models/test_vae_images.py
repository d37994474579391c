"""Images of the VAE: draws, interpolations, and the Gaussian that is rounded to levels."""

import math

import mpmath
import pytest
import torch

from fastgen import ops
from fastgen.models import VAE
from fastgen.models.decoded import draw, expected, gaussian_nll
from fastgen.ops.reconstruction_nll import LIKELIHOODS
from tests.models.small_vaes import images, small


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("channels", [1, 3])
def test_draws_follow_the_likelihood(likelihood, channels):
    """The frequencies of levels agree with exp(-nll), the mean of draws with the expected image."""
    levels, n = 2 if likelihood == "bernoulli" else 5, 40_000
    model = small((channels, 1, 1), likelihood, levels)
    params = model.decode(torch.randn(1, 3) * 3)
    drawn = draw(params.expand(n, *params.shape[1:]), likelihood, channels, levels)
    colours = torch.cartesian_prod(*[torch.arange(levels)] * channels).view(-1, channels, 1, 1)
    probabilities = torch.exp(-model._nll(params.detach().expand(len(colours), *params.shape[1:]), colours))
    frequencies = torch.stack(
        [torch.zeros(levels).index_add(0, colours[:, c, 0, 0], probabilities) for c in range(channels)]
    )
    counts = torch.stack([torch.bincount(drawn[:, c, 0, 0], minlength=levels) for c in range(channels)]) / n
    assert ((counts - frequencies).abs() < 5 * (frequencies / n).sqrt() + 1e-4).all()
    if likelihood in ("bernoulli", "categorical"):
        mean_level = (frequencies * torch.arange(levels)).sum(1)
        torch.testing.assert_close(expected(params, likelihood, channels, levels).flatten().detach(), mean_level)


def test_colours_of_a_mixture_are_drawn_together():
    """Green depends on red through its coefficient; the joint frequencies agree with the likelihood."""
    levels, n = 4, 40_000
    params = torch.zeros(1, 20, 1, 1)
    params[:, 2:].view(3, 3, 2)[:, 1] = -1.5
    params[:, 2:].view(3, 3, 2)[0, 2] = 3.0  # red -> green
    drawn = draw(params.expand(n, -1, -1, -1), "logistic_mixture", 3, levels)[:, :, 0, 0]
    colours = torch.cartesian_prod(*[torch.arange(levels)] * 3)
    each = params.expand(len(colours), -1, -1, -1)
    truth = torch.exp(-ops.reconstruction_nll(each, colours[..., None, None], "logistic_mixture", levels=levels))
    counts = torch.bincount(drawn @ torch.tensor([16, 4, 1]), minlength=64) / n
    assert ((counts - truth).abs() < 5 * (truth / n).sqrt() + 1e-4).all()
    mean = expected(params, "logistic_mixture", 3, levels)
    torch.testing.assert_close(mean, torch.full_like(mean, 1.5))


def test_a_seed_repeats_a_sample_and_temperature_zero_is_the_middle():
    model = small(n_classes=3)
    condition = torch.tensor([0, 1, 2])
    first, second = (model.sample(3, seed=4, condition=condition) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, model.sample(3, seed=5, condition=condition))
    middle = model.sample(3, temperature=0, condition=condition, expected=True)
    torch.testing.assert_close(middle, model.expected(torch.zeros(3, 3), condition))
    assert not torch.allclose(middle[0], middle[1])  # the class matters
    assert model.sample(0, condition=condition[:0]).shape == (0, 1, 5, 6)


def test_interpolation_joins_the_reconstructions():
    model = small(likelihood="categorical", n_classes=2)
    x1, x2, condition = images(model, 2), images(model, 2), torch.tensor([0, 1])
    path = model.interpolate(x1, x2, 4, condition)
    assert path.shape == (4, 2, 1, 5, 6)
    torch.testing.assert_close(path[0], model.reconstruct(x1, condition))
    torch.testing.assert_close(path[-1], model.reconstruct(x2, condition))
    third = torch.lerp(model.encode(x1, condition)[0], model.encode(x2, condition)[0], 1 / 3)
    torch.testing.assert_close(path[1], model.expected(third, condition))
    single = small()
    x1, x2 = images(single, 2)
    assert single.interpolate(x1, x2, 3).shape == (3, 1, 5, 6)


def test_a_traversal_moves_one_dimension():
    model = small()
    x = images(model, 2)
    mu, _ = model.encode(x)
    path = model.traverse(x, 1, [-2.0, 0.5])
    assert path.shape == (2, 2, 1, 5, 6)
    moved = mu.clone()
    moved[:, 1] = 0.5
    torch.testing.assert_close(path[1], model.expected(moved))


# --- the Gaussian


def test_a_constant_pixel_has_no_infinite_density():
    model = small(likelihood="gaussian", levels=17)
    log_variance = model.decode(torch.randn(5, 3) * 1e4).chunk(2, 1)[1]
    assert log_variance.min() >= math.log((2 / 16) ** 2 / 12) - 1e-4


@pytest.mark.parametrize("network", ["convolutional", "mlp"])
def test_the_gaussian_starts_at_the_scale_of_the_data(network):
    """For any number of levels, bits/dim start near those of a uniform distribution, with moderate gradients."""
    for levels in (2, 5, 256, 2**16):
        model = VAE((1, 8, 8), 3, likelihood="gaussian", levels=levels, network=network, channels=4, hidden=16)
        bound = model.elbo(images(model, 64))
        assert abs(bound.bits_per_dim.mean().item() - math.log2(levels)) < 1.5
        model.loss(images(model)).backward()
        assert max(parameter.grad.abs().max() for parameter in model.parameters()) < 100


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gaussian_of_levels_sums_to_one_and_is_exact(levels, dtype):
    mean = torch.tensor([-3.0, -1.0, -0.3, 0.0, 0.77, 1.0, 40.0], dtype=dtype)
    log_variance = torch.tensor([-11.0, -6.0, -2.0, 0.0, 5.0], dtype=dtype)
    params = torch.cartesian_prod(mean, log_variance).unsqueeze(1)  # (35, 1, 2)
    every = torch.arange(levels)
    each = params.expand(-1, levels, -1).reshape(-1, 2, 1, 1).requires_grad_()
    nll = gaussian_nll(each, every.repeat(len(params)).view(-1, 1, 1, 1), levels)
    total = torch.exp(-nll.double()).view(-1, levels).sum(1)
    exact = dtype == torch.float64
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-9 if exact else 1e-4)
    nll.sum().backward()
    assert nll.isfinite().all() and each.grad.isfinite().all()
    chosen = torch.randperm(len(nll))[:200]
    found = nll[chosen].detach()
    with mpmath.workdps(60):
        truth = [_exact_nll(each[i].flatten().tolist(), int(every[i % levels]), levels) for i in chosen.tolist()]
    truth = torch.tensor(truth, dtype=torch.float64)
    torch.testing.assert_close(found.double(), truth, rtol=1e-8 if exact else 1e-5, atol=1e-8 if exact else 2e-5)


def _exact_nll(params, level, levels):
    mean, deviation = mpmath.mpf(params[0]), mpmath.exp(mpmath.mpf(params[1]) / 2)
    width = mpmath.mpf(2) / (levels - 1)
    ends = [(level * width - 1 + side * width / 2 - mean) / deviation for side in (-1, 1)]
    if sum(ends) > 0:  # in the lower tail, where nothing cancels
        ends = [-end for end in reversed(ends)]
        first, last = level == levels - 1, level == 0
    else:
        first, last = level == 0, level == levels - 1
    below = mpmath.mpf(0) if first else mpmath.ncdf(ends[0])
    return float(-mpmath.log((1 if last else mpmath.ncdf(ends[1])) - below))
