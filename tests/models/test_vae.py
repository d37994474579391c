"""The VAE: its bound, a linear-Gaussian model whose log p(x) is known, samples, all shapes and likelihoods."""

import math

import mpmath
import pytest
import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from fastgen import ops
from fastgen.models import VAE
from fastgen.models.decoded import draw, expected, gaussian_nll
from fastgen.ops.reconstruction_nll import LIKELIHOODS

SHAPES = [(1, 8, 8), (3, 5, 7), (1, 1, 9), (3, 1, 1), (1, 13, 2)]


def small(shape=(1, 5, 6), likelihood="bernoulli", levels=5, **options):
    return VAE(shape, 3, likelihood=likelihood, levels=levels, channels=4, hidden=16, n_mix=2, **options)


def images(model, n=4):
    return torch.randint(model.levels, (n, *model.shape))


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
    """With columns at right angles the true posterior is diagonal: every single draw is log p(x) exactly."""
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


# --- images


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("channels", [1, 3])
def test_draws_follow_the_likelihood(likelihood, channels):
    """Frequencies of the levels against exp(-nll), and the mean of the draws."""
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
    """A green that follows red through its coefficient: the joint frequencies are those of the likelihood."""
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


def test_a_constant_pixel_has_no_infinite_density():
    model = small(likelihood="gaussian", levels=17)
    log_variance = model.decode(torch.randn(5, 3) * 1e4).chunk(2, 1)[1]
    assert log_variance.min() >= math.log((2 / 16) ** 2 / 12) - 1e-4


@pytest.mark.parametrize("network", ["convolutional", "mlp"])
def test_the_gaussian_starts_at_the_scale_of_the_data(network):
    """Near the uniform's bits/dim, with gradients that can be followed, whatever the number of levels."""
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


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_compiles_into_one_graph(likelihood):
    model = small(likelihood=likelihood)
    x = images(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
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
