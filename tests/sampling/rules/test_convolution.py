"""Convolutions of any kernel, stride, dilation, groups and padding, also transposed, are those of torch.

They reach along the rows of an image that has moved down by one row: whatever they look at there has been drawn.
"""

import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastgen import Categorical
from tests.sampling.exactness import assert_exact, pair

LEVELS = Categorical(4, "B(KC)HW")
HEIGHT, WIDTH, CHANNELS = 3, 16, 4


class AlongRows(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, CHANNELS, 1), *layers)
        self.last = nn.Conv2d(CHANNELS, 4, 1)

    def forward(self, x):
        h = self.layers(F.pad(x, (0, 0, 1, -1)))
        return self.last(F.pad(h, (0, WIDTH - h.shape[3])))  # as many columns as the image has


def layer(choose, transposed):
    """A convolution along rows drawn by chance, of which a few columns come out at least."""
    kernel, stride, dilation = choose.randint(1, 4), choose.randint(1, 3), choose.randint(1, 2)
    padding = choose.randint(0, (kernel - 1) * dilation // 2)
    groups = choose.choice([1, 2, CHANNELS])
    options = {"stride": (1, stride), "dilation": (1, dilation), "padding": (0, padding), "groups": groups}
    if not transposed:
        return nn.Conv2d(CHANNELS, CHANNELS, (1, kernel), **options)
    more = choose.randint(0, max(stride, dilation) - 1)
    return nn.ConvTranspose2d(CHANNELS, CHANNELS, (1, kernel), output_padding=(0, more), **options)


@pytest.mark.parametrize("transposed", [False, True], ids=["convolution", "transposed"])
@pytest.mark.parametrize("backend", ["eager", "compiled"])
@pytest.mark.parametrize("seed", range(8))
def test_equals_the_whole_pass(seed, backend, transposed):
    torch.manual_seed(seed)
    choose = random.Random(seed)
    layers = [layer(choose, transposed), nn.Tanh(), layer(choose, not transposed and seed % 2 == 0)]
    model = AlongRows(*layers).eval()
    fast, naive = pair(model, (1, HEIGHT, WIDTH), backend, distribution=LEVELS)
    assert_exact(fast, naive, 2, error=1e-5, seed=seed)
