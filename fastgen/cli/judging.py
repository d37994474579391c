"""fastgen classify, score: classification by Bayes' rule, and outlier scores."""

import argparse
import csv
import io
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgen.cli.common import (
    add_data,
    add_run,
    add_split,
    device_of,
    finite_number,
    load_run_data,
    non_negative_int,
    positive_int,
)
from fastgen.cli.pictures import png_target

if TYPE_CHECKING:
    from torch import Tensor

    from fastgen.classification import Calibration

BRIGHTEST = 255  # the highest level of a picture of maps


def add(commands: Any) -> None:
    classify = commands.add_parser(
        "classify",
        help="classify images by Bayes' rule",
        description="Classifies images with a class-conditional model by p(y | x), proportional to p(x | y) p(y), with "
        "equal p(y). Prints accuracy and calibration, and those of a discriminative network with about as many "
        "parameters, which the command trains on the same images first.",
    )
    _add_common(classify, run_classify, "discriminative network", 600)
    classify.add_argument("--out", metavar="FILE", help="a PNG of accuracy over confidence (needs matplotlib)")
    score = commands.add_parser(
        "score",
        help="compute log p(x), bits/dim, outlier scores and maps of surprise",
        description="Writes one row per image to a .csv: log p(x), bits/dim, the likelihood ratio to a background "
        "model (Ren et al. 2019) and typicality (Nalisnick et al. 2019). For autoregressive models it also writes a "
        "PNG of the least and the most likely images, with maps of the surprise at each pixel. Prints how well each "
        "score tells the images from inverted, shuffled, noise and letter images (AUROC; 0.5 is chance).",
    )
    _add_common(score, run_score, "background model", 300)
    score.add_required("--out", metavar="FILE", help="the .csv to write; the maps go to the same name with .png")
    score.add_argument("--background", metavar="RUN", help="use this background model instead of training one")
    score.add_argument(
        "--rate",
        type=finite_number,
        default=0.3,
        help="fraction of levels replaced by noise in the background model's training images (default 0.3)",
    )
    score.add_argument(
        "--maps", type=positive_int, default=8, help="number of least and of most likely images with a map (default 8)"
    )


def _add_common(parser: Any, run: Any, network: str, steps: int) -> None:
    add_run(parser, run)
    add_data(parser)
    add_split(parser)
    parser.add_argument("--batch-size", type=positive_int, help="images at a time (default: up to 256)")
    parser.add_argument("--samples", type=positive_int, default=64, help="importance samples of a VAE (default 64)")
    parser.add_argument(
        "--steps", type=positive_int, default=steps, help=f"training steps of the {network} (default {steps})"
    )
    parser.add_argument("--seed", type=non_negative_int, default=0, help="seed of everything random (default 0)")


def _load(arguments: argparse.Namespace) -> tuple[Any, Any, Any, dict[str, Any]]:
    """The model, the data set, the split of it, and options for `likelihood.log_likelihoods`."""
    from fastgen import checkpoint
    from fastgen.models import VAE, Autoencoder
    from fastgen.train import images_at_once

    model = checkpoint.load(arguments.folder).to(device_of(arguments))
    if isinstance(model, Autoencoder):
        raise ValueError(f"{arguments.folder}: an Autoencoder has no likelihood")
    dataset = load_run_data(arguments, model)
    options: dict[str, Any] = {"batch_size": arguments.batch_size or images_at_once(model)}
    if isinstance(model, VAE):
        options |= {"n_samples": arguments.samples, "seed": arguments.seed}
    return model, dataset, getattr(dataset, arguments.split), options


