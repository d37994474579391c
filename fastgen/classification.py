"""Accuracy and calibration of class probabilities, and a discriminative network to compare a generative classifier
with."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BINS = 10  # equal intervals of the confidence, (0, 1]


class Calibration(NamedTuple):
    """Accuracy and calibration on images whose classes are known. An image's confidence is the probability of its most
    probable class.

    Attributes:
        accuracy: fraction of images whose most probable class is right.
        nats: mean of -log p(right class).
        error: expected calibration error (Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3): the
            mean over the images of |accuracy - confidence| of their bin. It is 0 if images of confidence p are right
            with frequency p.
        confidence: (BINS,) float64, mean confidence of each bin; NaN for an empty bin.
        right: (BINS,) float64, fraction of each bin that is right; NaN for an empty bin.
        images: (BINS,) int64, number of images in each bin.
    """

    accuracy: float
    nats: float
    error: float
    confidence: Tensor
    right: Tensor
    images: Tensor

    def __str__(self) -> str:
        return (
            f"{self.accuracy:.1%} right, -log p(right class) {self.nats:.3f} nats, "
            f"expected calibration error {self.error:.3f}"
        )


def calibration(log_probs: Tensor, labels: Tensor) -> Calibration:
    """Compares predicted log-probabilities with the right classes.

    Args:
        log_probs: (N, n_classes) nats.
        labels: (N,) integer classes.

    Raises:
        ValueError: there are no images, or labels is not (N,).
    """
    if log_probs.dim() != 2 or len(log_probs) == 0 or tuple(labels.shape) != (len(log_probs),):
        raise ValueError(
            f"log_probs must be (N, n_classes) with N >= 1 and labels (N,), got {tuple(log_probs.shape)} and "
            f"{tuple(labels.shape)}"
        )
    log_probs, labels = log_probs.double().cpu(), labels.cpu()
    highest, predicted = log_probs.max(1)
    confidence, right = highest.exp(), (predicted == labels).double()
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    count = torch.zeros(BINS, dtype=torch.float64).index_add(0, bins, torch.ones_like(right))
    confidence_sum, right_sum = (torch.zeros_like(count).index_add(0, bins, values) for values in (confidence, right))
    nats = -log_probs.gather(1, labels[:, None]).mean()
    error = (confidence_sum - right_sum).abs().sum() / len(labels)
    return Calibration(
        right.mean().item(), nats.item(), error.item(), confidence_sum / count, right_sum / count, count.long()
    )


class Classifier(nn.Module):
    """A discriminative network p(y | x): residual 3x3 convolutions, average pooling to 4x4 (1x1 for images smaller than
    that), a linear layer and a softmax.

    Args:
        shape: (C, H, W) of an image.
        levels: number of levels of a channel.
        n_classes: number of classes.
        channels: feature maps of each layer.
        layers: number of convolutions.
        dropout: dropout probability before each convolution except the first.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        levels: int,
        n_classes: int,
        *,
        channels: int = 32,
        layers: int = 5,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        self.shape, self.levels, self.n_classes = shape, levels, n_classes
        self.first = nn.Conv2d(shape[0], channels, 3, padding=1)
        self.rest = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(layers - 1))
        self.dropout = nn.Dropout(dropout)
        pooled_side = 4 if min(shape[1:]) >= 4 else 1  # more than 1: the linear layer sees where a feature lies
        self.pool = nn.AdaptiveAvgPool2d(pooled_side)
        self.head = nn.Linear(channels * pooled_side**2, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Integer levels (B, C, H, W) -> log-probabilities (B, n_classes)."""
        features = F.relu(self.first(x.to(self.head.weight.dtype) / (self.levels - 1) * 2 - 1))
        for layer in self.rest:
            features = features + F.relu(layer(self.dropout(features)))
        return self.head(self.pool(features).flatten(1)).log_softmax(1)

    def loss(self, x: Tensor, condition: Tensor) -> Tensor:
        """Mean of -log p(class) over the batch, () nats, for `fastgen.train.train`. condition: classes (B,)."""
        return F.nll_loss(self(x), condition)


def classifier_of_size(parameters: int, shape: tuple[int, int, int], levels: int, n_classes: int) -> Classifier:
    """The `Classifier` with the number of channels that brings its number of parameters closest to `parameters`."""

    def size(channels: int) -> int:
        with torch.device("meta"):
            model = Classifier(shape, levels, n_classes, channels=channels)
        return sum(parameter.numel() for parameter in model.parameters())

    channels = 1
    while size(channels + 1) <= parameters:
        channels += 1
    if abs(size(channels + 1) - parameters) < abs(size(channels) - parameters):
        channels += 1
    return Classifier(shape, levels, n_classes, channels=channels)
