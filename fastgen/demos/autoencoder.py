"""Trains an autoencoder without labels, then a linear classifier on its features."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastgen import data
from fastgen.data import Split
from fastgen.demos.common import fit
from fastgen.demos.pictures import COLOURS, FONT, INK, Axes, rows_of, sheet
from fastgen.models import Autoencoder

FEATURES = 8
LABELS = (10, 100)  # numbers of labelled images, equally many of each class; all training images come after these
DRAWS = 10  # random choices of the labelled images, over which the accuracy is averaged


def run(*, steps: int = 1000, seed: int = 0) -> tuple[dict[str, Any], Image.Image]:
    """Compares linear classifiers on the encoder's 8 features and on the 64 pixels, given 10, 100 and all labels.

    Returns:
        "error" and "error_of_mean": the mean squared distance of test images from their reconstructions and from the
        mean training image, on the scale of -1..1. "accuracy": for each number of labels, the fraction of test images
        classified rightly by "features" and by "pixels", with standard errors over the choices of labelled images.
    """
    digits = data.load("digits")
    model = Autoencoder(digits.shape, FEATURES, levels=digits.levels)
    fit(model, digits, steps, seed)
    images, test = digits.train.images, digits.test.images
    with torch.no_grad():
        features = model.encode(images), model.encode(test)
        rebuilt = model.reconstruct(test[:16])
        error = model.loss(test).item()
    train_pixels, test_pixels = ((part.double() / (digits.levels - 1) * 2 - 1).flatten(1) for part in (images, test))
    accuracy = {
        str(count): {
            name: _accuracy(x, digits.train, digits.test, count, seed)
            for name, x in (("features", features), ("pixels", (train_pixels, test_pixels)))
        }
        for count in (*LABELS, len(images))
    }
    numbers = {
        "features": FEATURES,
        "error": error,
        "error_of_mean": (test_pixels - train_pixels.mean(0)).square().sum(1).mean().item(),
        "accuracy": accuracy,
    }
    picture = sheet(
        ("Test digits, and below each what 8 numbers keep of it", rows_of(torch.stack((test[:16], rebuilt)), 17)),
        (
            "Accuracy of a linear classifier by the number of labels: 8 features (blue), 64 pixels (grey)",
            _bars(accuracy),
        ),
    )
    return numbers, picture


def _accuracy(x: tuple[Tensor, Tensor], train: Split, test: Split, count: int, seed: int) -> dict[str, float]:
    """Mean fraction of test images classified rightly, and its standard error, over draws of `count` labelled images.

    Args:
        x: inputs of the classifier, (n, features), for the training and for the test images.
    """
    from sklearn.linear_model import LogisticRegression

    assert train.labels is not None and test.labels is not None
    mean, spread = x[0].mean(0), x[0].std(0) + 1e-6
    train_x, test_x = ((part - mean) / spread for part in x)
    fractions = []
    generator = torch.Generator().manual_seed(seed)
    for _ in range(DRAWS if count < len(train) else 1):
        chosen = torch.arange(len(train))
        if count < len(train):
            order = torch.randperm(len(train), generator=generator)
            chosen = torch.cat([order[train.labels[order] == label][: count // 10] for label in range(10)])
        classifier = LogisticRegression(max_iter=300).fit(train_x[chosen].numpy(), train.labels[chosen].numpy())
        fractions.append(float(classifier.score(test_x.numpy(), test.labels.numpy())))
    return {"mean": float(np.mean(fractions)), "standard_error": float(np.std(fractions) / np.sqrt(len(fractions)))}


def _bars(accuracy: dict[str, dict[str, dict[str, float]]]) -> Image.Image:
    axes = Axes((0, len(accuracy)), (0, 1), (440, 220))
    axes.ticks({}, {value / 4: f"{25 * value} %" for value in range(5)})
    for place, (count, row) in enumerate(accuracy.items()):
        for side, (name, colour) in enumerate((("features", COLOURS[0]), ("pixels", COLOURS[7]))):
            left = place + 0.15 + 0.35 * side
            height = row[name]["mean"]
            axes.draw.rectangle((*axes.place(left, height), *axes.place(left + 0.33, 0)), colour)
            axes.draw.text(axes.place(left + 0.17, height), f"{100 * height:.1f}", INK, FONT, anchor="md")
        axes.draw.text(axes.place(place + 0.5, -0.03), f"{count} labels", INK, FONT, anchor="ma")
    return axes.picture
