"""Channels that are independent given the parameters come in one draw: the same values as one by one, everywhere."""

import pytest
import torch
from causal_models import Stranger

from fastgen import Bernoulli, Categorical, Gaussian, GaussianMixture, Logistic, accelerate
from fastgen.sampling import draws
from tests.sampling.exactness import assert_exact, pair

C, H, W = 6, 3, 4


class Rounded:
    """Own: a rounded Gaussian about a mean, levels 0..8. It notes how many channels it is asked for at a time."""

    levels = 9

    def __init__(self, together):
        self.independent_channels, self.asked = together, []

    def noise_shape(self, n, shape):
        return (n, *shape)

    def draw(self, params, noise, channel, previous):
        self.asked.append(1 if isinstance(channel, int) else len(channel))
        mean, spread = params.double().chunk(2, 1)
        value = mean[:, channel] + spread[:, channel].exp() * torch.special.ndtri(noise[:, channel].double() + 2**-25)
        return (2 * value + 4).round().clamp(0, 8).nan_to_num(0).long()

    def log_prob(self, params, levels):
        return torch.zeros(len(params), dtype=torch.float64)


DISTRIBUTIONS = {
    "categorical": (Categorical(4, "B(KC)HW"), 4 * C),
    "levels fastest": (Categorical(4, "B(CK)HW"), 4 * C),
    "bernoulli": (Bernoulli(), C),
    "gaussian": (Gaussian(), 2 * C),
    "logistic": (Logistic(), 2 * C),
    "mixture": (GaussianMixture(2), 2 * (1 + 2 * C)),
    "own": (Rounded(True), 2 * C),
}


PLAIN = [{}, {"temperature": 0.7}, {"temperature": 0.0}]
OPTIONS = {"categorical": [*PLAIN, {"top_k": 2}, {"top_p": 0.6}], "own": [{}]}


@pytest.mark.parametrize("name, options", [(name, one) for name in DISTRIBUTIONS for one in OPTIONS.get(name, PLAIN)])
def test_several_channels_at_once_are_those_one_by_one(name, options):
    distribution, size = DISTRIBUTIONS[name]
    if options:
        distribution = distribution.tempered(**{"temperature": 1.0, "top_k": None, "top_p": None} | options)
    params = torch.randn(300, size)
    noise = torch.rand(distribution.noise_shape(300, (C, 1, 1)))[..., 0, 0]
    nothing = torch.zeros(300, 0)
    for channels in (torch.arange(C), torch.tensor([4, 1])):
        one_by_one = [distribution.draw(params, noise, int(c), torch.zeros(300, int(c))) for c in channels]
        assert torch.equal(distribution.draw(params, noise, channels, nothing), torch.stack(one_by_one, 1))
        if hasattr(distribution, "uncertain"):
            together = distribution.uncertain(params, noise, channels, nothing, 3e-2)
            one_by_one = [distribution.uncertain(params, noise, int(c), nothing, 3e-2) for c in channels]
            assert torch.equal(together, torch.stack(one_by_one, 1))
            assert together.any() and not together.all()
        steps = getattr(distribution, "steps", lambda *_: None)(params, channels)
        if steps is not None:
            one_by_one = [distribution.steps(params, int(c)) for c in channels]
            assert torch.equal(steps, torch.stack(one_by_one, 1))


@torch.no_grad()
def plain_loop(model, distribution, noise, encode):
    """A pixel after the other, all of its channels from one pass."""
    real = getattr(distribution, "dtype", torch.int64)
    images = torch.zeros(len(noise), C, H, W, dtype=real)
    for i in range(H):
        for j in range(W):
            params = model(encode(images))[..., i, j]
            for c in range(C):
                images[:, c, i, j] = distribution.draw(params, noise[..., i, j], c, images[:, :c, i, j])
    return images


def encoding(distribution):
    if isinstance(distribution, (Bernoulli, Gaussian, Logistic, GaussianMixture)):
        return lambda x: x.float()
    return lambda x: x.float() / (distribution.levels - 1) * 2 - 1


