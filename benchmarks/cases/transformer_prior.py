"""A transformer over the codes of an image, as GPT-2 has its layers: the prior of a VQ-VAE."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgen import Categorical


class TransformerPrior(nn.Module):
    """Codes (B, 1, H, W) -> logits (B, K, 1, H, W), each of the codes before its own in raster order.

    Args:
        shape: (1, H, W).
        levels: number K of codes.
        width: features of a code.
        layers: number of layers, each of attention and of two linear maps.
        heads: heads of the attention.
    """

    def __init__(
        self, shape: tuple[int, int, int], levels: int, *, width: int = 512, layers: int = 12, heads: int = 8
    ) -> None:
        super().__init__()
        self.shape, self.levels, self.distribution = shape, levels, Categorical(levels)
        self.codes = nn.Embedding(levels + 1, width)  # the last one stands before the first code
        self.places = nn.Parameter(0.02 * torch.randn(shape[1] * shape[2], width))
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, levels)

    @staticmethod
    def encode(x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        before = F.pad(x.flatten(1)[:, :-1], (1, 0), value=self.levels)
        found = self.head(self.norm(self.layers(self.codes(before) + self.places)))
        return found.transpose(1, 2).unflatten(2, self.shape)


class Layer(nn.Module):
    """(B, T, width) -> (B, T, width)"""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.queries, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.again, self.wide, self.narrow = (
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.queries(self.before(x)).unflatten(2, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.narrow(F.gelu(self.wide(self.again(x))))
