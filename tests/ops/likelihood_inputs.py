"""Parameters and targets of every likelihood, for its tests."""

import pytest
import torch

LEVELS = 256
IMPLS = pytest.mark.parametrize("impl", ["reference", "triton"])


def make(likelihood, batch=3, channels=1, height=3, width=5, n_mix=3, classes=7, dtype=torch.float32, scale=1.0):
    """Parameters and a target that fit the likelihood; the first pixels of a mixture's target are its two edges."""
    image = (batch, channels, height, width)
    if likelihood == "bernoulli":
        return torch.randn(image, dtype=dtype) * scale, torch.randint(0, 2, image)
    if likelihood == "gaussian":
        return torch.randn(batch, 2 * channels, height, width, dtype=dtype) * scale, torch.randn(image, dtype=dtype)
    if likelihood == "categorical":
        return torch.randn(batch, classes, *image[1:], dtype=dtype) * scale, torch.randint(0, classes, image)
    channels_out = n_mix * (10 if channels == 3 else 3)
    params = torch.randn(batch, channels_out, height, width, dtype=dtype) * scale
    target = torch.randint(0, LEVELS, image, dtype=torch.uint8)
    if target.numel():
        target[..., 0] = 0
        target[..., -1] = LEVELS - 1
    return params, target
