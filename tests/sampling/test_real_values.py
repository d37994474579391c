"""Real-valued pixels: quantiles and densities by hand, and images of models by every backend."""

import math
import re

import pytest
import torch
from torch import nn
from torch.distributions import (
    AffineTransform,
    Categorical,
    MixtureSameFamily,
    Normal,
    SigmoidTransform,
    TransformedDistribution,
    Uniform,
)

from fastgen import Gaussian, GaussianMixture, Logistic, accelerate
from tests.sampling.zoo_case import DataMask

SHAPES = {"grey": (1, 4, 5), "colours": (3, 3, 4)}


def network(shape, outputs):
    torch.manual_seed(0)
    model = nn.Sequential(
        DataMask(shape[0], 12, 3, True), nn.ELU(), DataMask(12, 12, 3), nn.ELU(), nn.Conv2d(12, outputs, 1)
    )
    return model.eval()


def test_draws_are_quantiles():
    params = torch.tensor([[0.5, -2.0, 0.0, math.log(9)]])
    below = torch.tensor([[0.0, 0.5, 1 - 2**-24]])
    for channel, (mean, deviation) in enumerate(((0.5, 1.0), (-2.0, 3.0))):
        for u in (0.1, 0.5, 0.977):
            noise = torch.full((1, 2), u)
            drawn = Gaussian().draw(params, noise, channel, torch.zeros(1, channel))
            assert drawn.dtype == torch.float32
            torch.testing.assert_close(drawn, Normal(mean, deviation).icdf(torch.tensor([u])), atol=1e-4, rtol=1e-4)
            cold = Gaussian(temperature=0).draw(params, noise, channel, torch.zeros(1, channel))
            assert cold.item() == mean
    for u in below[0]:
        assert Gaussian().draw(params, u.expand(1, 2), 0, torch.zeros(1, 0)).isfinite()


def logistic(mean, scale):
    """As the documentation of torch.distributions builds it."""
    base = Uniform(torch.zeros_like(mean), torch.ones_like(mean))
    return TransformedDistribution(base, [SigmoidTransform().inv, AffineTransform(mean, scale)])


def test_draws_of_a_logistic_are_quantiles():
    params = torch.tensor([[0.5, -2.0, 0.0, math.log(3)]])
    for channel, (mean, scale) in enumerate(((0.5, 1.0), (-2.0, 3.0))):
        for u in (0.1, 0.5, 0.977):
            drawn = Logistic().draw(params, torch.full((1, 2), u), channel, torch.zeros(1, channel))
            assert drawn.item() == pytest.approx(mean + scale * (math.log(u) - math.log(1 - u)), abs=1e-5)
            warm = Logistic(temperature=2).draw(params, torch.full((1, 2), u), channel, torch.zeros(1, channel))
            assert warm.item() - mean == pytest.approx(2 * (drawn.item() - mean), abs=1e-5)
            assert Logistic(temperature=0).draw(params, torch.full((1, 2), u), channel, None).item() == mean
    ends = torch.tensor([0.0, 1 - 2**-24]).unsqueeze(1)
    drawn = Logistic().draw(torch.zeros(2, 2), ends, 0, None)
    torch.testing.assert_close(drawn, torch.tensor([-25, 25]) * math.log(2), atol=1e-3, rtol=0)
    grid = (torch.arange(10000) + 0.5) / 10000
    values = Logistic().draw(torch.tensor([[1.0, 0.5]]).expand(10000, -1), grid.unsqueeze(1), 0, None)
    assert values.std().item() == pytest.approx(math.exp(0.5) * math.pi / math.sqrt(3), rel=2e-3)


def test_densities_of_a_logistic():
    values, params = 3 * torch.randn(6, 2, 4, dtype=torch.float64), torch.randn(6, 4, 4, dtype=torch.float64)
    expected = logistic(params[:, :2], params[:, 2:].exp()).log_prob(values).sum((1, 2))
    torch.testing.assert_close(Logistic().log_prob(params, values), expected)
    far = Logistic().log_prob(torch.zeros(1, 2), torch.tensor([[1e4]]))  # where the sigmoid's own density underflows
    assert far.item() == pytest.approx(-1e4)
    grid = torch.linspace(-60, 60, 24001, dtype=torch.float64).unsqueeze(1)
    density = Logistic().log_prob(torch.tensor([[0.3, 0.2]]).expand(len(grid), -1), grid).exp()
    assert torch.trapezoid(density, grid[:, 0]).item() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("channels", [1, 3])
def test_densities_by_hand(channels):
    values, m = torch.randn(6, channels, 4, dtype=torch.float64), 3
    params = torch.randn(6, 2 * channels, 4, dtype=torch.float64)
    expected = Normal(params[:, :channels], (params[:, channels:] / 2).exp()).log_prob(values).sum((1, 2))
    torch.testing.assert_close(Gaussian().log_prob(params, values), expected)
    params = torch.randn(6, m * (1 + 2 * channels), 4, dtype=torch.float64)
    means, log_variances = params[:, m:].view(6, channels, 2, m, 4).permute(2, 0, 4, 3, 1)  # (2, n, 4, M, C)
    components = torch.distributions.Independent(Normal(means, (log_variances / 2).exp()), 1)
    mixture = MixtureSameFamily(Categorical(logits=params[:, :m].mT), components)
    torch.testing.assert_close(GaussianMixture(m).log_prob(params, values), mixture.log_prob(values.mT).sum(1))


