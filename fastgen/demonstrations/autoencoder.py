"""Train an autoencoder without labels, throw its decoder away, and classify by its features."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgen import data
from fastgen.demonstrations.common import put_down, train
from fastgen.demonstrations.pictures import COLOURS, FONT, INK, Axes, sheet, tiles
from fastgen.models import Autoencoder

FEATURES = 8
LABELS = (10, 100)  # images with a label, as many of each class; and all
DRAWS = 10  # choices of the labelled images, which the accuracy is averaged over


def run_autoencoder(out: str | Path | None = None, *, steps: int = 1000, seed: int = 0) -> dict[str, Any]:
    """A linear classifier on the encoder's 8 features, and one on the 64 pixels, given 10, 100 and all labels.

    Args:
        out: folder for autoencoder.png and autoencoder.json; None writes nothing.
        steps: of training the autoencoder.
        seed: of everything random; torch's own generator is left as it was.

    Returns:
        "error" and "error_of_mean": squared distance of test images from their reconstructions, and from the mean
        image. "accuracy": for each number of labels the fractions of test images right, by features and by pixels,
        with the standard errors over the choices of labelled images.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        digits = data.load("digits")
        images, test = digits.train.images, digits.test.images
        model = Autoencoder(digits.shape, FEATURES, levels=digits.levels)
        train(model, lambda chosen, step: model.loss(images[chosen]), len(images), steps)
        with torch.no_grad():
            features = model.encode(images), model.encode(test)
            rebuilt = model.reconstruct(test[:16])
            error = model.loss(test).item()
    scaled = [part.double() / (digits.levels - 1) * 2 - 1 for part in (images, test)]
    pixels = scaled[0].flatten(1), scaled[1].flatten(1)
    accuracy = {
        str(count): {
            name: _accuracy(x, digits.train.labels, digits.test.labels, count, seed)
            for name, x in (("features", features), ("pixels", pixels))
        }
        for count in (*LABELS, len(images))
    }
    numbers = {
        "features": FEATURES,
        "error": error,
        "error_of_mean": (pixels[1] - pixels[0].mean(0)).square().sum(1).mean().item(),
        "accuracy": accuracy,
    }
    rows = [
        ("Test digits, and below each what 8 numbers keep of it", tiles(torch.stack((test[:16], rebuilt)), 17)),
        (
            "Accuracy of a linear classifier by the number of labels: 8 features (blue), 64 pixels (grey)",
            _bars(accuracy),
        ),
    ]
    return put_down(out, "autoencoder", numbers, sheet(rows))


def _accuracy(
    x: tuple[Tensor, Tensor], labels: Tensor | None, test_labels: Tensor | None, count: int, seed: int
) -> dict[str, float]:
    """Mean fraction of test images right, and its standard error, over draws of `count` labelled images."""
    from sklearn.linear_model import LogisticRegression

    assert labels is not None and test_labels is not None
    mean, spread = x[0].mean(0), x[0].std(0) + 1e-6
    train_x, test_x = ((part - mean) / spread for part in x)
    found = []
    generator = torch.Generator().manual_seed(seed)
    for _ in range(DRAWS if count < len(labels) else 1):
        chosen = torch.arange(len(labels))
        if count < len(labels):
            order = torch.randperm(len(labels), generator=generator)
            each = [order[labels[order] == label][: count // 10] for label in range(10)]
            chosen = torch.cat(each)
        classifier = LogisticRegression(max_iter=300).fit(train_x[chosen].numpy(), labels[chosen].numpy())
        found.append(float(classifier.score(test_x.numpy(), test_labels.numpy())))
    return {"mean": float(np.mean(found)), "standard_error": float(np.std(found) / np.sqrt(len(found)))}


def _bars(accuracy: dict[str, dict[str, dict[str, float]]]) -> Any:
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
