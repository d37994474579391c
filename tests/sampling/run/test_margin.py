"""What whole passes have shown decides whether another one is needed."""

import re

import torch

from fastgen import Bernoulli
from fastgen.models import GatedPixelCNN
from fastgen.sampling.draws import WIDEST, spread_of_steps
from fastgen.sampling.request import SampleRequest
from fastgen.sampling.run.margin import Margin
from tests.sampling.exactness import assert_exact, pair


def test_shifts_of_cumulative_probabilities_decide_whether_a_pass_is_needed():
    """Errors of many logits cancel: steps move by much less than the greatest error of a logit allows."""
    torch.manual_seed(0)
    model = GatedPixelCNN((1, 8, 8), 64, channels=32, layers=2).eval()
    fast, naive = pair(model, model.shape, verify="auto", distribution=model.distribution)
    assert "margin: not measured yet" in fast.explain()
    assert_exact(fast, naive, 16, seed=0)
    assert re.search(r"margin: \S+ in a parameter, \S+ in a cumulative probability", fast.explain())
    for seed in range(1, 6):
        assert_exact(fast, naive, 16, passes=0, seed=seed)
    fast.sample(16, seed=9, temperature=0.5)  # other steps, whose shift is not known
    fast.sample(16, seed=9, top_k=3)  # no steps
    margin = Margin()
    request = SampleRequest(2, (1, 1, 1), torch.tensor([[[[0.3]]], [[[0.49999]]]]), Bernoulli())
    levels = torch.zeros(2, 1, 1, 1).long()
    assert margin.unsure(request, torch.zeros(2, 1, 1, 1), levels).tolist() == [True, True]
    margin.measure(request, torch.zeros(2, 1, 1, 1), torch.full((2, 1, 1, 1), 1e-4), half=True)
    assert margin.unsure(request, torch.zeros(2, 1, 1, 1), levels).tolist() == [False, True]


def test_spread_of_steps_is_how_far_independent_errors_move_cumulative_probabilities():
    torch.manual_seed(0)
    logits = 3 * torch.randn(5, 9, dtype=torch.float64)
    steps = logits.softmax(-1).cumsum(-1)[:, :-1]
    errors = 1e-4 * torch.randn(100_000, 1, 9, dtype=torch.float64)
    moved = (logits + errors).softmax(-1).cumsum(-1)[..., :-1] - steps
    torch.testing.assert_close(spread_of_steps(steps), moved.std(0) / 1e-4, rtol=0.02, atol=2e-6)
    even = torch.arange(1, 9).double() / 9  # one level of 2 is the widest
    assert spread_of_steps(even).max() < spread_of_steps(torch.tensor([0.5]).double()) <= WIDEST < 0.354
    assert spread_of_steps(torch.tensor([0.0, 1.0])).isfinite().all()
