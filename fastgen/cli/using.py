"""fastgen evaluate."""

import argparse
from typing import Any

from fastgen.cli.common import add_data, add_run, add_split, device_of, load_run_data, non_negative_int, positive_int


def add(commands: Any) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="measure a model's bits/dim on images",
        description="Prints a model's bits/dim on a data set; for a class-conditional model also the accuracy and "
        "calibration of Bayes' rule. Under torchrun the processes share the images, and the result does not depend on "
        "the number of processes.",
    )
    add_run(evaluate, run_evaluate)
    add_data(evaluate)
    add_split(evaluate)
    evaluate.add_argument("--batch-size", type=positive_int, help="images at a time (default: up to 256)")
    evaluate.add_argument(
        "--samples", type=positive_int, default=64, help="importance samples for each image, for a VAE (default 64)"
    )
    evaluate.add_argument("--seed", type=non_negative_int, default=0, help="seed of these samples (default 0)")


def run_evaluate(arguments: argparse.Namespace) -> int:
    from fastgen import checkpoint, likelihood
    from fastgen.classification import calibration
    from fastgen.demos import baselines
    from fastgen.models import VAE, Autoencoder
    from fastgen.train import images_at_once, mean_loss, unit

    device = device_of(arguments)
    model = checkpoint.load(arguments.folder).to(device)
    dataset = load_run_data(arguments, model)
    split = getattr(dataset, arguments.split)
    print(f"{type(model).__name__} on the {arguments.split} images of {dataset.name}:")
    if isinstance(model, Autoencoder):
        error = mean_loss(model, split, device, batch_size=arguments.batch_size) * unit(model)[1]
        print(f"squared error {error:.5f} per dimension on the scale of -1..1, {len(split)} images")
        return 0
    options: dict[str, Any] = {"batch_size": arguments.batch_size or images_at_once(model), "shared": True}
    if isinstance(model, VAE):
        options |= {"n_samples": arguments.samples, "seed": arguments.seed}
    labels = None if model.n_classes is None else split.labels
    score = likelihood.evaluate(model, split.images.long(), labels, **options)
    print(score)
    print(
        f"baselines: uniform {baselines.uniform_bits_per_dim(dataset):.3f} bits/dim, a histogram for each position "
        f"{baselines.histogram_bits_per_dim(dataset, split):.3f}"
    )
    if labels is not None:
        posterior = likelihood.class_posterior(model, split.images.long(), **options)
        print(f"classification by Bayes' rule: {calibration(posterior.log_probs, labels)}")
    return 0
