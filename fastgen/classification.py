"""How good class probabilities are, and a discriminative network to compare a generative classifier with."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BINS = 10  # of confidences


class Calibration(NamedTuple):
    """Measures of class probabilities on images whose classes are known.

    Attributes:
        accuracy: the share of images whose most probable class is the right one.
        nats: mean of -log p(right class).
        error: expected calibration error (Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3): the
            mean over the images of |accuracy - confidence| of their bin; 0 where a confidence of p is right p of the
            time. Confidence is the probability of the most probable class.
        confidence, right, images: of each of BINS equal intervals of (0, 1]: the mean confidence, the share that is
            right (NaN where there are none) and the number of images, (BINS,).
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
    """Measures log-probabilities (N, n_classes) against the right classes (N,).

    Raises:
        ValueError: there are no images, or not as many classes as images.
    """
    if log_probs.dim() != 2 or len(log_probs) == 0 or tuple(labels.shape) != (len(log_probs),):
        raise ValueError(
            f"log_probs must be (N, n_classes) with N >= 1 and labels (N,), got {tuple(log_probs.shape)} and "
            f"{tuple(labels.shape)}"
        )
    log_probs, labels = log_probs.double().cpu(), labels.cpu()
    best, named = log_probs.max(1)
    confidence, right = best.exp(), (named == labels).double()
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    count = torch.zeros(BINS, dtype=torch.float64).index_add(0, bins, torch.ones_like(right))
    confidences, rights = (torch.zeros_like(count).index_add(0, bins, each) for each in (confidence, right))
    nats = -log_probs.gather(1, labels[:, None]).mean()
    error = (confidences - rights).abs().sum() / len(labels)
    return Calibration(
        right.mean().item(), nats.item(), error.item(), confidences / count, rights / count, count.long()
    )


class Classifier(nn.Module):
    """p(y | x) directly: 3x3 convolutions with residual connections, the mean over the image, a softmax.

    Args:
        shape: (C, H, W) of an image.
        levels: number of levels of a channel.
        n_classes: number of classes.
        channels: feature maps of each layer.
        layers: convolutions.
        dropout: probability, before each convolution but the first.
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
        parts = 4 if min(shape[1:]) >= 4 else 1  # of each side, so that it is known what stands where
        self.pool = nn.AdaptiveAvgPool2d(parts)
        self.head = nn.Linear(channels * parts**2, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Integer levels (B, C, H, W) -> log-probabilities (B, n_classes)."""
        features = F.relu(self.first(x.to(self.head.weight.dtype) / (self.levels - 1) * 2 - 1))
        for layer in self.rest:
            features = features + F.relu(layer(self.dropout(features)))
        return self.head(self.pool(features).flatten(1)).log_softmax(1)

    def loss(self, x: Tensor, condition: Tensor) -> Tensor:
        """Mean -log p(class), nats, for `fastgen.train.train`."""
        return F.nll_loss(self(x), condition)


def classifier_of_size(parameters: int, shape: tuple[int, int, int], levels: int, n_classes: int) -> Classifier:
    """The `Classifier` whose number of parameters is closest."""

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
