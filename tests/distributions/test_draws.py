"""Draws compared with independent definitions, edge cases of the rule, and bad arguments."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastgen import Bernoulli, Categorical, LogisticMixture
from fastgen.distributions.base import first_exceeding

NONE = torch.zeros(1, 0, dtype=torch.long)  # no earlier channel


def probabilities_by_hand(logits, temperature=1.0, top_k=None, top_p=None):
    """Probabilities of one draw in plain Python: temperature, then top-k, then the fewest with the mass top_p."""
    scaled = [float(logit) / temperature for logit in logits]
    weights = [math.exp(logit - max(scaled)) for logit in scaled]
    ranking = sorted(range(len(weights)), key=lambda k: (-weights[k], k))[:top_k]
    if top_p is not None:
        total, mass, fewest = sum(weights[k] for k in ranking), 0.0, []
        for k in ranking:
            fewest.append(k)
            mass += weights[k]
            if mass >= top_p * total:
                break
        ranking = fewest
    total = sum(weights[k] for k in ranking)
    return [weights[k] / total if k in ranking else 0.0 for k in range(len(weights))]


def level_by_hand(probabilities, u):
    cumulative = 0.0
    for level, probability in enumerate(probabilities):
        cumulative += probability
        if cumulative > u:
            return level
    raise AssertionError("the uniform is above the sum")


OPTIONS = [
    {},
    {"temperature": 0.4},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 3},
    {"top_k": 99},
    {"top_p": 0.6},
    {"top_p": 1.0},
    {"top_p": 1e-9},
    {"temperature": 1.7, "top_k": 4, "top_p": 0.8},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_categorical_draws_by_inverse_cdf(options):
    distribution = Categorical(7).tempered(**{"temperature": 1.0, "top_k": None, "top_p": None} | options)
    logits = 2 * torch.randn(300, 7, 2)
    noise = torch.rand(300, 2)
    for channel in range(2):
        drawn = distribution.draw(logits, noise, channel, NONE)
        expected = [
            level_by_hand(probabilities_by_hand(row, **options), float(u))
            for row, u in zip(logits[:, :, channel], noise[:, channel], strict=True)
        ]
        assert drawn.tolist() == expected


@pytest.mark.parametrize("layout", ["BKCHW", "BCKHW", "B(KC)HW", "B(CK)HW"])
def test_layouts(layout):
    logits = torch.randn(50, 5, 3)  # n, K, C
    levels = torch.randint(5, (50, 3))
    noise = torch.rand(50, 3)
    laid_out = {
        "BKCHW": logits,
        "BCKHW": logits.transpose(1, 2),
        "B(KC)HW": logits.flatten(1),
        "B(CK)HW": logits.transpose(1, 2).flatten(1),
    }[layout]
    distribution = Categorical(5, layout)
    log_probabilities = logits.double().log_softmax(1)
    expected = sum(log_probabilities[torch.arange(50), levels[:, c], c] for c in range(3))
    torch.testing.assert_close(distribution.log_prob(laid_out, levels), expected)
    for channel in range(3):
        above = log_probabilities[:, :, channel].exp().cumsum(1) > noise[:, channel, None]
        assert torch.equal(distribution.draw(laid_out, noise, channel, NONE), above.int().argmax(1))
    distribution.check_params(laid_out, 3)
    with pytest.raises(ValueError, match="expected 2 channels"):
        distribution.check_params(laid_out, 2)


def test_a_uniform_on_a_step_belongs_to_the_next_level():
    quarters = torch.tensor([[0.25, 0.25, 0.5]]).log().unsqueeze(2)
    steps = torch.tensor([0.0, 0.25 - 2**-25, 0.25, 0.5 - 2**-24, 0.5, 1 - 2**-24])
    drawn = [Categorical(3).draw(quarters, u.view(1, 1), 0, NONE).item() for u in steps]
    assert drawn == [0, 0, 1, 1, 2, 2]


def test_levels_of_probability_zero_are_never_drawn():
    logits = torch.full((1, 6, 1), -math.inf)
    logits[0, [1, 3]] = torch.tensor([[0.0], [0.3]])
    for u in (0.0, 1e-38, 0.3, 0.42, 0.7, 1 - 2**-24):
        assert Categorical(6).draw(logits, torch.tensor([[u]]), 0, NONE).item() in (1, 3)
    far = torch.tensor([0.0, 0.0, -200.0, -200.0]).view(1, 4, 1)  # the two last have less than float32 can tell from 0
    assert Categorical(4).draw(far, torch.tensor([[1 - 2**-24]]), 0, NONE).item() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_greatest_noise_gives_the_last_possible_level(dtype):
    """The product of the noise and the sum of the weights must not round up to the sum."""
    total = torch.cat((1 + torch.arange(64) * 2.0**-23, torch.rand(2000) * 2))
    weights = torch.stack((torch.zeros_like(total), total / 2, total - total / 2, torch.zeros_like(total)), 1)
    drawn = first_exceeding(weights.to(dtype), torch.full((len(total),), 1 - 2**-24))
    assert bool((drawn == 2).all())
    assert first_exceeding(torch.full((1, 3), math.nan, dtype=dtype), torch.zeros(1)).item() in range(3)


def test_bernoulli_is_one_from_one_minus_p_on():
    for logit in (-30.0, -2.0, 0.0, 0.7, 30.0):
        threshold = 1 / (1 + math.exp(logit))
        for u in (0.0, threshold * (1 - 1e-6), threshold * (1 + 1e-6), 0.5, 1 - 2**-24):
            u = float(np.float32(min(u, 1 - 2**-24)))
            drawn = Bernoulli().draw(torch.tensor([[logit]]), torch.tensor([[u]]), 0, NONE).item()
            assert drawn == int(u >= threshold), (logit, u)
    certain = torch.tensor([[math.inf], [-math.inf]])
    for u in (0.0, 1 - 2**-24):
        assert Bernoulli().draw(certain, torch.full((2, 1), u), 0, NONE).tolist() == [1, 0]


def logistic_mixture_by_hand(params, u, channels, m, temperature=1.0):
    """One pixel in plain Python, after Salimans et al. 2017, equation 3."""
    params = [float(p) for p in params]
    component = level_by_hand(probabilities_by_hand(params[:m], temperature), float(u[0]))
    group = 3 * m if channels == 3 else 2 * m
    colours = [params[m + c * group : m + (c + 1) * group] for c in range(channels)]
    mean = [colour[component] for colour in colours]
    scale = [math.exp(max(colour[m + component], -7)) for colour in colours]
    tanh = [math.tanh(colour[2 * m + component]) for colour in colours] if channels == 3 else []
    levels, x = [], []
    for c in range(channels):
        if c == 1:
            mean[1] += tanh[0] * x[0]
        if c == 2:
            mean[2] += tanh[1] * x[0] + tanh[2] * x[1]
        at = float(u[c + 1])
        logit = math.log(at) - math.log(1 - at) if at > 0 else -math.inf
        value = min(max(mean[c] + scale[c] * temperature * logit, -1), 1)
        levels.append(round((value + 1) * 127.5))
        x.append(levels[-1] / 127.5 - 1)
    return levels


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_logistic_mixture_draws(channels, temperature):
    m = 3
    distribution = LogisticMixture(m).tempered(temperature, None, None)
    params = torch.randn(200, m * (10 if channels == 3 else 3))
    noise = torch.rand(200, channels + 1)
    noise[:5, 1:] = 0.0
    noise[5:10] = 1 - 2**-24
    levels = torch.empty(200, 0, dtype=torch.long)
    for channel in range(channels):
        drawn = distribution.draw(params, noise, channel, levels)
        levels = torch.cat((levels, drawn.unsqueeze(1)), 1)
    expected = [logistic_mixture_by_hand(p, u, channels, m, temperature) for p, u in zip(params, noise, strict=True)]
    assert levels.tolist() == expected


def test_temperature_zero_takes_the_mode():
    logits = torch.randn(20, 5, 2)
    noise = torch.rand(20, 2)
    cold = Categorical(5).tempered(0, None, None)
    assert torch.equal(cold.draw(logits, noise, 1, NONE), logits[:, :, 1].argmax(1))
    assert torch.equal(
        Bernoulli().tempered(0, None, None).draw(noise - 0.5, noise, 0, NONE), (noise[:, 0] > 0.5).long()
    )
    mixture = torch.tensor([[0.0, 3.0, -0.5, 0.2, 1.0, 1.0]])  # two logits, means, log-scales
    drawn = LogisticMixture(2).tempered(0, None, None).draw(mixture, torch.rand(1, 2), 0, NONE)
    assert drawn.item() == round((0.2 + 1) * 127.5)


@pytest.mark.parametrize("temperature", [1e-30, 1e-3])
def test_a_low_temperature_is_the_mode_and_no_overflow(temperature):
    logits = torch.tensor([[900.0, -4.0, 903.0]]).unsqueeze(2)
    for u in (0.0, 0.999):
        drawn = Categorical(3).tempered(temperature, None, None).draw(logits, torch.tensor([[u]]), 0, NONE)
        assert drawn.item() == 2


DISTRIBUTIONS = {
    "categorical": (Categorical(4), (4, 1)),
    "top_p": (Categorical(4, top_p=0.7, top_k=3), (4, 1)),
    "cold": (Categorical(4, temperature=0), (4, 1)),
    "bernoulli": (Bernoulli(), (1,)),
    "mixture": (LogisticMixture(2), (6,)),
    "one_component": (LogisticMixture(1, temperature=0), (3,)),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_nan_and_empty_batches_do_not_crash_a_draw(name):
    distribution, of_pixel = DISTRIBUTIONS[name]
    for n, value in ((3, math.nan), (0, 0.0)):
        params = torch.full((n, *of_pixel), value)
        noise = torch.rand(n, distribution.noise_shape(n, (1, 1, 1))[1])
        previous = torch.zeros(n, 0, dtype=torch.long)
        drawn = distribution.draw(params, noise, 0, previous)
        assert drawn.shape == (n,) and drawn.dtype == torch.long
        assert bool(((drawn >= 0) & (drawn < 256)).all())
        assert distribution.uncertain(params, noise, 0, previous, 1e-3).shape == (n,)


@pytest.mark.parametrize(
    "arguments",
    [
        {"temperature": -1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": "1"},
        {"top_k": 0},
        {"top_k": 1.5},
        {"top_k": True},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_p": "1"},
    ],
    ids=str,
)
def test_bad_options_are_named(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Categorical(4).tempered(**{"temperature": 1.0, "top_k": None, "top_p": None} | arguments)
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Categorical(4, **arguments)


def test_other_bad_arguments_are_named():
    with pytest.raises(ValueError, match="levels"):
        Categorical(1)
    with pytest.raises(ValueError, match=r"layout BKCHW: where all channels .* it is layout='B\(KC\)HW'"):
        Categorical(4).logits(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="output= of accelerate picks the logits"):
        Categorical(4).logits(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="layout"):
        Categorical(4, "BKHW")
    with pytest.raises(ValueError, match="n_mix"):
        LogisticMixture(0)
    for distribution in (Bernoulli(), LogisticMixture()):
        with pytest.raises(ValueError, match="top_k"):
            distribution.tempered(1.0, 3, None)
        with pytest.raises(ValueError, match="temperature"):
            distribution.tempered(-1.0, None, None)
    with pytest.raises(ValueError, match="each of 3 channels"):
        Bernoulli().check_params(torch.zeros(2, 1), 3)
    with pytest.raises(ValueError, match="expected 1 channels"):
        LogisticMixture(2).check_params(torch.zeros(2, 20), 1)
    with pytest.raises(ValueError, match=r"30 \(one channel\)"):
        LogisticMixture(10).check_params(torch.zeros(2, 40), 1)


@given(st.integers(0, 2**31), st.sampled_from([0.5, 3.0]))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_log_probabilities_are_what_the_draws_have(seed, spread):
    """The fraction of a regular grid of uniforms that gives a level is the probability of the level."""
    generator = torch.Generator().manual_seed(seed)
    params = spread * torch.randn(1, 6, generator=generator)
    grid = (torch.arange(4000) + 0.5) / 4000
    for distribution, levels, size in ((Categorical(6), 6, (6, 1)), (Bernoulli(), 2, (1,))):
        at = params.flatten()[: math.prod(size)].view(1, *size)
        drawn = distribution.draw(at.expand(4000, *size), grid.unsqueeze(1), 0, NONE.expand(4000, 0))
        share = torch.bincount(drawn, minlength=levels) / 4000
        probability = torch.stack([distribution.log_prob(at, torch.tensor([[k]])) for k in range(levels)]).exp()
        assume(probability.isfinite().all())
        torch.testing.assert_close(share.double(), probability.flatten(), atol=2 / 4000, rtol=0)