def _size(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def run_classify(arguments: argparse.Namespace) -> int:
    import torch

    from fastgen import likelihood, plots
    from fastgen.classification import calibration, classifier_of_size
    from fastgen.demos.common import fit

    path = None if arguments.out is None else png_target(arguments.out)
    model, dataset, split, options = _load(arguments)
    if model.n_classes is None:
        raise ValueError(f"{arguments.folder}: the model is not class-conditional, and has no p(x | y)")
    device = next(model.parameters()).device
    torch.manual_seed(arguments.seed)
    classifier = classifier_of_size(_size(model), model.shape, model.levels, model.n_classes)
    fit(classifier, dataset, arguments.steps, arguments.seed, device)
    images = split.images.long()
    with torch.no_grad():
        direct = torch.cat([classifier(part.to(device)).cpu() for part in images.split(options["batch_size"])])
    log_probs_by_name = {
        f"{type(model).__name__} by Bayes' rule": likelihood.class_posterior(model, images, **options).log_probs,
        "discriminative network": direct,
    }
    print(f"{len(images)} {arguments.split} images of {dataset.name}, {model.n_classes} classes")
    results = {name: calibration(log_probs, split.labels) for name, log_probs in log_probs_by_name.items()}
    for (name, result), size in zip(results.items(), (_size(model), _size(classifier)), strict=True):
        print(f"{name} ({size:,} parameters): {result}")
        print(_reliability(result))
    if path is not None:
        if plots.reliability({name: (result.confidence, result.right) for name, result in results.items()}, path):
            print(f"accuracy over confidence in {path}")
        else:
            print(f"{path} was not written, it needs matplotlib: pip install matplotlib")
    return 0


def _reliability(result: "Calibration") -> str:
    """One line with the confidence, the accuracy and the number of images of each bin that has images."""
    bins = zip(result.confidence.tolist(), result.right.tolist(), result.images.tolist(), strict=True)
    parts = [f"{confidence:.2f}: {right:.2f} ({images})" for confidence, right, images in bins if images]
    return f"  confidence: accuracy (images)  {'  '.join(parts)}"


def run_score(arguments: argparse.Namespace) -> int:
    import torch

    from fastgen import files
    from fastgen.likelihood import bits_per_dim
    from fastgen.models.autoregressive import AutoregressiveModel
    from fastgen.scores import SCORES, Scorer, aurocs, strangers

    path = Path(arguments.out)
    if path.suffix.lower() != ".csv":
        raise ValueError(f"--out {arguments.out}: must end in .csv")
    if not 0 < arguments.rate <= 1:
        raise ValueError(f"--rate must be in (0, 1], got {arguments.rate}")
    files.make_folder(path.parent)
    model, dataset, split, options = _load(arguments)
    background = _background(arguments, model, dataset)
    scorer = Scorer(model, background, dataset, **options)
    scores = scorer(split.images)
    buffer = io.StringIO()
    rows = csv.writer(buffer, lineterminator="\n")
    rows.writerow(["image", "label", "log_p_nats", "bits_per_dim", "likelihood_ratio_nats", "typicality_nats"])
    labels = [""] * len(split) if split.labels is None else split.labels.tolist()
    columns = (scores.log_prob, bits_per_dim(-scores.log_prob, model.shape), scores.likelihood_ratio, scores.typicality)
    values = zip(*(column.tolist() for column in columns), strict=True)
    for index, (label, numbers) in enumerate(zip(labels, values, strict=True)):
        rows.writerow([index, label, *(f"{value:.6g}" for value in numbers)])
    files.write_atomically({path: buffer.getvalue().encode()})
    mean = -scores.log_prob.mean()
    print(
        f"{len(split)} {arguments.split} images of {dataset.name} in {path}: {mean:.2f} nats per image, "
        f"{bits_per_dim(mean, model.shape):.3f} bits/dim"
    )
    if isinstance(model, AutoregressiveModel):
        maps = path.with_suffix(".png")
        _write_maps(model, split, scores.log_prob.argsort(), min(arguments.maps, len(split)), maps)
        print(f"the least and the most likely images, with the surprise at each pixel, in {maps}")
    generator = torch.Generator().manual_seed(arguments.seed)
    others = {kind: scorer(images) for kind, images in strangers(split.images, model.levels, generator).items()}
    print("AUROC against " + "".join(f"{name:>18}" for name in SCORES))
    for kind, row in aurocs(scores, others).items():
        print(f"{kind:<14}" + "".join(f"{value:18.3f}" for value in row.values()))
    return 0


def _background(arguments: argparse.Namespace, model: Any, dataset: Any) -> Any:
    """The background model: loaded from --background, or trained on spoilt images."""
    import torch

    from fastgen import checkpoint, data, likelihood
    from fastgen.demos.common import fit
    from fastgen.train import check_fit

    device = next(model.parameters()).device
    if arguments.background is not None:
        background = checkpoint.load(arguments.background).to(device)
        if type(background) is not type(model):
            raise ValueError(
                f"--background {arguments.background}: is a {type(background).__name__}, expected a "
                f"{type(model).__name__} like the model"
            )
        check_fit(background, dataset)
        return background
    torch.manual_seed(arguments.seed)
    background = type(model)(**{**model.constructor_arguments(), "n_classes": None})
    spoilt = likelihood.perturb(dataset.train.images.repeat(4, 1, 1, 1), model.levels, arguments.rate)
    fit(background, replace(dataset, n_classes=None, train=data.Split(spoilt)), arguments.steps, arguments.seed, device)
    return background


def _write_maps(model: Any, split: Any, order: "Tensor", count: int, path: Path) -> None:
    """Writes a PNG of the first and of the last `count` images in `order`; maps of the surprise are below each row."""
    import torch

    from fastgen import plots
    from fastgen.scores import surprise

    device = next(model.parameters()).device
    chosen = torch.cat((order[:count], order[-count:]))
    images = split.images[chosen].long()
    labels = None if model.n_classes is None else split.labels[chosen].to(device)
    bits = surprise(model, images.to(device), labels).cpu()
    most_bits = float(bits.max())
    maps = (bits / max(most_bits, 1e-9) * BRIGHTEST).unsqueeze(1).expand(-1, model.shape[0], -1, -1)
    scaled = images.double() * (BRIGHTEST / (model.levels - 1))
    rows = torch.stack((scaled.unflatten(0, (2, count)), maps.double().unflatten(0, (2, count))), 1)
    names = ["least likely", f"bits (white: {most_bits:.1f})", "most likely", "bits"]
    plots.image_grid(rows.flatten(0, 2), BRIGHTEST + 1, path, columns=count, row_names=names)
