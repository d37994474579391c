"""Levels from outside: each place is asked for once, in order, and sees what it should."""

import pytest
import torch
from causal_models import Backwards, Stranger, small
from torch import nn

from fastgen import Categorical, LogisticMixture, accelerate
from fastgen.models import PixelCNN, PixelCNNPP, PixelRNN

MODELS = {
    "grey": lambda: small("grey"),
    "colours": lambda: (PixelCNN((3, 3, 4), 4, channels=9, layers=1).eval(), (3, 3, 4), Categorical(4)),
    "mixture": lambda: (PixelCNNPP((3, 3, 4), channels=6, layers=1, n_mix=2).eval(), (3, 3, 4), LogisticMixture(2)),
    "recurrent": lambda: (PixelRNN((1, 4, 3), 4, hidden_channels=6, layers=1).eval(), (1, 4, 3), Categorical(4)),
    "backwards": lambda: (Backwards(Stranger(1, 5)).eval(), (1, 3, 4), Categorical(5, "B(KC)HW")),
}
BACKENDS = ("eager", "compiled", "naive", "fixed_point")


class Outside:
    """Gives the levels of images, and notes what it is asked."""

    def __init__(self, images):
        self.images, self.asked, self.params = images, [], {}

    def __call__(self, params, place):
        channel, i, j = place
        self.asked.append(place)
        self.params[place] = params
        return self.images[:, slice(None) if channel is None else channel, i, j]


def random_images(model, n, shape, dtype):
    if dtype == torch.float32:
        return torch.randn(n, *shape)
    return torch.randint(getattr(model, "levels", 4), (n, *shape))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODELS)
def test_every_place_is_asked_once_and_sees_what_params_gives(name, backend):
    """Levels and real values take turns."""
    dtype = (torch.long, torch.float32)[(list(MODELS).index(name) + BACKENDS.index(backend)) % 2]
    model, shape, distribution = MODELS[name]()
    sampler = accelerate(model, shape, distribution=distribution, backend=backend)
    images = random_images(model, 3, shape, dtype)
    outside = Outside(images)
    found = sampler.decode(outside, 3, dtype=dtype)
    assert found.dtype == dtype and torch.equal(found, images)
    whole_pixels = name == "mixture" and backend in ("eager", "compiled")
    assert len(set(outside.asked)) == len(outside.asked) == images[0].numel() // (3 if whole_pixels else 1)
    assert {place[0] for place in outside.asked} == ({None} if whole_pixels else set(range(shape[0])))
    last = (shape[1] - 1, shape[2] - 1)
    ends = [place[1:] for place in (outside.asked[0], outside.asked[-1])]
    assert ends == ([last, (0, 0)] if name == "backwards" else [(0, 0), last])

    params = sampler.params(images)
    with torch.no_grad():
        x = images if dtype == torch.float32 else sampler_input(images, distribution)
        torch.testing.assert_close(params, model(x), atol=1e-5, rtol=1e-5)
    for (channel, i, j), seen in outside.params.items():
        assert seen.shape == params.shape[:-2]
        if isinstance(distribution, Categorical) and channel is not None:
            seen, whole = (distribution.logits(one).select(2, channel) for one in (seen, params[..., i, j]))
        else:
            whole = params[..., i, j]
        assert torch.equal(seen, whole)  # bit for bit
    assert torch.equal(sampler.params(images), params)


def sampler_input(levels, distribution):
    count = 256 if isinstance(distribution, LogisticMixture) else distribution.levels
    return levels.float() / (count - 1) * 2 - 1


@pytest.mark.parametrize("backend", ["eager", "compiled"])
def test_a_decoder_that_draws_gives_the_images_of_sample_without_a_whole_pass(backend):
    model, shape, distribution = small("colours")
    sampler = accelerate(model, shape, distribution=distribution, backend=backend)
    noise = torch.rand(sampler.noise_shape(4))
    expected = sampler.sample(4, noise=noise)
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))

    def draw(params, place):
        channel, i, j = place
        return distribution.draw(params, noise[..., i, j], channel, torch.zeros(4, 0).long())

    stats = sampler.stats
    assert torch.equal(sampler.decode(draw, 4), expected)
    assert passes == [] and sampler.stats is stats


