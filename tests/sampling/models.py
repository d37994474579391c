"""Plans of small models, and a transformer over pixels, for the tests of planning and playing."""

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from fastgen import Categorical
from fastgen.sampling.levels import levels_of
from fastgen.sampling.plan.plan import make_plan
from fastgen.sampling.request import SampleRequest, uniforms
from fastgen.sampling.trace.network import Network


class Attention(nn.Module):
    """A small GPT over the pixels of a grey image in raster order, (B, K, H, W) logits."""

    def __init__(self, levels, side, width=16, heads=2, layers=1):
        super().__init__()
        self.embed, self.heads = nn.Embedding(levels + 1, width), heads
        self.places = nn.Parameter(torch.randn(side * side, width))
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "first": nn.LayerNorm(width),
                    "qkv": nn.Linear(width, 3 * width),
                    "out": nn.Linear(width, width),
                    "second": nn.LayerNorm(width),
                    "up": nn.Linear(width, 2 * width),
                    "down": nn.Linear(2 * width, width),
                }
            )
            for _ in range(layers)
        )
        self.head = nn.Linear(width, levels)
        self.levels = levels

    def forward(self, x):
        height, width = x.shape[2:]
        tokens = F.pad(x.flatten(1)[:, :-1], (1, 0), value=self.levels)
        h = self.embed(tokens) + self.places
        for block in self.blocks:
            q, k, v = block["qkv"](block["first"](h)).unflatten(-1, (3, self.heads, -1)).movedim(2, 0).transpose(2, 3)
            h = h + block["out"](F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
            h = h + block["down"](F.gelu(block["up"](block["second"](h))))
        return self.head(h).mT.unflatten(-1, (height, width))


def encoded(x, dtype):
    return x.to(dtype)


def encode_of(model):
    """Levels as they are: integers for an embedding, floats in [0, 1] or so for others."""
    if isinstance(model, Attention):
        return partial(encoded, dtype=torch.long)
    return partial(encoded, dtype=torch.float32)


def distribution_of(model, levels=4):
    return getattr(model, "distribution", Categorical(levels, "B(KC)HW"))


def planned(model, shape, distribution=None):
    distribution = distribution_of(model) if distribution is None else distribution
    return make_plan(Network(model.eval(), shape, encode_of(model), None, levels_of(distribution)), distribution)


def request(distribution, shape, n=2, seed=0, **more):
    return SampleRequest(
        n, shape, uniforms(distribution.noise_shape(n, shape), seed, torch.device("cpu")), distribution, **more
    )
