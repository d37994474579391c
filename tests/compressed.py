"""Small models and images that are compressed in tests."""

import torch
from torch import nn

import fastgen
from fastgen import models


def gated(shape, levels, n_classes=None):
    """A model whose probabilities are far from even."""
    torch.manual_seed(1)
    model = models.GatedPixelCNN(shape, levels, channels=8, layers=2, n_classes=n_classes).eval()
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.mul_(4)
    return model


def small_model_and_images():
    """A model of 4x4 images with 5 levels, and 20 images that it drew."""
    model = gated((1, 4, 4), 5)
    return model, model.sample(20, seed=0)


class Spins(nn.Module):
    """(B, 1, H, W) -> a logit for each pixel, of those before it."""

    def __init__(self):
        super().__init__()
        self.conv = fastgen.nn.MaskedConv2d(1, 1, 3, padding=1, mask_type="A")

    def forward(self, x):
        return 3 * self.conv(x)
