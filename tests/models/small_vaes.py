"""Small VAEs and images for them."""

import torch

from fastgen.models import VAE


def small(shape=(1, 5, 6), likelihood="bernoulli", levels=5, **options):
    return VAE(shape, 3, likelihood=likelihood, levels=levels, channels=4, hidden=16, n_mix=2, **options)


def images(model, n=4):
    return torch.randint(model.levels, (n, *model.shape))
