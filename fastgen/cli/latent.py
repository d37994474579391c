"""fastgen reconstruct, interpolate: pictures of what a VAE or an autoencoder keeps of an image."""

import argparse
from typing import Any

from fastgen.cli.common import add_data, add_run, device_of, load_run_data, positive_int
from fastgen.cli.pictures import png_target


def add(commands: Any) -> None:
    reconstruct = commands.add_parser(
        "reconstruct",
        help="reconstruct images with a VAE or an autoencoder",
        description="Writes a PNG of test images, in the upper row, and their reconstructions below.",
    )
    _add(reconstruct, run_reconstruct, "reconstructions.png")
    interpolate = commands.add_parser(
        "interpolate",
        help="interpolate between images in the latent space of a VAE",
        description="Writes a PNG with one row for each pair of test images: from the reconstruction of the first to "
        "that of the second, along the straight line between their latents.",
    )
    _add(interpolate, run_interpolate, "interpolations.png")
    interpolate.add_argument("--steps", type=positive_int, default=8, help="images in a row (default 8)")


def _add(parser: Any, run: Any, out: str) -> None:
    add_run(parser, run)
    add_data(parser)
    parser.add_argument(
        "--n", "--count", type=positive_int, default=8, help="number of images, or of pairs (default 8)"
    )
    parser.add_argument("--out", default=out, help=f"the PNG to write (default {out})")


def _model_and_images(arguments: argparse.Namespace, count: int, kinds: tuple[type, ...]) -> tuple[Any, ...]:
    """The model, which must be one of `kinds`, the first `count` test images and, for a class-conditional model, their
    classes."""
    from fastgen import checkpoint

    device = device_of(arguments)
    model = checkpoint.load(arguments.folder).to(device)
    if not issubclass(type(model), kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{arguments.folder}: holds a {type(model).__name__}, expected {expected}")
    dataset = load_run_data(arguments, model)
    if count > len(dataset.test):
        raise ValueError(
            f"--n {arguments.n}: takes {count} test images, {dataset.name} has {len(dataset.test)} test images"
        )
    split = dataset.test[:count]
    labels = None if model.n_classes is None or split.labels is None else split.labels.to(device)
    return model, split.images.long().to(device), labels


def run_reconstruct(arguments: argparse.Namespace) -> int:
    import torch

    from fastgen import plots
    from fastgen.models import VAE, Autoencoder

    path = png_target(arguments.out)
    model, images, labels = _model_and_images(arguments, arguments.n, (VAE, Autoencoder))
    with torch.no_grad():
        rows = torch.cat((images.float(), model.reconstruct(images, labels).float()))
    plots.image_grid(rows, model.levels, path, columns=len(images))
    print(f"{len(images)} images and their reconstructions in {path}")
    return 0


def run_interpolate(arguments: argparse.Namespace) -> int:
    from fastgen import plots
    from fastgen.models import VAE

    path = png_target(arguments.out)
    model, images, labels = _model_and_images(arguments, 2 * arguments.n, (VAE,))
    if labels is not None:
        labels = labels[::2]
    rows = model.interpolate(images[::2], images[1::2], arguments.steps, labels).transpose(0, 1)
    plots.image_grid(rows.flatten(0, 1), model.levels, path, columns=arguments.steps)
    print(f"{arguments.n} interpolations in {path}")
    return 0
