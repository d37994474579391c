"""What a model must beat: bits/dim of models that know nothing of an image but its pixels' positions."""

import math

import torch

from fastgen.data import Dataset, Split


def uniform_bits_per_dim(dataset: Dataset) -> float:
    """All levels alike: log2 of their number."""
    return math.log2(dataset.levels)


def histogram_bits_per_dim(dataset: Dataset, split: Split) -> float:
    """Bits/dim of a split by histograms of the training and validation images, one for each position and channel. Every
    count is one higher, so that no level has probability 0."""
    seen = torch.cat((dataset.train.images, dataset.validation.images)).flatten(1).long()
    counts = torch.ones(seen.shape[1], dataset.levels, dtype=torch.float64)
    counts.scatter_add_(1, seen.T, torch.ones(seen.T.shape, dtype=torch.float64))
    log_probabilities = (counts / counts.sum(1, keepdim=True)).log2()
    return float(-log_probabilities.gather(1, split.images.flatten(1).long().T).mean())
