"""fastgen evaluate, sample, complete: what can be done with a trained model."""

import argparse
import sys
from pathlib import Path
from typing import Any

from fastgen.cli.common import DATA_HELP, add_device, device_of, natural, number, positive_int

BACKENDS = ("auto", "naive", "eager", "compiled", "cuda_graph", "persistent", "fixed_point")


def add(commands: Any) -> None:
    evaluate = commands.add_parser(
        "evaluate", help="score a model on images", description="Bits/dim of a model on images it has not seen."
    )
    _add_run(evaluate, run_evaluate)
    evaluate.add_needed("--data", help=DATA_HELP)
    evaluate.add_argument("--split", choices=("train", "validation", "test"), default="test", help="default: test")
    evaluate.add_argument("--batch-size", type=positive_int, help="images at a time (default: up to 256)")
    evaluate.add_argument(
        "--samples", type=positive_int, default=64, help="draws of the latent for each image of a VAE (default 64)"
    )
    sample = commands.add_parser("sample", help="draw images", description="Draws images and writes them as a PNG.")
    _add_run(sample, run_sample)
    sample.add_argument("--n", type=positive_int, default=64, help="number of images (default 64)")
    sample.add_argument("--label", type=natural, help="class of a conditional model (default: all, in turns)")
    _add_drawing(sample, "samples.png")
    complete = commands.add_parser(
        "complete",
        help="complete half-hidden images",
        description="Hides the lower half of test images and draws it anew, several times. Columns of the PNG: the "
        "image, what the model sees, the completions.",
    )
    _add_run(complete, run_complete)
    complete.add_needed("--data", help=DATA_HELP)
    complete.add_argument("--n", type=positive_int, default=8, help="number of images (default 8)")
    _add_drawing(complete, "completions.png")


def _add_run(parser: argparse.ArgumentParser, run: Any) -> None:
    parser.add_argument("folder", metavar="RUN", help="folder of a run, or one written by fastgen.save")
    add_device(parser)
    parser.set_defaults(run=run)


def _add_drawing(parser: argparse.ArgumentParser, out: str) -> None:
    parser.add_argument("--out", default=out, help=f"the PNG to write (default {out})")
    parser.add_argument("--seed", type=natural, default=0, help="of the noise (default 0)")
    parser.add_argument("--temperature", type=number, default=1.0, help="0: the most probable levels (default 1)")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="how to run an autoregressive model")


def run_evaluate(arguments: argparse.Namespace) -> int:
    from fastgen import baselines, checkpoint, data, likelihood
    from fastgen.models import VAE, Autoencoder
    from fastgen.train import check_fit, images_at_once, mean_loss, unit

    device = device_of(arguments)
    model = checkpoint.load(arguments.folder).to(device)
    dataset = data.load(arguments.data)
    check_fit(model, dataset)
    split = getattr(dataset, arguments.split)
    if dataset.attribution:
        print(dataset.attribution)
    print(f"{type(model).__name__} on the {arguments.split} images of {dataset.name}:")
    if isinstance(model, Autoencoder):
        error = mean_loss(model, split, device, batch_size=arguments.batch_size) * unit(model)[1]
        print(f"squared error {error:.5f} a dimension on the scale of -1..1, {len(split)} images")
        return 0
    options: dict[str, Any] = {"batch_size": arguments.batch_size or images_at_once(model)}
    if isinstance(model, VAE):
        options["n_samples"] = arguments.samples
    labels = None if model.n_classes is None else split.labels
    print(likelihood.evaluate(model, split.images.long(), labels, **options))
    print(
        f"to compare: uniform {baselines.uniform_bits_per_dim(dataset):.3f} bits/dim, a histogram for each position "
        f"{baselines.histogram_bits_per_dim(dataset, split):.3f}"
    )
    if labels is not None:
        named = likelihood.class_posterior(model, split.images.long(), **options).labels
        print(f"classified by Bayes' rule: {(named == labels).double().mean():.1%} right")
    return 0


def run_sample(arguments: argparse.Namespace) -> int:
    import torch

    from fastgen import accelerate, checkpoint, plots
    from fastgen.models import VAE, Autoencoder

    path = _target(arguments.out)
    device = device_of(arguments)
    model = checkpoint.load(arguments.folder).to(device)
    if isinstance(model, Autoencoder):
        raise ValueError(f"{arguments.folder}: an Autoencoder has no distribution to sample from")
    condition = None
    if model.n_classes is not None:
        if arguments.label is not None and arguments.label >= model.n_classes:
            raise ValueError(f"--label {arguments.label}: the model has the classes 0..{model.n_classes - 1}")
        condition = torch.arange(arguments.n, device=device) % model.n_classes
        if arguments.label is not None:
            condition.fill_(arguments.label)
    elif arguments.label is not None:
        raise ValueError("--label: the model is not conditional on classes")
    options = {"seed": arguments.seed, "temperature": arguments.temperature}
    if isinstance(model, VAE):
        images = model.sample(arguments.n, condition=condition, **options)
    else:
        one = None if condition is None else condition[:1]
        sampler = accelerate(
            model, model.shape, distribution=model.distribution, condition=one, backend=arguments.backend
        )
        images = sampler.sample(arguments.n, condition=condition, progress=sys.stderr.isatty(), **options)
    columns = model.n_classes if condition is not None and arguments.label is None else _columns(arguments.n)
    plots.image_grid(images, model.levels, path, columns=min(columns, arguments.n))
    print(f"{arguments.n} images in {path}")
    return 0


def run_complete(arguments: argparse.Namespace) -> int:
    from fastgen import accelerate, checkpoint, completions, data
    from fastgen.models.autoregressive import AutoregressiveModel
    from fastgen.train import check_fit

    path = _target(arguments.out)
    device = device_of(arguments)
    model = checkpoint.load(arguments.folder).to(device)
    if not isinstance(model, AutoregressiveModel):
        raise ValueError(f"{arguments.folder}: a {type(model).__name__} cannot complete images pixel by pixel")
    dataset = data.load(arguments.data)
    check_fit(model, dataset)
    if arguments.n > len(dataset.test):
        raise ValueError(f"--n {arguments.n}: {dataset.name} has {len(dataset.test)} test images")
    if dataset.attribution:
        print(dataset.attribution)
    split = dataset.test[: arguments.n]
    one = None if model.n_classes is None or split.labels is None else split.labels[:1].to(device)
    sampler = accelerate(model, model.shape, distribution=model.distribution, condition=one, backend=arguments.backend)
    completions.complete_halves(sampler, split, path, seed=arguments.seed, temperature=arguments.temperature)
    print(f"{completions.EACH} completions of each of {arguments.n} images in {path}")
    return 0


def _target(path: str) -> Path:
    """The PNG to write, known to be writable before the work begins. Raises ValueError or OSError."""
    from fastgen import files, plots

    target = plots.png_path(path)
    files.make_folder(target.parent)
    return target


def _columns(count: int) -> int:
    return max(1, round(count**0.5))
