"""`uncertain` marks the draws that rounding of the parameters could change, and hardly any others."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgen import Bernoulli, Categorical, LogisticMixture

NONE = torch.zeros(1, 0, dtype=torch.long)  # no earlier channel


@st.composite
def draws(draw):
    """A distribution with options, parameters of some draws, the size of an error, and a seed for its direction."""
    kind = draw(st.sampled_from(["categorical", "bernoulli", "mixture", "rgb"]))
    temperature = draw(st.sampled_from([0.0, 0.3, 1.0, 2.0]))
    if kind == "categorical":
        top_k = draw(st.sampled_from([None, 1, 2, 5, 9]))
        top_p = draw(st.sampled_from([None, 0.2, 0.9, 1.0]))
        distribution, size = Categorical(6, "BKCHW", temperature, top_k, top_p), (6, 1)
    elif kind == "bernoulli":
        distribution, size = Bernoulli(temperature), (1,)
    else:
        m = draw(st.integers(1, 3))
        distribution, size = LogisticMixture(m, temperature), (m * (10 if kind == "rgb" else 3),)
    channel = draw(st.integers(0, 2)) if kind == "rgb" else 0
    error = 10 ** draw(st.floats(-6, 0.5))
    spread = draw(st.sampled_from([0.01, 1.0, 5.0]))
    return distribution, size, channel, error, spread, draw(st.integers(0, 2**31))


@given(draws())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_whenever_an_error_changes_a_draw_it_was_uncertain(case):
    distribution, size, channel, error, spread, seed = case
    generator = torch.Generator().manual_seed(seed)
    n = 256
    params = spread * torch.randn(n, *size, generator=generator, dtype=torch.float64)
    noise = torch.rand(n, distribution.noise_shape(n, (channel + 1, 1, 1))[1], generator=generator)
    previous = torch.randint(256, (n, channel), generator=generator)
    before = distribution.draw(params, noise, channel, previous)
    uncertain = distribution.uncertain(params, noise, channel, previous, error)
    for corner in (True, False):  # errors as large as they may be are the likeliest to change a draw
        moves = torch.rand(4, *params.shape, generator=generator, dtype=torch.float64) * 2 - 1
        moves = error * (moves.sign() if corner else moves)
        for move in moves:
            changed = distribution.draw(params + move, noise, channel, previous) != before
            assert not bool((changed & ~uncertain).any())


@pytest.mark.parametrize(
    "distribution",
    [Categorical(6), Categorical(6, top_k=3), Categorical(6, top_p=0.7), Categorical(6, temperature=0), Bernoulli()],
    ids=str,
)
def test_few_draws_are_uncertain_and_about_as_many_as_can_change(distribution):
    size = (1,) if isinstance(distribution, Bernoulli) else (6, 1)
    n, error = 20000, 1e-2
    params = torch.randn(n, *size)
    noise = torch.rand(n, 1)
    uncertain = distribution.uncertain(params, noise, 0, NONE, error)
    before = distribution.draw(params, noise, 0, NONE)
    can_change = torch.zeros(n, dtype=torch.bool)
    for _ in range(20):
        moved = params + error * torch.randn_like(params).sign()
        can_change |= distribution.draw(moved, noise, 0, NONE) != before
    assert 0 < can_change.sum() <= uncertain.sum() <= 4 * can_change.sum()
    assert not distribution.uncertain(params, noise, 0, NONE, 1e-9).any()


@pytest.mark.parametrize(
    "distribution", [Categorical(5), Categorical(5, temperature=0.3), Categorical(5, layout="B(CK)HW")], ids=str
)
def test_levels_change_at_the_steps_and_nowhere_else(distribution):
    params = torch.randn(50, 10) if distribution.layout == "B(CK)HW" else torch.randn(50, 5, 2)
    for channel in range(2):
        steps = distribution.steps(params, channel)
        assert steps.shape == (50, 4)
        for k in range(4):
            for side, level in ((-1e-6, k), (1e-6, k + 1)):
                noise = torch.rand(50, 2)
                noise[:, channel] = steps[:, k] + side
                drawn = distribution.draw(params, noise, channel, torch.zeros(50, channel, dtype=torch.long))
                wide = (steps.diff(dim=1, prepend=torch.zeros(50, 1), append=torch.ones(50, 1)) > 1e-5).all(1)
                assert (drawn == level)[wide].all() and wide.any()
    for options in ((1.0, 2, None), (1.0, None, 0.5), (0.0, None, None)):
        assert distribution.tempered(*options).steps(params, 0) is None


def test_few_draws_of_a_mixture_are_uncertain():
    """A level is 2/255 wide; an error of the parameters moves x by a few times its size."""
    params, noise = torch.randn(20000, 20), torch.rand(20000, 4)
    previous = torch.randint(256, (20000, 2))
    uncertain = LogisticMixture(2).uncertain(params, noise, 2, previous, 1e-5)
    assert 0 < uncertain.double().mean() < 0.02


def test_ties_in_the_ranking_are_uncertain():
    logits = torch.tensor([[1.0, 1.0, 0.0, 0.0, -5.0, -math.inf]]).unsqueeze(2)
    u = torch.tensor([[0.1]])
    flagged = [bool(Categorical(6, top_k=k).uncertain(logits, u, 0, NONE, 0.0)) for k in range(1, 7)]
    assert flagged == [True, False, True, False, False, False]
    flagged = [bool(Categorical(6, top_p=p).uncertain(logits, u, 0, NONE, 0.0)) for p in (0.3, 0.6, 1.0)]
    assert flagged == [True, False, False]
