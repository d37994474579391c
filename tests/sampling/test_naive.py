"""The naive backend is the definition: held to a plain loop, to enumerated probabilities, to counted passes."""

import itertools
import math

import pytest
import torch
from causal_models import NAMES, Stranger, small

from fastgen import Bernoulli, Categorical, LogisticMixture, accelerate


def encoded(x, distribution):
    if isinstance(distribution, Bernoulli):
        return x.float()
    levels = 256 if isinstance(distribution, LogisticMixture) else distribution.levels
    return x.float() / (levels - 1) * 2 - 1


@torch.no_grad()
def plain_loop(model, shape, distribution, noise):
    """As anyone writes it, an image at a time, with no code of the sampler."""
    images = torch.zeros(len(noise), *shape, dtype=torch.long)
    for index, image in enumerate(images):
        for i, j, c in itertools.product(range(shape[1]), range(shape[2]), range(shape[0])):
            params = model(encoded(image.expand(2, *shape), distribution))[:1, ..., i, j].double()
            u = noise[index, :, i, j].double()
            if isinstance(distribution, Bernoulli):
                image[c, i, j] = u[c] >= 1 - torch.sigmoid(params[0, c])
            elif isinstance(distribution, Categorical):
                k = distribution.levels
                logits = {
                    "BKCHW": lambda p=params, k=k, c=c: p.view(k, -1)[:, c],
                    "B(KC)HW": lambda p=params, k=k, c=c: p.view(k, -1)[:, c],
                    "B(CK)HW": lambda p=params, k=k, c=c: p.view(-1, k)[c],
                }[distribution.layout]()
                cumulative = logits.softmax(0).cumsum(0)
                image[c, i, j] = int(torch.searchsorted(cumulative, u[c], right=True))
            else:
                m = distribution.n_mix
                component = int(torch.searchsorted(params[0, :m].softmax(0).cumsum(0), u[0], right=True))
                per = 3 if shape[0] == 3 else 2
                colours = params[0, m:].view(shape[0], per, m)[:, :, component]
                x = image[:, i, j].double() / 127.5 - 1
                mean = colours[c, 0]
                if c == 1:
                    mean = mean + colours[0, 2].tanh() * x[0]
                if c == 2:
                    mean = mean + colours[1, 2].tanh() * x[0] + colours[2, 2].tanh() * x[1]
                value = mean + colours[c, 1].clamp(min=-7).exp() * torch.logit(u[c + 1])
                image[c, i, j] = ((value.clamp(-1, 1) + 1) * 127.5).round()
    return images


@pytest.mark.parametrize("name", NAMES)
def test_equals_a_plain_loop(name):
    model, shape, distribution = small(name)
    sampler = accelerate(model, shape, distribution=distribution, backend="naive")
    noise = torch.rand(sampler.noise_shape(3))
    images = sampler.sample(3, noise=noise)
    assert images.dtype == torch.long and images.shape == (3, *shape)
    assert torch.equal(images, plain_loop(model, shape, distribution, noise))
    assert images.unique(dim=0).shape[0] == 3


@pytest.mark.parametrize("backend", ["naive", "fixed_point"])
def test_the_noise_of_an_image_is_a_box_as_large_as_its_probability(backend):
    """All 64 binary images of 2x3: the uniforms that give an image are a product of intervals. Corners just inside
    give the image; the boxes' volumes are the images' probabilities, and so the boxes leave no room for others."""
    model, shape, distribution = Stranger(1, 1).eval(), (1, 2, 3), Bernoulli()
    sampler = accelerate(model, shape, distribution=distribution, backend=backend)
    images = torch.tensor(list(itertools.product((0, 1), repeat=6))).view(64, 1, 2, 3)
    with torch.no_grad():
        zero = torch.sigmoid(-model(images.float()).double())  # probability of level 0 at each pixel
        log_prob = distribution.log_prob(model(images.float()), images)
    low, high = torch.where(images == 0, 0.0, zero), torch.where(images == 0, zero, 1.0)
    volume = (high - low).flatten(1).prod(1)
    torch.testing.assert_close(volume, log_prob.exp())
    torch.testing.assert_close(volume.sum().item(), 1.0)
    for _ in range(8):
        corner = torch.randint(2, images.shape, dtype=torch.float64) * (1 - 2e-6) + 1e-6
        noise = (low + (high - low) * corner).float()
        drawn, drawn_log_prob = sampler.sample(64, noise=noise, return_log_prob=True)
        assert torch.equal(drawn, images)
        torch.testing.assert_close(drawn_log_prob, log_prob)


def test_frequencies_are_the_probabilities():
    """Pearson's statistic over the 64 images of a 2x3 binary model; 103.4 is its 0.1% point, 63 degrees of freedom."""
    model, shape, distribution = Stranger(1, 1).eval(), (1, 2, 3), Bernoulli()
    sampler = accelerate(model, shape, distribution=distribution, backend="naive")
    drawn = sampler.sample(6000, seed=0)
    index = (drawn.flatten(1) * 2 ** torch.arange(5, -1, -1)).sum(1)
    images = torch.tensor(list(itertools.product((0, 1), repeat=6))).view(64, 1, 2, 3)
    with torch.no_grad():
        expected = 6000 * distribution.log_prob(model(images.float()), images).exp()
    observed = torch.bincount(index, minlength=64)
    assert expected.max() > 5 * expected.min() > 50
    assert ((observed - expected) ** 2 / expected).sum() < 103.4


def test_one_pass_a_draw_and_none_for_known_draws():
    model, shape, distribution = small("colours")
    sampler = accelerate(model, shape, distribution=distribution, backend="naive")
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    sampler.sample(2, seed=0)
    assert len(passes) == math.prod(shape) == sampler.work_ratio
    known = torch.randint(4, (2, *shape))
    mask = torch.zeros(2, *shape, dtype=torch.bool)
    mask[:, :, :2] = True
    mask[:, :, 2, :3] = True
    mask[0] = True
    mask[1, 1, 2, 3] = True
    passes.clear()
    sampler.sample(2, seed=0, known=known, known_mask=mask, return_log_prob=True)
    assert len(passes) == 2  # red and blue of the last pixel of one image; the log-probabilities are free
    passes.clear()
    images, log_prob = sampler.sample(2, seed=0, known=known, known_mask=torch.tensor(True), return_log_prob=True)
    assert len(passes) == 1
    assert torch.equal(images, known)
    with torch.no_grad():
        expected = distribution.log_prob(model(encoded(known, distribution)), known)
    torch.testing.assert_close(log_prob, expected)
