"""The VAE: its bound, a linear Gaussian model whose log p(x) is known, samples, all shapes and likelihoods."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from fastgen import ops
from fastgen.models import VAE
from fastgen.ops.reconstruction_nll import LIKELIHOODS
from tests.models.small_vaes import images, small

SHAPES = [(1, 8, 8), (3, 5, 7), (1, 1, 9), (3, 1, 1), (1, 13, 2)]


# --- every shape, likelihood and network


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("network", ["convolutional", "mlp"])
def test_scores_samples_and_learns_any_shape(shape, likelihood, network):
    model = small(shape, likelihood, network=network, n_classes=2)
    x, condition = images(model), torch.tensor([0, 1, 1, 0])
    bound = model(x, condition)
    assert bound.elbo.shape == bound.nll.shape == bound.kl.shape == (4,) and not bound.density
    model.loss(x, condition).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert model.log_prob(x, 3, condition).shape == (4,)
    drawn = model.sample(5, condition=torch.zeros(5, dtype=torch.long))
    assert drawn.shape == (5, *shape) and drawn.dtype == torch.int64
    assert drawn.min() >= 0 and drawn.max() < model.levels
    mean = model.reconstruct(x, condition)
    assert mean.shape == x.shape and mean.min() >= 0 and mean.max() <= model.levels - 1


def test_learns_two_images():
    model = small((1, 4, 4), levels=2)
    x = torch.tensor([[0, 1] * 8, [1, 0] * 8]).view(2, 1, 4, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(120):
        optimizer.zero_grad()
        model.loss(x).backward()
        optimizer.step()
    assert -model.log_prob(x, 100).mean() < 2  # two images, a bit of information: ln 2 = 0.69 nats at best
    assert torch.equal(model.reconstruct(x).round().long(), x)


# --- the bound


def test_the_bound_is_made_of_the_operations():
    model = small(likelihood="categorical").double()
    x = images(model)
    torch.manual_seed(3)
    bound = model.elbo(x, beta=0.5, free_bits=0.2)
    torch.manual_seed(3)
    z, kl = ops.reparameterize_kl(*model.encode(x), free_bits=0.2)
    nll = ops.reconstruction_nll(model.decode(z), x, "categorical")
    torch.testing.assert_close((bound.nll, bound.kl, bound.elbo), (nll, kl, -(nll + 0.5 * kl)))
    eps = (z - bound.mu) / (bound.logvar / 2).exp()
    torch.testing.assert_close(model.elbo(x, eps=eps).nll, nll)
    torch.testing.assert_close(bound.bits_per_dim, (nll + kl) / (30 * math.log(2)))
    posterior = Normal(bound.mu, (bound.logvar / 2).exp())
    each = kl_divergence(posterior, Normal(torch.zeros(3).double(), torch.ones(3).double()))
    torch.testing.assert_close(bound.kl_per_dimension, each.mean(0))
    assert bound.kl.sum() > each.sum()


def test_the_report_names_its_reduction_and_counts_active_units():
    model = small()
    bound = model.elbo(images(model, 6))
    spread = torch.tensor([[0.0, 1.0, 0.09]]) * torch.tensor([1.0, -1, 1, -1, 1, -1]).unsqueeze(
        1
    )  # variances 0, 1, .008
    bound = bound._replace(mu=spread)
    report = bound.report()
    assert report["active_units"] == 1 and len(report["kl_per_dimension"]) == 3
    for name in ("elbo", "nll", "kl", "bits_per_dim"):
        assert math.isclose(report[name], getattr(bound, name).mean().item(), rel_tol=1e-6)


def test_beta_may_be_annealed_and_free_bits_stop_the_kl():
    model = small()
    x = images(model)
    losses = []
    for beta in (0.0, torch.tensor(2.0)):
        torch.manual_seed(1)
        losses.append(model.loss(x, beta=beta).item())
    torch.manual_seed(1)
    bound = model.elbo(x)
    assert math.isclose(losses[0], bound.nll.mean().item(), rel_tol=1e-6)
    assert math.isclose(losses[1], (bound.nll + 2 * bound.kl).mean().item(), rel_tol=1e-6)
    generous = model.elbo(x, free_bits=50.0)
    assert torch.equal(generous.kl, torch.full((4,), 150.0))


# --- log p(x) in closed form


class LinearGaussian(VAE):
    """p(x | z) = N(W z + b, s^2), and q(z | x) = N(A x + c, exp(logvar)) that is not the true posterior."""

    def __init__(self):
        super().__init__((1, 1, 4), 2, likelihood="gaussian")
        self.double()
        self.weight, self.offset = torch.randn(4, 2, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
        self.log_variance = torch.tensor(-0.4, dtype=torch.float64)
        posterior = torch.linalg.inv(self.weight.T @ self.weight / self.noise + torch.eye(2))
        self.posterior_variance = posterior
        self.to_mean = posterior @ self.weight.T / self.noise
        self.shift = 0.3
        self.widen = 0.2

    @property
    def noise(self):
        return self.log_variance.exp()

    def true_posterior(self, x):
        return MultivariateNormal((x.flatten(1) - self.offset) @ self.to_mean.T, self.posterior_variance)

    def evidence(self, x):
        covariance = self.weight @ self.weight.T + self.noise * torch.eye(4)
        return MultivariateNormal(self.offset, covariance).log_prob(x.flatten(1))

    def encode(self, x, condition=None):
        mean = self.true_posterior(x).mean + self.shift
        return mean, (self.posterior_variance.diagonal().log() + self.widen).expand_as(mean)

    def decode(self, z, condition=None):
        mean = z @ self.weight.T + self.offset
        return torch.cat((mean, self.log_variance.expand_as(mean)), 1).view(-1, 2, 1, 4)


@pytest.fixture
def linear():
    return LinearGaussian(), torch.randn(3, 1, 1, 4, dtype=torch.float64)


def test_the_gap_of_the_bound_is_the_divergence_from_the_true_posterior(linear):
    model, x = linear
    copies = 40_000
    elbos = torch.stack([model.elbo(one.expand(copies, -1, -1, -1)).elbo for one in x])
    mean, logvar = model.encode(x)
    q = MultivariateNormal(mean, torch.diag_embed(logvar.exp()))
    gap = model.evidence(x) - elbos.mean(1)
    truth = kl_divergence(q, model.true_posterior(x))
    assert truth.min() > 0.1
    assert ((gap - truth).abs() < 4.5 * elbos.std(1) / math.sqrt(copies)).all()


def test_the_importance_weighted_bound_rises_to_log_p(linear):
    model, x = linear
    repeats = 4000
    bounds, errors = [], []
    for n_samples in (1, 3, 10, 40):
        estimates = model.log_prob(x[:1].expand(repeats, -1, -1, -1), n_samples)
        bounds.append(estimates.mean().item())
        errors.append(estimates.std().item() / math.sqrt(repeats))
    evidence = model.evidence(x[:1]).item()
    for lower, higher, error in zip(bounds[:-1], bounds[1:], errors[1:], strict=True):
        assert lower < higher < evidence + 4.5 * error
    assert evidence - bounds[-1] < 0.1 * (evidence - bounds[0])
    elbo = model.elbo(x[:1].expand(repeats, -1, -1, -1)).elbo
    assert abs(elbo.mean().item() - bounds[0]) < 4.5 * math.sqrt(2) * errors[0]
    torch.testing.assert_close(model.log_prob(x, 30_000), model.evidence(x), atol=0.05, rtol=0)


def test_the_true_posterior_leaves_no_gap(linear):
    """With orthogonal columns the true posterior is diagonal, and every draw of the estimate is log p(x) exactly."""
    model, x = linear
    model.weight = torch.linalg.qr(model.weight)[0] * torch.tensor([2.0, 0.5])
    model.posterior_variance = torch.linalg.inv(model.weight.T @ model.weight / model.noise + torch.eye(2))
    model.to_mean = model.posterior_variance @ model.weight.T / model.noise
    model.shift = model.widen = 0.0
    torch.testing.assert_close(model.log_prob(x, 1), model.evidence(x))
    torch.testing.assert_close(model.log_prob(x, 7), model.evidence(x))


def test_samples_in_turns_are_the_samples_at_once(linear, monkeypatch):
    model, x = linear
    generator = torch.Generator().manual_seed(5)
    at_once = model.log_prob(x, 7, generator=generator)
    monkeypatch.setattr("fastgen.models.vae.PARAMETERS_AT_ONCE", 2 * 3 * 8)  # two samples of three images
    generator.manual_seed(5)
    torch.testing.assert_close(model.log_prob(x, 7, generator=generator), at_once)


def test_log_prob_of_all_images_sums_to_one():
    model = small((1, 2, 3)).double()
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.mul_(2)
        every = torch.cartesian_prod(*[torch.arange(2)] * 6).view(-1, 1, 2, 3)
        total = model.log_prob(every, 3000).exp().sum().item()
    assert math.isclose(total, 1, abs_tol=0.02)


# --- use


def test_integers_are_floats_and_dtypes_are_kept():
    model = small(likelihood="gaussian", levels=17).double()
    x = images(model)
    floats = x.double() / 16 * 2 - 1
    assert torch.equal(model.encode(x)[0], model.encode(floats)[0])
    torch.manual_seed(0)
    from_doubles = model.elbo(floats)
    torch.manual_seed(0)
    from_floats = model.elbo(floats.float())
    torch.testing.assert_close(from_floats.elbo, from_doubles.elbo, rtol=1e-4, atol=0)
    assert from_doubles.elbo.dtype == torch.float64
    # A density has no bits/dim.
    assert from_floats.density and from_floats.bits_per_dim.isnan().all() and "bits_per_dim" not in from_floats.report()
    assert "bits_per_dim" in model.elbo(x).report()
    binary = small()
    x = images(binary)
    assert torch.equal(binary.encode(x)[0], binary.encode(x.float())[0])


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_compiles_into_one_graph(likelihood):
    model = small(likelihood=likelihood)
    x = images(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.manual_seed(2)
    expected_bound = model(x)
    torch.manual_seed(2)
    torch.testing.assert_close(compiled(x).elbo, expected_bound.elbo)


def test_autocast_gives_float32_nats():
    model = small(likelihood="categorical")
    with torch.autocast("cpu", torch.bfloat16):
        bound = model(images(model))
    assert bound.elbo.dtype == torch.float32 and bound.elbo.isfinite().all()


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda: VAE((1, 4), 2), ValueError, "shape"),
        (lambda: VAE((1, 4, 4), 0), ValueError, "latent_dim"),
        (lambda: VAE((1, 4, 4), 2, likelihood="poisson"), ValueError, "likelihood"),
        (lambda: VAE((2, 4, 4), 2, likelihood="logistic_mixture"), ValueError, "1 or 3 channels"),
        (lambda: VAE((1, 4, 4), 2, levels=1), ValueError, "levels"),
        (lambda: VAE((1, 4, 4), 2, n_classes=0), ValueError, "n_classes"),
        (lambda: VAE((1, 4, 4), 2, network="transformer"), ValueError, "network"),
        (lambda: VAE((1, 4, 4), 2, hidden=0), ValueError, "hidden"),
        (lambda: small().elbo(torch.zeros(1, 1, 5, 5)), ValueError, "x must have the shape"),
        (lambda: small().elbo(torch.full((1, 1, 5, 6), 0.5)), ValueError, "binarize"),
        (lambda: small(likelihood="categorical").elbo(torch.zeros(1, 1, 5, 6)), TypeError, "integer levels"),
        (lambda: small(n_classes=2).elbo(torch.zeros(1, 1, 5, 6)), ValueError, "condition is missing"),
        (lambda: small().decode(torch.zeros(1, 3), torch.zeros(1)), ValueError, "condition was given"),
        (
            lambda: small().decode(torch.zeros(1, 4)),
            ValueError,
            r"z must be a tensor of the shape \(B, 3\), got \(1, 4\)",
        ),
        (lambda: small().log_prob(torch.zeros(1, 1, 5, 6), 0), ValueError, "n_samples"),
        (lambda: small().sample(-1), ValueError, "n must be"),
        (lambda: small().sample(1, temperature=-1.0), ValueError, "temperature"),
        (lambda: small().interpolate(torch.zeros(1, 5, 6), torch.zeros(1, 5, 6), 1), ValueError, "steps"),
        (lambda: small().interpolate(torch.zeros(1, 5, 6), torch.zeros(2, 5, 6), 2), ValueError, "x1 and x2"),
        (lambda: small().traverse(torch.zeros(1, 1, 5, 6), 3, [0.0]), ValueError, "dimension"),
    ],
)
def test_bad_arguments_are_named(call, error, named):
    with pytest.raises(error, match=named):
        call()
