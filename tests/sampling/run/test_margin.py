"""What whole passes have shown decides whether another one is needed."""

import re

import torch

from fastgen import Bernoulli
from fastgen.models import GatedPixelCNN
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
    found = re.search(r"margin: (\S+) in a parameter, (\S+) in a cumulative probability", fast.explain())
    assert 0 < float(found[2]) < 0.2 * float(found[1])
    for seed in range(1, 6):
        assert_exact(fast, naive, 16, passes=0, seed=seed)
    fast.sample(16, seed=9, temperature=0.5)  # other steps, whose shift is not known
    fast.sample(16, seed=9, top_k=3)  # no steps
    margin = Margin()
    request = SampleRequest(2, (1, 1, 1), torch.tensor([[[[0.3]]], [[[0.49999]]]]), Bernoulli())
    assert margin.could_change(request, torch.zeros(2, 1, 1, 1), torch.zeros(2, 1, 1, 1).long())
    margin.measure(request, torch.zeros(2, 1, 1, 1), torch.full((2, 1, 1, 1), 1e-4), half=True)
    assert margin.could_change(request, torch.zeros(2, 1, 1, 1), torch.zeros(2, 1, 1, 1).long())
    far = request.of(slice(0, 1))
    assert not margin.could_change(far, torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1).long())
