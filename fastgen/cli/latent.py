"""fastgen reconstruct, interpolate: through the latent space of a VAE or an autoencoder."""

import argparse
from typing import Any

from fastgen.cli.common import add_data, add_run, device_of, load_run_data, positive_int
from fastgen.cli.pictures import png_target


def add(commands: Any) -> None:
    reconstruct = commands.add_parser(
        "reconstruct",
        help="rebuild images from their latents",
        description="Test images above what a VAE or an autoencoder makes of them.",
    )
    _add(reconstruct, run_reconstruct, "reconstructions.png")
    interpolate = commands.add_parser(
        "interpolate",
        help="from one image to another through the latent space of a VAE",
        description="A row a pair of test images: the reconstruction of one, images on the straight line between their "
        "latents, the reconstruction of the other.",
    )
    _add(interpolate, run_interpolate, "interpolations.png")
    interpolate.add_argument("--steps", type=positive_int, default=8, help="images of a row (default 8)")


def _add(parser: Any, run: Any, out: str) -> None:
    add_run(parser, run)
    add_data(parser)
    parser.add_argument(
        "--n", "--count", type=positive_int, default=8, help="number of images, or of pairs (default 8)"
    )
    parser.add_argument("--out", default=out, help=f"the PNG to write (default {out})")


def _model_and_images(arguments: argparse.Namespace, each: int, kinds: tuple[type, ...]) -> tuple[Any, ...]:
    from fastgen import checkpoint

    device = device_of(arguments)
    model = checkpoint.load(arguments.folder).to(device)
    if not issubclass(type(model), kinds):
        raise ValueError(f"{arguments.folder}: a {type(model).__name__} has no such latents")
    dataset = load_run_data(arguments, model)
    if arguments.n * each > len(dataset.test):
        raise ValueError(f"--n {arguments.n}: {dataset.name} has {len(dataset.test)} test images")
    split = dataset.test[: arguments.n * each]
    labels = None if model.n_classes is None or split.labels is None else split.labels.to(device)
    return model, split.images.long().to(device), labels


def run_reconstruct(arguments: argparse.Namespace) -> int:
    import torch

    from fastgen import plots
    from fastgen.models import VAE, Autoencoder

    path = png_target(arguments.out)
    model, images, labels = _model_and_images(arguments, 1, (VAE, Autoencoder))
    with torch.no_grad():
        rows = torch.cat((images.float(), model.reconstruct(images, labels).float()))
    plots.image_grid(rows, model.levels, path, columns=len(images))
    print(f"{len(images)} images and their reconstructions in {path}")
    return 0


def run_interpolate(arguments: argparse.Namespace) -> int:
    from fastgen import plots
    from fastgen.models import VAE

    path = png_target(arguments.out)
    model, images, labels = _model_and_images(arguments, 2, (VAE,))
    if labels is not None:
        labels = labels[::2]
    rows = model.interpolate(images[::2], images[1::2], arguments.steps, labels).transpose(0, 1)
    plots.image_grid(rows.flatten(0, 1), model.levels, path, columns=arguments.steps)
    print(f"{arguments.n} interpolations in {path}")
    return 0
