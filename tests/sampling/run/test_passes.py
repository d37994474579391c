"""Passes over a part of the images, where these are rounded as in a pass over all."""

import pytest
import torch
from torch import nn

from fastgen import Categorical
from tests.sampling.causal_models import Stranger
from tests.sampling.exactness import pair

SHAPE, DISTRIBUTION = (1, 6, 5), Categorical(5, "B(KC)HW")


class RoundedBySize(nn.Module):
    """Its output is rounded otherwise for each number of images, and for each place in a batch of `unlike` images."""

    def __init__(self, inner, unlike):
        super().__init__()
        self.inner, self.unlike = inner, unlike

    def forward(self, x):
        params = self.inner(x)
        n = len(params)
        place = torch.arange(n).view(-1, 1, 1, 1) if n == self.unlike else 0.0
        return params + 1e-6 * (place + (n if self.unlike == 0 else 0))


@pytest.mark.parametrize(
    ("unlike", "fourth"),
    [
        (None, [2]),
        (0, [8]),  # each number of images
        (2, [8]),  # the second of two images
        (8, [8]),  # each of eight
    ],
)
def test_images_in_doubt_are_passed_alone_if_that_rounds_the_same(unlike, fourth):
    torch.manual_seed(0)
    model = Stranger(1, 5).eval()
    model = model if unlike is None else RoundedBySize(model, unlike).eval()
    fast, naive = pair(model, SHAPE, verify="auto", distribution=DISTRIBUTION)
    with torch.no_grad():
        share = model(torch.zeros(3, *SHAPE))[0, :, 0, 0].double().softmax(0).cumsum(0)
    noise = torch.rand((8, *SHAPE), generator=torch.Generator().manual_seed(0))
    noise[5, 0, 0, 0] = share[2].float()  # next to a step
    expected = naive.sample(8, noise=noise)
    sizes = []
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    fast.explain()  # the hook is a change of the model
    found = []
    for _ in range(4):
        sizes.clear()
        assert torch.equal(fast.sample(8, noise=noise), expected)
        found.append(list(sizes))
    first, *more = found
    assert first[-1] == 8  # the margin is measured
    assert more[0] == [8]
    assert more[1][:2] == [8, 2] and len(more[1]) == 5 if unlike is None else more[1][0] == 8
    assert more[2] == fourth
    assert fast.stats.passes == 1
