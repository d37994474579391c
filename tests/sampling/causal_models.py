"""Small causal models in plain PyTorch, written as strangers write them."""

import torch
from torch import nn
from torch.nn import functional as F

from fastgen import Bernoulli, Categorical, LogisticMixture
from fastgen.models import GatedPixelCNN, PixelCNN, PixelCNNPP


class MaskedConv(nn.Conv2d):
    """Masks its weight in `forward`, through `.data`. Colour groups, where there are any, are contiguous."""

    def __init__(self, inputs, outputs, size, hides_centre, colours=1):
        super().__init__(inputs, outputs, size, padding=size // 2)
        mask = torch.zeros(size, size)
        mask[: size // 2] = 1
        mask[size // 2, : size // 2] = 1
        mask = mask.expand(outputs, inputs, size, size).clone()
        group_in = torch.arange(inputs) * colours // inputs
        group_out = torch.arange(outputs) * colours // outputs
        sees = group_in < group_out.unsqueeze(1) if hides_centre else group_in <= group_out.unsqueeze(1)
        mask[:, :, size // 2, size // 2] = sees.float()
        self.register_buffer("mask", mask)

    def forward(self, x):
        self.weight.data *= self.mask
        return super().forward(x)


class Stranger(nn.Module):
    """Two masked layers and a head; the input is whatever `accelerate` encodes. Output (B, outputs, H, W)."""

    def __init__(self, inputs, outputs, colours=1, hidden=12, classes=None):
        super().__init__()
        self.first = MaskedConv(inputs, hidden, 5, True, colours)
        self.second = MaskedConv(hidden, hidden, 3, False, colours)
        self.head = MaskedConv(hidden, outputs, 1, False, colours)
        self.of_class = None if classes is None else nn.Embedding(classes, hidden)
        with torch.no_grad():
            for layer in (self.first, self.second, self.head):
                layer.weight *= 3  # so that a pixel depends on those before it

    def forward(self, x, label=None):
        features = self.first(x)
        if self.of_class is not None:
            features = features + self.of_class(label)[:, :, None, None]
        return self.head(F.elu(self.second(F.elu(features))))


class Backwards(nn.Module):
    """Draws from the last pixel to the first."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x.flip(-1, -2)).flip(-1, -2)


class Squeezed(Stranger):
    """Loses the batch dimension of a single image."""

    def forward(self, x, label=None):
        return super().forward(x, label).squeeze()


def small(name):
    """A model in eval mode, the shape of its images, and its distribution."""
    model, shape, distribution = {
        "binary": lambda: (Stranger(1, 1), (1, 4, 5), Bernoulli()),
        "grey": lambda: (Stranger(1, 5), (1, 5, 4), Categorical(5, "B(KC)HW")),
        "colours": lambda: (Stranger(3, 12, 3), (3, 3, 4), Categorical(4, "B(CK)HW")),
        "mixture": lambda: (Stranger(3, 20), (3, 3, 4), LogisticMixture(2)),
        "grey_mixture": lambda: (Stranger(1, 9), (1, 4, 4), LogisticMixture(3)),
        "squeezed": lambda: (Squeezed(1, 5), (1, 3, 4), Categorical(5, "B(KC)HW")),
        "pixelcnn": lambda: (PixelCNN((3, 3, 4), 4, channels=9, layers=1), (3, 3, 4), Categorical(4)),
        "gated": lambda: (GatedPixelCNN((1, 5, 4), 4, channels=8, layers=2), (1, 5, 4), Categorical(4)),
        "plusplus": lambda: (PixelCNNPP((3, 4, 3), channels=4, layers=1, n_mix=2), (3, 4, 3), LogisticMixture(2)),
    }[name]()
    return model.eval(), shape, distribution


NAMES = ("binary", "grey", "colours", "mixture", "grey_mixture", "squeezed", "pixelcnn", "gated", "plusplus")
