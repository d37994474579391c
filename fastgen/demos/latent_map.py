"""A VAE with two latent dimensions: the images that it decodes over the plane, and where test digits lie in it."""

from typing import Any

import torch
from PIL import Image

from fastgen import data
from fastgen.demos.common import digits_vae, fit
from fastgen.demos.pictures import COLOURS, FONT, Axes, rows_of, sheet
from fastgen.likelihood import evaluate

SIDE = 17  # the plane is decoded at SIDE x SIDE points
IMPORTANCE_SAMPLES = 64


def run(*, steps: int = 1500, seed: int = 0) -> tuple[dict[str, Any], Image.Image]:
    """Trains the VAE, decodes a grid of the prior's quantiles, and finds the nearest training digit of each test digit.

    Returns:
        "nats" and "bits_per_dim": means over the test images, upper bounds. "neighbours": the fraction of test digits
        whose nearest training digit in the plane has the same label.
    """
    digits = data.load("digits")
    model = digits_vae(digits, latent_dim=2)
    fit(model, digits, steps, seed)
    importance = evaluate(model, digits.test.images, n_samples=IMPORTANCE_SAMPLES)
    quantiles = torch.special.ndtri((torch.arange(SIDE) + 0.5) / SIDE)
    across, up = torch.meshgrid(quantiles, quantiles.flip(0), indexing="xy")
    with torch.no_grad():
        plane = model.expected(torch.stack((across, up), 2).view(-1, 2)).view(SIDE, SIDE, *digits.shape)
        train_means, test_means = (model.encode(split.images)[0] for split in (digits.train, digits.test))
    assert digits.train.labels is not None and digits.test.labels is not None
    nearest = torch.cdist(test_means, train_means).argmin(1)
    neighbours = (digits.train.labels[nearest] == digits.test.labels).double().mean().item()
    limit = 1.05 * float(test_means.abs().max())
    axes = Axes((-limit, limit), (-limit, limit), (620, 600))
    ticks = {float(value): str(value) for value in range(-int(limit), int(limit) + 1)}
    axes.ticks(ticks, ticks)
    for (x, y), label in zip(test_means.tolist(), digits.test.labels.tolist(), strict=True):
        axes.draw.text(axes.place(x, y), str(label), COLOURS[label], FONT, anchor="mm")
    numbers = {"nats": importance.nats, "bits_per_dim": importance.bits_per_dim, "neighbours": neighbours}
    picture = sheet(
        (f"Two latent dimensions: <= {importance.bits_per_dim:.3f} bits/dim", None),
        ("Decoded at the prior's quantiles", rows_of(plane, digits.levels)),
        (f"Test digits by label; {100 * neighbours:.1f} % have a nearest training digit of their class", axes.picture),
    )
    return numbers, picture
