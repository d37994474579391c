"""Attention as strangers have it: backends chosen inside of the model, flex_attention, rotations by complex numbers,
masks that are subtracted, the greatest score taken away by hand."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from fastgen import Categorical, accelerate

SIDE, LEVELS, WIDTH = 3, 4, 8
PLACES = SIDE * SIDE


def chosen_inside(q, k, v):
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def flexible(q, k, v):
    return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: torch.where(i >= j, s, -float("inf")))


def rotated(q, k, v):
    angles = torch.outer(torch.arange(PLACES).float(), torch.tensor([1.0, 0.1]))
    turns = torch.polar(torch.ones_like(angles), angles)

    def turn(x):
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turns).flatten(-2)

    return F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True)


def subtracted(q, k, v):
    return (q @ k.mT - 1e9 * torch.ones(PLACES, PLACES).triu(1)).softmax(-1) @ v


def by_hand(q, k, v):
    """As PixelSNAIL has it; the first place sees nothing."""
    mask = torch.ones(PLACES, PLACES).tril(-1)
    scores = q @ k.mT - (1 - mask) * 1e10
    shares = (scores - scores.max(-1, keepdim=True)[0]).exp() * mask
    return shares / (shares.sum(-1, keepdim=True) + 1e-6) @ v


class Net(nn.Module):
    """A level is its own embedding; the level before each place, then one layer of attention."""

    def __init__(self, attention):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.mix = nn.Embedding(LEVELS + 1, WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.out, self.attention = nn.Linear(WIDTH, LEVELS), attention

    def forward(self, x):
        batch = len(x)
        before = torch.cat([torch.full((batch, 1), LEVELS), x.reshape(batch, -1)[:, :-1]], 1)
        h = 2 * self.embedding(before)
        q, k, v = (part.view(batch, PLACES, 2, -1).transpose(1, 2) for part in self.mix(h).chunk(3, -1))
        h = h + self.attention(q, k, v).transpose(1, 2).flatten(2)
        return 3 * self.out(h).transpose(1, 2).reshape(batch, LEVELS, SIDE, SIDE)


@pytest.mark.parametrize("attention", [chosen_inside, flexible, rotated, subtracted, by_hand])
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_attention_is_taken_by_the_engine(attention):
    model = Net(attention).eval()
    given = {"distribution": Categorical(LEVELS, "B(KC)HW"), "encode": lambda levels: levels}
    naive = accelerate(model, (1, SIDE, SIDE), backend="naive", **given)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        sampler = accelerate(model, (1, SIDE, SIDE), backend="eager", **given)
    noise = torch.rand(sampler.noise_shape(8), generator=torch.Generator().manual_seed(0))
    images = sampler.sample(8, noise=noise)
    assert torch.equal(images, naive.sample(8, noise=noise)) and len(images.unique()) > 1
    with torch.no_grad():
        assert model(images).shape == (8, LEVELS, SIDE, SIDE)  # and runs as before
