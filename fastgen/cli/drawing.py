"""fastgen sample, complete."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from fastgen.cli.common import (
    add_data,
    add_run,
    device_of,
    finite_number,
    load_run_data,
    non_negative_int,
    positive_int,
)
from fastgen.cli.pictures import check_target, png_target, read_images, read_mask, write_images

if TYPE_CHECKING:
    from torch import Tensor

BACKENDS = ("auto", "naive", "eager", "compiled", "cuda_graph", "persistent", "fixed_point")
VAE_BATCH = 64  # images of a VAE that are drawn together, from one seed


def add(commands: Any) -> None:
    sample = commands.add_parser(
        "sample",
        help="draw images",
        description="Draws images from a trained model. Under torchrun the processes share the work, and the images do "
        "not depend on the number of processes. To compute the FID of a folder of samples with the torch-fidelity "
        "package: fidelity --fid --input1 SAMPLES --input2 IMAGES.",
    )
    add_run(sample, run_sample)
    sample.add_argument("--n", "--count", type=positive_int, default=64, help="number of images (default 64)")
    sample.add_argument(
        "--label", type=non_negative_int, help="class to draw, for a class-conditional model (default: all in turn)"
    )
    sample.add_argument(
        "--out",
        default="samples.png",
        help="a .png (a grid of images; NAME-1.png, NAME-2.png, ... if there are many), an .npz file, or a folder for "
        "one PNG per image (default samples.png)",
    )
    _add_drawing(sample)
    complete = commands.add_parser(
        "complete",
        help="complete images of which a part is hidden",
        description="Hides the lower half of each image, or what --mask hides, and draws it several times. Each row of "
        "the PNG shows an image, what the model sees of it, and the completions.",
    )
    add_run(complete, run_complete)
    add_data(complete, required=False, more=": its test images")
    complete.add_argument(
        "--images", metavar="FILE", help="your own images instead of --data: an image file, a folder, an .npy or .npz"
    )
    complete.add_argument(
        "--mask", metavar="FILE", help="an image file whose white pixels are kept, or an .npy or .npz with 1 for these"
    )
    complete.add_argument("--label", type=non_negative_int, help="class of all --images, for a class-conditional model")
    complete.add_argument(
        "--n", "--count", type=positive_int, help="number of images (default: 8 of --data, all of --images)"
    )
    complete.add_argument("--out", default="completions.png", help="the PNG to write (default completions.png)")
    _add_drawing(complete)


def _add_drawing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=non_negative_int, default=0, help="seed of the noise (default 0)")
    parser.add_argument(
        "--temperature", type=finite_number, default=1.0, help="default 1; 0 takes the most probable level of each draw"
    )
    parser.add_argument("--top-k", type=positive_int, help="draw from the K most probable levels")
    parser.add_argument(
        "--top-p", type=finite_number, help="draw from the fewest most probable levels whose probabilities sum to P"
    )
    parser.add_argument(
        "--backend", choices=BACKENDS, default="auto", help="how to run an autoregressive model (default auto)"
    )


def run_sample(arguments: argparse.Namespace) -> int:
    import torch

    from fastgen import checkpoint, distributed, plots

    path = check_target(arguments.out)
    device = device_of(arguments)
    model = checkpoint.load(arguments.folder).to(device)
    condition = None
    if arguments.label is not None:
        condition = _label(arguments, model, arguments.n)
    elif model.n_classes is not None:
        condition = torch.arange(arguments.n) % model.n_classes
    images = draw(model, arguments, condition)
    if distributed.rank() == 0:
        all_classes = condition is not None and arguments.label is None  # one column for each
        columns = min(model.n_classes if all_classes else plots.columns_of(arguments.n), arguments.n)
        files = write_images(images, model.levels, path, columns=columns, labels=condition)
        print(f"{arguments.n} images in {files}")
    return 0


def draw(model: Any, arguments: argparse.Namespace, condition: "Tensor | None") -> "Tensor":
    """Draws levels (n, C, H, W) and returns them on the CPU. They depend on the seed, not on the number of processes.

    Args:
        condition: classes (n,) of a class-conditional model.

    Raises:
        ValueError: the model cannot be sampled, or not with these options.
    """
    import torch

    from fastgen import distributed
    from fastgen.models import VAE, Autoencoder

    if isinstance(model, Autoencoder):
        raise ValueError(f"{arguments.folder}: an Autoencoder has no distribution to sample from")
    device = next(model.parameters()).device
    classes = None if condition is None else condition.to(device)
    images = torch.zeros(arguments.n, *model.shape, dtype=torch.int64)
    if isinstance(model, VAE):
        for name in ("top_k", "top_p"):
            if getattr(arguments, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} is for an autoregressive model, not for a VAE")
        for number, start in enumerate(range(0, arguments.n, VAE_BATCH)):
            if number % distributed.world_size() == distributed.rank():
                part = slice(start, min(arguments.n, start + VAE_BATCH))
                images[part] = model.sample(
                    part.stop - start,
                    seed=distributed.mix(arguments.seed, number),
                    temperature=arguments.temperature,
                    condition=None if classes is None else classes[part],
                ).cpu()
        return distributed.merged(images)
    sampler = _sampler(model, arguments, classes)
    part = distributed.shard(arguments.n)
    # The noise that sample(seed=...) would draw for all images; each process takes its part of it.
    generator = torch.Generator().manual_seed(arguments.seed)
    noise = torch.rand(sampler.noise_shape(arguments.n), generator=generator)[part].to(device)
    images[part] = sampler.sample(
        part.stop - part.start,
        noise=noise,
        condition=None if classes is None else classes[part],
        progress=sys.stderr.isatty() and distributed.rank() == 0,
        **_options(arguments),
    ).cpu()
    return distributed.merged(images)


def _sampler(model: Any, arguments: argparse.Namespace, classes: "Tensor | None") -> Any:
    from fastgen import accelerate

    example = None if classes is None else classes[:1]
    return accelerate(model, model.shape, distribution=model.distribution, condition=example, backend=arguments.backend)


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in ("temperature", "top_k", "top_p")}


def _label(arguments: argparse.Namespace, model: Any, count: int) -> "Tensor":
    """The class --label for each of `count` images, (count,)."""
    import torch

    if model.n_classes is None:
        raise ValueError("--label: the model is not class-conditional")
    if arguments.label >= model.n_classes:
        raise ValueError(f"--label {arguments.label}: the model has the classes 0..{model.n_classes - 1}")
    return torch.full((count,), arguments.label)


def run_complete(arguments: argparse.Namespace) -> int:
    from fastgen import checkpoint
    from fastgen.demos import completions
    from fastgen.models.autoregressive import AutoregressiveModel

    path = png_target(arguments.out)
    device = device_of(arguments)
    model = checkpoint.load(arguments.folder).to(device)
    if not isinstance(model, AutoregressiveModel):
        raise ValueError(f"{arguments.folder}: {type(model).__name__} cannot complete images pixel by pixel")
    images, labels = _images_to_complete(arguments, model)
    known = completions.upper_half(model.shape)
    if arguments.mask is not None:
        known = read_mask(arguments.mask, len(images), model.shape)
    classes = None if labels is None else labels.to(device)
    sampler = _sampler(model, arguments, classes)
    options = {"condition": labels, "seed": arguments.seed, **_options(arguments)}
    completions.complete(sampler, images, known, path, **options)
    print(f"{completions.EACH} completions of each of {len(images)} images in {path}")
    return 0


def _images_to_complete(arguments: argparse.Namespace, model: Any) -> "tuple[Tensor, Tensor | None]":
    """Levels (n, C, H, W) and, for a class-conditional model, classes (n,)."""
    if (arguments.data is None) == (arguments.images is None):
        raise ValueError("--data or --images is needed, and not both")
    if arguments.data is not None:
        if arguments.label is not None:
            raise ValueError("--label is for --images: the images of --data have their own classes")
        count = arguments.n or 8
        dataset = load_run_data(arguments, model)
        if count > len(dataset.test):
            raise ValueError(f"--n {count}: {dataset.name} has {len(dataset.test)} test images")
        split = dataset.test[:count]
        return split.images, None if model.n_classes is None else split.labels
    images = read_images(arguments.images, model, arguments.resize, arguments.crop)
    if arguments.n is not None:
        if arguments.n > len(images):
            raise ValueError(f"--n {arguments.n}: {arguments.images} has {len(images)} images")
        images = images[: arguments.n]
    if model.n_classes is not None and arguments.label is None:
        raise ValueError(f"--label is needed: the model is conditional on a class in 0..{model.n_classes - 1}")
    return images, None if arguments.label is None else _label(arguments, model, len(images))