def test_a_mixture_draws_its_components_as_often_as_its_logits_say():
    params = torch.tensor([[math.log(0.2), math.log(0.8), -5.0, 5.0, -4.0, -4.0]]).expand(5000, -1)
    grid = (torch.arange(5000) + 0.5) / 5000
    noise = torch.stack((grid, grid[torch.randperm(5000)]), 1)
    drawn = GaussianMixture(2).draw(params, noise, 0, torch.zeros(5000, 0))
    assert (drawn < 0).float().mean() == pytest.approx(0.2, abs=1e-3)
    assert drawn[drawn > 0].mean() == pytest.approx(5, abs=0.01)
    assert drawn[drawn > 0].std() == pytest.approx(math.exp(-2), abs=0.01)
    assert (GaussianMixture(2, temperature=0).draw(params, noise, 0, torch.zeros(5000, 0)) == 5).all()


@torch.no_grad()
def plain_loop(model, shape, distribution, noise):
    images = torch.zeros(len(noise), *shape)
    for i in range(shape[1]):
        for j in range(shape[2]):
            for c in range(shape[0]):
                at = model(images)[..., i, j]
                images[:, c, i, j] = distribution.draw(at, noise[..., i, j], c, images[:, :c, i, j])
    return images


@pytest.mark.parametrize("backend", ["naive", "fixed_point", "eager", "compiled"])
@pytest.mark.parametrize("kind", ["gaussian", "logistic", "mixture"])
@pytest.mark.parametrize("name", SHAPES)
def test_images_of_real_values(name, kind, backend):
    shape = SHAPES[name]
    distribution = {"gaussian": Gaussian(), "logistic": Logistic(), "mixture": GaussianMixture(2)}[kind]
    model = network(shape, 2 * (1 + 2 * shape[0]) if kind == "mixture" else 2 * shape[0])
    sampler = accelerate(model, shape, distribution=distribution, backend=backend)
    noise = torch.rand(sampler.noise_shape(3))
    expected = plain_loop(model, shape, distribution, noise)
    images, nats = sampler.sample(3, noise=noise, return_log_prob=True)
    assert images.dtype == torch.float32 and images.std() > 0.3
    if backend in ("naive", "fixed_point"):
        assert torch.equal(images, expected)
    else:
        torch.testing.assert_close(images, expected, atol=1e-4, rtol=1e-4)
        assert sampler.stats.passes == 0
        text = sampler.explain()
        assert "real values differ in their last bits" in text and "not measured" not in text
        margin = float(re.search(r"margin: .* in a parameter, (\S+) in a value that is drawn", text)[1])
        with torch.no_grad():  # by hand: the values of the same noise from the model's own parameters for these images
            whole = model(images).movedim(1, -1).flatten(0, 2)
        pixels, u = (one.movedim(1, -1).flatten(0, 2) for one in (images, noise))
        by_model = [distribution.draw(whole, u, c, pixels[:, :c]) for c in range(shape[0])]
        assert 0 < (torch.stack(by_model, 1) - pixels).abs().max() < 10 * margin < 1e-4
    with torch.no_grad():
        torch.testing.assert_close(nats, distribution.log_prob(model(images), images), atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(sampler.params(images), model(images), atol=1e-5, rtol=1e-5)
    mask = torch.rand(3, *shape) < 0.3
    kept = sampler.sample(3, noise=noise, known=images, known_mask=mask)
    assert torch.equal(kept[mask], images[mask])
    torch.testing.assert_close(kept, images, atol=1e-4, rtol=1e-4)
    assert sampler.sample(3, noise=noise, temperature=0).abs().max() < images.abs().max()
    if backend == "eager":
        always = accelerate(model, shape, distribution=distribution, backend=backend, verify="always")
        assert torch.equal(always.sample(3, noise=noise), expected)
        with torch.no_grad():
            assert 0 < always.stats.error < 1e-5 and 2 <= always.stats.passes < math.prod(shape)


def test_encode_may_scale_real_values():
    shape, model = (1, 3, 4), network((1, 3, 4), 2)
    scaled = accelerate(model, shape, distribution=Gaussian(), encode=lambda x: 0.1 * x)
    noise = torch.rand(scaled.noise_shape(3))
    expected = plain_loop(lambda x: model(0.1 * x), shape, Gaussian(), noise)
    torch.testing.assert_close(scaled.sample(3, noise=noise), expected, atol=1e-4, rtol=1e-4)


def test_bad_arguments_are_named():
    three = network((1, 3, 3), 3)
    for name, call in (
        ("temperature", lambda: Gaussian(temperature=-1)),
        ("n_mix", lambda: GaussianMixture(0)),
        ("top_k", lambda: Gaussian().tempered(1.0, 3, None)),
        ("top_p are not defined for Logistic", lambda: Logistic().tempered(1.0, 3, None)),
        ("their log-scales", lambda: accelerate(three, (1, 3, 3), distribution=Logistic())),
        ("top_p", lambda: GaussianMixture(2).tempered(1.0, None, 0.5)),
        ("expected 2 parameters", lambda: accelerate(three, (1, 3, 3), distribution=Gaussian())),
        ("expected 6 parameters", lambda: accelerate(three, (1, 3, 3), distribution=GaussianMixture(2))),
    ):
        with pytest.raises(ValueError, match=name):
            call()


def test_the_margin_is_measured_where_what_is_drawn_runs_away():
    """As for a codec's parameters, which nobody draws a Gaussian of."""
    shape, model = (1, 4, 5), network((1, 4, 5), 2)
    with torch.no_grad():
        model[-1].weight.mul_(100)
    sampler = accelerate(model, shape, distribution=Gaussian(), backend="eager")
    with pytest.raises(FloatingPointError):
        sampler.sample(2, seed=0)
    scale = float(re.search(r"of parameters up to (\S+)\)", sampler.explain())[1])
    assert 1 < scale < 1e4