@pytest.mark.parametrize("backend", ["naive", "fixed_point", "eager", "compiled"])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_backends_draw_whole_pixels_and_agree(name, backend):
    distribution, size = DISTRIBUTIONS[name]
    model = Stranger(C, size).eval()
    if hasattr(distribution, "dtype"):  # values that grow from pixel to pixel would end as NaN
        model.head.weight.data.mul_(0.2)
    sampler = accelerate(model, (C, H, W), distribution=distribution, backend=backend)
    noise = torch.rand(sampler.noise_shape(3))
    expected = plain_loop(model, distribution, noise, encoding(distribution))
    if name == "own":
        distribution.asked.clear()
    images = sampler.sample(3, noise=noise)
    if images.is_floating_point() and backend in ("eager", "compiled"):
        torch.testing.assert_close(images, expected, atol=1e-4, rtol=1e-4)
    else:
        assert torch.equal(images, expected)
    if name == "own":
        assert set(distribution.asked) == {C}
    if backend == "naive":
        assert sampler.stats.passes == sampler.work_ratio == H * W
    elif backend != "fixed_point":
        assert sampler.stats.redrawn == 0

    mask = torch.rand(3, C, H, W) < 0.4
    kept = sampler.sample(3, noise=noise, known=images.flip(0), known_mask=mask)
    assert torch.equal(kept[mask], images.flip(0)[mask]) and not torch.equal(kept[~mask], images[~mask])

    asked, seen = [], {}

    def outside(params, place):
        asked.append(place)
        seen[place] = params
        return images[:, :, place[1], place[2]]

    assert torch.equal(sampler.decode(outside, 3, dtype=images.dtype), images)
    assert asked == [(None, i, j) for i in range(H) for j in range(W)]
    params = sampler.params(images)
    assert all(torch.equal(one, params[..., i, j]) for (_, i, j), one in seen.items())
    with torch.no_grad():
        torch.testing.assert_close(params, model(encoding(distribution)(images)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["naive", "fixed_point", "eager", "compiled"])
def test_own_distributions_that_do_not_say_so_are_asked_channel_by_channel(backend):
    torch.manual_seed(0)
    model = Stranger(C, 2 * C).eval()
    noise = torch.rand(3, C, H, W)
    found = []
    for together in (True, False):
        distribution = Rounded(together)
        sampler = accelerate(model, (C, H, W), distribution=distribution, backend=backend)
        distribution.asked.clear()
        found.append(sampler.sample(3, noise=noise))
        assert set(distribution.asked) == {C if together else 1}
    assert torch.equal(*found)


def test_channels_that_the_model_orders_are_drawn_one_by_one():
    model = Stranger(3, 12, colours=3).eval()
    fast, naive = pair(model, (3, H, W), distribution=Categorical(4, "B(CK)HW"))
    assert_exact(fast, naive, 3, seed=0)
    assert naive.stats.passes == 3 * H * W
    places = []
    naive.decode(lambda params, place: (places.append(place), torch.zeros(2).long())[1], 2)
    assert places[:4] == [(0, 0, 0), (1, 0, 0), (2, 0, 0), (0, 0, 1)]


def test_draws_of_many_parameters_are_split(monkeypatch):
    """An image whose rows have more parameters than one call should take."""
    model = Stranger(C, 4 * C).eval()
    fast, naive = pair(model, (C, H, W), distribution=Categorical(4, "B(KC)HW"))
    expected = assert_exact(fast, naive, 3, seed=0)
    monkeypatch.setattr(draws, "MOST_PARAMETERS", 3 * W * 4 * 2)  # two channels of a row of three images
    assert [len(one) for one in draws.channels_at_once(fast.distribution, torch.zeros(3 * W, 4 * C), C)] == [2, 2, 2]
    assert torch.equal(assert_exact(fast, naive, 3, seed=0), expected)


def test_what_a_draw_returns_is_checked():
    class Wrong(Rounded):
        def draw(self, params, noise, channel, previous):
            return super().draw(params, noise, channel, previous).sum(-1)

    with pytest.raises(ValueError, match=r"draw must return levels of shape \(8, 6\), got \(8,\) from Wrong"):
        accelerate(Stranger(C, 2 * C).eval(), (C, H, W), distribution=Wrong(True))


@pytest.mark.parametrize("backend", ["naive", "fixed_point", "eager"])
def test_nan_counts_where_any_channel_of_the_pixel_is_drawn(backend):
    class Spoilt(Stranger):
        def forward(self, x):
            return torch.where(torch.arange(W) == 2, float("nan"), super().forward(x))

    sampler = accelerate(Spoilt(C, 2 * C).eval(), (C, H, W), distribution=Rounded(True), backend=backend)
    mask = torch.zeros(C, H, W, dtype=torch.bool)
    mask[..., 2] = True
    sampler.sample(2, known=torch.zeros(1).long(), known_mask=mask)
    mask[1, 0, 2] = False
    with pytest.raises(FloatingPointError):
        sampler.sample(2, known=torch.zeros(1).long(), known_mask=mask)
