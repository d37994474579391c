"""The fixed point is the naive backend's image, in fewer passes, for any order of pixels."""

import math

import pytest
import torch
from causal_models import NAMES, Backwards, small
from torch import nn

from fastgen import Bernoulli, accelerate
from fastgen.sampling.request import SampleRequest
from fastgen.sampling.whole_pass import FixedPoint, whole_pass


def both(model, shape, distribution, **options):
    return [
        accelerate(model, shape, distribution=distribution, backend=backend, **options)
        for backend in ("naive", "fixed_point")
    ]


@pytest.mark.parametrize("name", NAMES)
def test_equals_naive(name):
    model, shape, distribution = small(name)
    naive, fixed_point = both(model, shape, distribution)
    passes = []
    for n in (1, 6):
        noise = torch.rand(naive.noise_shape(n))
        expected, expected_log_prob = naive.sample(n, noise=noise, return_log_prob=True)
        hook = model.register_forward_hook(lambda *_: passes.append(1))
        passes.clear()
        images, log_prob = fixed_point.sample(n, noise=noise, return_log_prob=True)
        hook.remove()
        assert torch.equal(images, expected)
        torch.testing.assert_close(log_prob, expected_log_prob)
        assert 2 <= len(passes) <= math.prod(shape) * (2 if name == "squeezed" and n == 1 else 1)
    assert fixed_point.work_ratio == len(passes) < naive.work_ratio
    assert f"{len(passes)} for the last batch" in fixed_point.explain()


@pytest.mark.parametrize("name", ["grey", "mixture"])
def test_equals_naive_with_known_pixels_and_options(name):
    model, shape, distribution = small(name)
    options = {"temperature": 0.7} | ({"top_k": 3, "top_p": 0.9} if name == "grey" else {})
    known = torch.randint(5, (4, *shape))
    mask = torch.rand(4, *shape) < 0.4
    naive, fixed_point = both(model, shape, distribution)
    expected = naive.sample(4, seed=3, known=known, known_mask=mask, **options)
    images = fixed_point.sample(4, seed=3, known=known, known_mask=mask, **options)
    assert torch.equal(images, expected)
    assert torch.equal(images[mask], known[mask])


def test_other_orders_than_raster():
    """A model that reads backwards draws the image of its forward twin, backwards, as naive draws do in its order."""
    model, shape, distribution = small("grey")
    forward = accelerate(model, shape, distribution=distribution, backend="naive")
    backward = accelerate(Backwards(model).eval(), shape, distribution=distribution, backend="fixed_point")
    noise = torch.rand(forward.noise_shape(5))
    expected = forward.sample(5, noise=noise)
    assert torch.equal(backward.sample(5, noise=noise.flip(-1, -2)), expected.flip(-1, -2))
    naive = accelerate(backward.model, shape, distribution=distribution, backend="naive")
    drawn, log_prob = naive.sample(5, noise=noise.flip(-1, -2), return_log_prob=True)
    assert torch.equal(drawn, expected.flip(-1, -2))
    with torch.no_grad():
        expected_log_prob = distribution.log_prob(model(expected.float() / 4 * 2 - 1), expected)
    torch.testing.assert_close(log_prob, expected_log_prob, atol=1e-5, rtol=1e-6)  # float32 logits


def test_an_order_that_only_changes_of_the_input_show():
    """What the parameters take from the other pixels cancels exactly, which ready times do not see."""

    class Cancels(Backwards):
        def forward(self, x):
            return super().forward(x) + (x.roll(1, -1) * 2 - x.roll(1, -1) * 2)

    model, shape, distribution = small("grey")
    with pytest.warns(UserWarning, match="fixed_point backend"):
        eager = accelerate(Cancels(model).eval(), shape, distribution=distribution, backend="eager")
    expected = accelerate(Backwards(model).eval(), shape, distribution=distribution, backend="naive").sample(4, seed=0)
    for sampler in (eager, *both(eager.model, shape, distribution)):
        assert torch.equal(sampler.sample(4, seed=0), expected)


def test_stops_where_nothing_can_settle():
    class Contrary(nn.Module):
        """Every pixel avoids its own level."""

        def forward(self, x):
            return 100 * (1 - 2 * x)

    backend = FixedPoint(Contrary(), (1, 2, 2), lambda levels: levels.float())
    with pytest.raises(RuntimeError, match="still change after 5 passes"):
        backend.run(SampleRequest(2, (1, 2, 2), torch.rand(2, 1, 2, 2), Bernoulli()))


def test_longest_chain():
    """Every pixel copies the one before it: each pass settles one draw, and one more pass sees that none changes."""

    class Copies(nn.Module):
        def forward(self, x):
            before = torch.cat((torch.ones_like(x[..., :1, :1]).flatten(2), x.flatten(2)[..., :-1]), -1)
            return (200 * before - 100).view_as(x)

    sampler = accelerate(Copies(), (1, 3, 4), distribution=Bernoulli(), backend="fixed_point")
    assert bool((sampler.sample(2, seed=0) == 1).all())
    assert sampler.work_ratio == 13


def test_strides_of_levels_do_not_choose_the_convolution():
    """Images of one channel whose strides also fit channels last go through another convolution, which rounds
    otherwise."""
    torch.manual_seed(0)
    model = nn.Conv2d(1, 64, 7, padding=3)
    levels = torch.randint(256, (16, 1, 12, 12))
    last = torch.empty_strided(levels.shape, (144, 1, 12, 1), dtype=torch.int64).copy_(levels)
    with torch.no_grad():
        expected = whole_pass(model, torch.Tensor.float, levels, None)
        assert torch.equal(whole_pass(model, torch.Tensor.float, last, None), expected)
