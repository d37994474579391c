"""Baselines: bits/dim of models that treat the pixels of an image as independent."""

import math

import torch

from fastgen.data import Dataset, Split


def uniform_bits_per_dim(dataset: Dataset) -> float:
    """Bits/dim of a uniform distribution over the levels: log2 of their number."""
    return math.log2(dataset.levels)


def histogram_bits_per_dim(dataset: Dataset, split: Split) -> float:
    """Bits/dim of a split under one histogram for each position and channel, counted on the training and validation
    images. Counts start at 1, so that no level has probability 0."""
    levels = torch.cat((dataset.train.images, dataset.validation.images)).flatten(1).long()
    counts = torch.ones(levels.shape[1], dataset.levels, dtype=torch.float64)
    counts.scatter_add_(1, levels.T, torch.ones(levels.T.shape, dtype=torch.float64))
    log_probabilities = (counts / counts.sum(1, keepdim=True)).log2()
    return float(-log_probabilities.gather(1, split.images.flatten(1).long().T).mean())
