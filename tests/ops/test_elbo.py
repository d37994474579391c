"""The bound: its sign and parts, and a linear-Gaussian VAE whose log p(x) and posterior are known in closed form."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from fastgen.ops.elbo import elbo
from fastgen.ops.reconstruction_nll import reconstruction_nll


def test_parts_and_sign():
    params, target = torch.randn(4, 1, 3, 3), torch.randint(0, 2, (4, 1, 3, 3))
    kl = torch.rand(4, requires_grad=True)
    bound = elbo(params, target, kl, "bernoulli", beta=0.5)
    value, nll, returned = bound
    assert value.shape == nll.shape == returned.shape == (4,)
    torch.testing.assert_close(nll, reconstruction_nll(params, target, "bernoulli"))
    torch.testing.assert_close(returned, kl)
    torch.testing.assert_close(bound.elbo, -(nll + 0.5 * kl))
    bound.elbo.sum().backward()
    torch.testing.assert_close(kl.grad, torch.full((4,), -0.5))
    annealed = elbo(params, target, kl, "bernoulli", beta=torch.tensor(0.5))
    torch.testing.assert_close(annealed.elbo, bound.elbo)


@pytest.mark.parametrize("seed", range(5))
def test_gap_to_log_p_is_the_divergence_from_the_true_posterior(seed):
    """p(z) = N(0, 1), p(x|z) = N(w z + b, s^2 I): E_q over z by Gauss-Hermite quadrature, exact for a quadratic."""
    torch.manual_seed(seed)
    w, b, x = torch.randn(3, 3, dtype=torch.float64)
    log_variance = torch.randn((), dtype=torch.float64)
    noise = log_variance.exp()
    evidence = MultivariateNormal(b, torch.outer(w, w) + noise * torch.eye(3, dtype=torch.float64)).log_prob(x)
    variance = 1 / (1 + w.dot(w) / noise)
    posterior = Normal(variance * w.dot(x - b) / noise, variance.sqrt())

    def expected_bound(q):
        nodes, weights = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(8))
        z = q.mean + q.stddev * nodes
        mean = w * z.unsqueeze(1) + b
        params = torch.cat([mean, log_variance.expand_as(mean)], 1)
        kl = kl_divergence(q, Normal(torch.zeros(()).double(), 1.0)).expand(8)
        return (elbo(params, x.expand(8, 3), kl, "gaussian").elbo * weights).sum() / math.sqrt(2 * math.pi)

    q = Normal(torch.randn((), dtype=torch.float64), torch.rand((), dtype=torch.float64) + 0.1)
    gap = evidence - expected_bound(q)
    torch.testing.assert_close(gap, kl_divergence(q, posterior), rtol=1e-10, atol=1e-10)
    assert gap > 0
    torch.testing.assert_close(expected_bound(posterior), evidence, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("kl", "beta", "error", "message"),
    [
        (torch.zeros(3), 1.0, ValueError, r"kl must have the shape \(2,\)"),
        (torch.zeros(2, 1), 1.0, ValueError, r"kl must have the shape \(2,\)"),
        (torch.zeros(2).long(), 1.0, TypeError, "kl must be a float tensor"),
        (0.0, 1.0, TypeError, "kl must be a float tensor, got float"),
        (torch.zeros(2), -1.0, ValueError, "beta must be"),
        (torch.zeros(2), math.nan, ValueError, "beta must be"),
        (torch.zeros(2), "1", TypeError, "beta must be a number or a tensor of one element, got str"),
        (torch.zeros(2), torch.ones(2), ValueError, "beta must be one number"),
    ],
)
def test_wrong_arguments(kl, beta, error, message):
    with pytest.raises(error, match=message):
        elbo(torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 2, 2), kl, "bernoulli", beta=beta)
