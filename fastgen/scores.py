"""Outlier scores of images, the surprise at each pixel, and images of other kinds to test the scores with.

`fastgen.likelihood` defines the scores. A higher score means that an image looks less like the training data.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastgen import likelihood
from fastgen.data import Dataset
from fastgen.likelihood import bits_per_dim, likelihood_ratio, log_likelihoods, typicality
from fastgen.models.autoregressive import AutoregressiveModel

SCORES = ("-log p", "likelihood ratio", "typicality")
MOST_TRAINING = 500  # training images whose mean log-likelihood `typicality` compares with


class Scores(NamedTuple):
    """Scores of N images, each (N,) float64 in nats.

    Attributes:
        log_prob: log p(x); a class-conditional model sums over the classes, a VAE gives a lower bound.
        likelihood_ratio: log p_background(x) - log p(x) (Ren et al. 2019).
        typicality: |-log p(x) - its mean over training images| (Nalisnick et al. 2019).
    """

    log_prob: Tensor
    likelihood_ratio: Tensor
    typicality: Tensor

    def by_name(self) -> dict[str, Tensor]:
        """The outlier scores by their names in SCORES."""
        return dict(zip(SCORES, (-self.log_prob, self.likelihood_ratio, self.typicality), strict=True))


class Scorer:
    """Computes the `Scores` of images with the shape and levels of a data set.

    Args:
        model: a model trained on the data set.
        background: a model trained on images of the data set that `likelihood.perturb` has spoilt.
        dataset: the data set; the mean log-likelihood of its training images defines what is typical.
        options: further arguments of `likelihood.log_likelihoods`.
    """

    def __init__(self, model: Any, background: Any, dataset: Dataset, **options: Any) -> None:
        self.model, self.background, self.options = model, background, options
        self.training = self._log_prob(model, dataset.train.images[:MOST_TRAINING])

    def _log_prob(self, model: Any, images: Tensor) -> Tensor:
        images = images.long()
        if model.n_classes is not None:
            return likelihood.class_posterior(model, images, **self.options).log_likelihood
        return log_likelihoods(model, images, **self.options)

    def __call__(self, images: Tensor) -> Scores:
        """The scores of images, integer levels (N, C, H, W)."""
        log_prob, background = self._log_prob(self.model, images), self._log_prob(self.background, images)
        return Scores(log_prob, likelihood_ratio(log_prob, background), typicality(log_prob, self.training))


def aurocs(inliers: Scores, outliers: dict[str, Scores]) -> dict[str, dict[str, float]]:
    """For each kind of outliers, by name, and each of SCORES: the probability that an outlier scores higher than an
    inlier."""
    return {
        kind: {
            name: likelihood.auroc(inlier, outlier)
            for (name, inlier), outlier in zip(inliers.by_name().items(), scores.by_name().values(), strict=True)
        }
        for kind, scores in outliers.items()
    }


@torch.no_grad()
def surprise(model: AutoregressiveModel, images: Tensor, condition: Tensor | None = None) -> Tensor:
    """-log2 p(pixel | pixels before it) in bits, over all channels of a pixel together. The sum over an image is
    -log2 p(x).

    Args:
        model: an autoregressive model in evaluation mode.
        images: integer levels (n, C, H, W).
        condition: classes (n,) of a class-conditional model.

    Returns:
        (n, H, W) bits.

    Raises:
        TypeError: the model is not autoregressive: it has no probability of a single pixel.
        ValueError: the model is in training mode, or as `model.log_prob`.
    """
    if not isinstance(model, AutoregressiveModel):
        raise TypeError(f"model must be an autoregressive model of fastgen.models, got {type(model).__name__}")
    if model.training:
        raise ValueError("model is in training mode (dropout is on): call model.eval() before scoring")
    params = model(images, condition)
    pixels = (tensor.movedim((-2, -1), (1, 2)).flatten(0, 2) for tensor in (params, images.long()))  # (n * H * W, ...)
    nats = -model.distribution.log_prob(*pixels)
    return bits_per_dim(nats, (1,)).view(len(images), *images.shape[2:])


def strangers(images: Tensor, levels: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """Makes four kinds of images that are not of the data set, from images (n, C, H, W) of it: "inverted" levels,
    "shuffled" pixels, uniform "noise", and "letters" as large as an image. Returns (n, C, H, W) of each, by name."""
    n, channels, height, width = images.shape
    order = torch.rand(n, 1, height * width, generator=generator).argsort(2).expand(-1, channels, -1)
    return {
        "inverted": levels - 1 - images,
        "shuffled": images.flatten(2).gather(2, order).view_as(images),
        "noise": torch.randint(levels, images.shape, generator=generator).to(images.dtype),
        "letters": letters(n, images.shape[1:], levels, generator).to(images.dtype),
    }


def letters(n: int, shape: tuple[int, ...], levels: int, generator: torch.Generator | None = None) -> Tensor:
    """Random white letters A to Z on black, n images of the shape (C, H, W): int64 levels (n, C, H, W)."""
    channels, height, width = shape
    font = ImageFont.load_default(size=max(6, round(1.15 * min(height, width))))
    pictures = []
    for number in torch.randint(26, (n,), generator=generator).tolist():
        picture = Image.new("L", (width, height))
        centre = (width / 2, height / 2)
        ImageDraw.Draw(picture).text(centre, chr(ord("A") + number), 255, font, anchor="mm")
        pictures.append(np.asarray(picture))
    pixels = torch.from_numpy(np.stack(pictures)).double() * ((levels - 1) / 255)
    return pixels.round().long().unsqueeze(1).expand(-1, channels, -1, -1).contiguous()