def test_one_channel_may_come_with_or_without_its_axis():
    model, shape, distribution = small("grey")
    sampler = accelerate(model, shape, distribution=distribution)
    images = torch.randint(5, (2, *shape))
    assert torch.equal(sampler.decode(lambda _, place: images[:, :, place[1], place[2]], 2), images)
    assert torch.equal(sampler.decode(lambda _, place: images[:, 0, place[1], place[2]].int(), 2), images)
    assert sampler.decode(lambda *_: 1 / 0, 0).shape == (0, *shape)
    assert sampler.params(images[:0]).shape == (0, 5, *shape[1:])
    assert sampler.decode(lambda _, place: images[:, 0, place[1], place[2]], 2, dtype=torch.uint8).dtype == torch.uint8


def test_levels_of_a_byte_are_256():
    model = PixelCNN((1, 2, 3), 256, channels=4, layers=1).eval()
    sampler = accelerate(model, model.shape, distribution=model.distribution)
    levels = torch.tensor([0, 1, 127, 128, 254, 255]).view(1, 1, 2, 3)
    assert torch.equal(sampler.params(levels.to(torch.uint8)), sampler.params(levels))


def test_conditions_and_what_is_kept_of_params():
    model = Stranger(1, 5, classes=3).eval()
    sampler = accelerate(model, (1, 3, 3), distribution=Categorical(5, "B(KC)HW"))
    images, labels = torch.randint(5, (2, 1, 3, 3)), torch.tensor([2, 0])
    outside = Outside(images)
    sampler.decode(outside, 2, condition=labels)
    with torch.no_grad():
        expected = model(images.float() / 2 - 1, labels)
    torch.testing.assert_close(sampler.params(images, condition=labels), expected)
    for (_, i, j), seen in outside.params.items():  # not a view that goes on to change
        torch.testing.assert_close(seen, expected[..., i, j])
    real = torch.randn(2, 1, 3, 3)
    with torch.no_grad():
        torch.testing.assert_close(sampler.params(real, condition=1), model(real, torch.tensor([1, 1])))


def test_real_values_reach_the_model_as_they_are():
    """Without `encode`, which maps levels; and a model of levels goes on to be one."""

    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Stranger(1, 5)

        def forward(self, x):
            return self.inner(2 * x)

    model = Doubled().eval()
    options = {"distribution": Categorical(5, "B(KC)HW"), "encode": lambda levels: levels.float() - 2}
    sampler = accelerate(model, (1, 4, 4), **options)
    before = sampler.sample(3, seed=0)
    images = torch.randn(3, 1, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(sampler.params(images), model(images))
    assert torch.equal(sampler.sample(3, seed=0), before)
    assert torch.equal(before, accelerate(model, (1, 4, 4), backend="naive", **options).sample(3, seed=0))


def test_wrong_arguments_and_answers_are_named():
    model, shape, distribution = small("grey")
    sampler = accelerate(model, shape, distribution=distribution)
    five = torch.zeros(2, *shape, dtype=torch.long)
    five[0, 0, 0, 0] = 5
    for error, name, call in (
        (TypeError, "draw must be callable", lambda: sampler.decode(1, 2)),
        (ValueError, "n must", lambda: sampler.decode(lambda *_: 0, -1)),
        (TypeError, "dtype must", lambda: sampler.decode(lambda *_: 0, 2, dtype=torch.bool)),
        (ValueError, r"shape \(2,\), got \(3,\)", lambda: sampler.decode(lambda *_: torch.zeros(3).long(), 2)),
        (
            TypeError,
            "draw must return integers, .* dtype=torch.float32",
            lambda: sampler.decode(lambda *_: torch.rand(2), 2),
        ),
        (
            ValueError,
            r"draw returns must be levels in 0..4, got 0..5",
            lambda: sampler.decode(lambda *_: five[:, 0, 0, 0], 2),
        ),
        (ValueError, r"levels must have the shape \(n, 1, 5, 4\)", lambda: sampler.params(five[..., 1:])),
        (ValueError, r"levels must be levels in 0..4", lambda: sampler.params(five)),
        (TypeError, "levels must be a tensor", lambda: sampler.params([0])),
        (RuntimeError, "from draw", lambda: sampler.decode(_raises, 2)),
    ):
        with pytest.raises(error, match=name):
            call()
    assert torch.equal(sampler.sample(2, seed=0), sampler.sample(2, seed=0))


def _raises(params, place):
    raise RuntimeError("from draw")
