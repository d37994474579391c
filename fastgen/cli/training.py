"""fastgen train."""

import argparse
import ast
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgen.cli import config
from fastgen.cli.common import (
    add_data,
    add_device,
    device_of,
    finite_number,
    load_data,
    load_run_data,
    non_negative_int,
    positive_int,
)

if TYPE_CHECKING:
    from fastgen.data import Dataset

MODELS = {
    "gated_pixelcnn": "GatedPixelCNN",
    "pixelcnn": "PixelCNN",
    "pixelcnnpp": "PixelCNNPP",
    "pixelrnn": "PixelRNN",
    "vae": "VAE",
    "autoencoder": "Autoencoder",
}
SMALL_IMAGE = 16 * 16  # pixels; for images up to this size the default models are small enough to train on a CPU
SMALL: dict[str, dict[str, Any]] = {
    "gated_pixelcnn": {"channels": 48, "layers": 6, "dropout": 0.3},
    "pixelcnn": {"channels": 32, "layers": 6},
    "pixelcnnpp": {"channels": 32, "layers": 2, "n_mix": 5},
    "pixelrnn": {"hidden_channels": 24, "layers": 4},
    "vae": {"latent_dim": 8, "channels": 16, "hidden": 128},
    "autoencoder": {"latent_dim": 8, "channels": 16, "hidden": 128},
}
LARGE: dict[str, dict[str, Any]] = {"vae": {"latent_dim": 64}, "autoencoder": {"latent_dim": 64}}
FROM_DATA = ("shape", "levels", "n_classes")  # arguments of a model that the data set determines
MIXTURE_LEVELS = 256  # the number of levels of PixelCNN++
RESOLVED = "train.toml"  # the file of all options in the run's folder


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="train a model",
        description="Trains a model and writes the run to a folder. Under torchrun the processes share each step: "
        "torchrun --nproc-per-node N -m fastgen train ...",
    )
    parser.add_argument("--model", choices=sorted(MODELS), help="needed for a new run, except with --init-from RUN")
    add_data(parser, required=False, more="; needed for a new run")
    parser.add_required("--out", metavar="RUN", help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="continue the run in RUN exactly where it stopped")
    parser.add_argument(
        "--init-from",
        metavar="WEIGHTS",
        help="start from these weights: the folder of another run, or a .pt or .safetensors file with tensors of the "
        "same shapes",
    )
    parser.add_argument(
        config.FLAG,
        metavar="FILE",
        help=f"read options from a TOML file (name = value, a table [set] for --set), such as the {RESOLVED} of a run",
    )
    parser.add_argument(
        "--conditional", action=argparse.BooleanOptionalAction, help="condition the model on the classes of the images"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="set an argument of the model, such as channels=64, or a setting; may be repeated",
    )
    settings = parser.add_argument_group(
        "settings",
        "A resumed run keeps its settings. Only --steps, --patience, --lr, --max-seconds, --samples, --parallel and "
        "--cuda-graph may change.",
    )

    def add_setting(name: str, kind: Any, description: str) -> None:
        settings.add_argument(name, type=kind, help=description)

    add_setting("--steps", positive_int, "optimizer steps in all (default 2000)")
    add_setting("--batch-size", positive_int, "images per step, over all processes (default 64)")
    add_setting("--lr", finite_number, "peak learning rate (default 0.001)")
    add_setting("--warmup", non_negative_int, "steps until the peak learning rate (default 100)")
    add_setting("--decay-steps", positive_int, "steps of the cosine schedule (default: --steps, but at least 2000)")
    add_setting("--weight-decay", finite_number, "weight decay of AdamW (default 0.01)")
    add_setting("--clip", finite_number, "largest norm of the gradient (default 1)")
    add_setting("--ema", finite_number, "decay of the averaged weights (default 0.995)")
    add_setting("--validate-every", positive_int, "steps between validations (default 100)")
    add_setting(
        "--patience", non_negative_int, "stop after this many validations without improvement (default 10; 0: never)"
    )
    add_setting("--max-seconds", finite_number, "stop after this many seconds")
    add_setting("--seed", non_negative_int, "seed of weights, order of images and noise (default 0)")
    add_setting("--beta", finite_number, "weight of the KL in the loss of a VAE (default 1)")
    add_setting("--beta-warmup", non_negative_int, "steps over which this weight rises from 0 (default 0)")
    add_setting("--free-bits", finite_number, "minimum of the KL of each latent dimension of a VAE, nats (default 0)")
    add_setting("--samples", non_negative_int, "images drawn into RUN/samples at each validation (default 0)")
    settings.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        help="auto (default): bfloat16 or float16 autocast on CUDA GPUs, float32 elsewhere",
    )
    settings.add_argument(
        "--parallel", choices=("ddp", "fsdp"), help="how processes under torchrun share the model (default ddp)"
    )
    settings.add_argument(
        "--cuda-graph", action=argparse.BooleanOptionalAction, help="replay training steps as a CUDA graph (default no)"
    )
    add_device(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from fastgen import checkpoint, distributed
    from fastgen.train import STATE, Settings, read_state, train

    device = device_of(arguments)
    given = {name: getattr(arguments, name) for name in Settings.__dataclass_fields__}
    given = {name: value for name, value in given.items() if value is not None}
    options = _assignments(arguments.set)
    given |= {name: options.pop(name) for name in list(options) if name in Settings.__dataclass_fields__}
    if arguments.resume:
        state = read_state(arguments.out)
        if options or arguments.conditional is not None or arguments.init_from:
            raise ValueError("--resume keeps the model of the run: leave out --init-from, --conditional and --set")
        settings = Settings(**{**state["settings"], **given})
        model = checkpoint.build(state["model"], Path(arguments.out) / STATE)
        if arguments.model and MODELS[arguments.model] != type(model).__name__:
            raise ValueError(f"--model {arguments.model}: the run in {arguments.out} trains a {type(model).__name__}")
        loading = {name: value for name, value in state["data"]["loading"].items() if name != "levels"}
        dataset = load_run_data(arguments, model, data=state["data"]["name"], **loading)
    else:
        if (Path(arguments.out) / STATE).exists():
            raise ValueError(f"{arguments.out}: holds a run already; give --resume to continue it, or another --out")
        if arguments.data is None:
            raise ValueError("--data is needed for a new run")
        settings = Settings(**given)
        model, dataset = _new_run(arguments, options, settings.seed)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    size = "x".join(map(str, dataset.shape))
    print(
        f"{type(model).__name__} with {parameters:,} parameters on {dataset.name}: {len(dataset.train)} images of "
        f"{size} with {dataset.levels} levels, on {device}"
        + (f", {distributed.world_size()} processes" if distributed.active() else ""),
        flush=True,
    )
    result = train(
        model,
        dataset,
        arguments.out,
        settings,
        resume=arguments.resume,
        init_from=arguments.init_from,
        device=device,
        callbacks=[Resolved(config.to_toml(_resolved(model, dataset, settings)))],
    )
    best = f"; validation {result.metric} {result.best:.4f}" if result.best < float("inf") else ""
    print(f"{result.reason} at step {result.steps}{best}; saved in {arguments.out}")
    if result.reason == "interrupted":
        print(f"continue with: fastgen train --resume --out {arguments.out}")
        return 130
    if result.reason == "no improvement" and result.steps < settings.steps:
        print(
            f"no improvement in {settings.patience} validations; to go on all the same: --resume with another "
            "--patience (0: never stop), --lr or --steps"
        )
    return 0


class Resolved:
    """A callback that writes the file of all options to the folder of the run, after the first step."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def on_step(self, run: Any) -> None:
        from fastgen import distributed, files

        if self.content and distributed.rank() == 0:
            files.write_atomically({run.folder / RESOLVED: self.content})
            self.content = b""


def _new_run(arguments: argparse.Namespace, options: dict[str, Any], seed: int) -> tuple[Any, "Dataset"]:
    import torch

    from fastgen import checkpoint

    if arguments.model is None:
        if arguments.init_from is None or not Path(arguments.init_from).is_dir():
            raise ValueError("--model is needed for a new run (except with --init-from RUN, which names the model)")
        if options or arguments.conditional is not None:
            raise ValueError("--set and --conditional need --model: without it the model is that of --init-from RUN")
        model = checkpoint.load(arguments.init_from)
        return model, load_run_data(arguments, model)
    dataset = load_data(arguments)
    torch.manual_seed(seed)
    return new_model(arguments.model, dataset, bool(arguments.conditional), options), dataset


def _resolved(model: Any, dataset: "Dataset", settings: Any) -> dict[str, Any]:
    """All options of a run, with which `fastgen train` would repeat it."""
    names = {kind: name for name, kind in MODELS.items()}
    arguments = model.constructor_arguments()
    return {
        "model": names[type(model).__name__],
        "data": dataset.name,
        **dataset.loading,
        "conditional": model.n_classes is not None,
        **asdict(settings),
        "set": {key: value for key, value in arguments.items() if key not in FROM_DATA},
    }


def _assignments(texts: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE texts as a dict. A VALUE that is a Python literal becomes its value, any other stays a string."""
    assignments: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set {text}: expected NAME=VALUE")
        try:
            assignments[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            assignments[name] = value
    return assignments


def new_model(
    name: str, dataset: "Dataset", conditional: bool = False, options: Mapping[str, Any] | None = None
) -> Any:
    """A model for the images of a data set, with fresh weights.

    Args:
        name: a key of MODELS.
        dataset: the data set, which determines shape, levels and n_classes.
        conditional: whether the model is class-conditional.
        options: further arguments of the constructor.

    Raises:
        ValueError: an option is misspelt, or the constructor refuses it; the data set has no classes, or images that
            the model cannot describe.
    """
    from fastgen import models

    kind = getattr(models, MODELS[name])
    height, width = dataset.shape[1:]
    sizes = SMALL if height * width <= SMALL_IMAGE else LARGE
    arguments: dict[str, Any] = {"shape": dataset.shape, **sizes.get(name, {})}
    accepted = [key for key in inspect.signature(kind).parameters if key not in FROM_DATA]
    if "levels" in inspect.signature(kind).parameters:
        arguments["levels"] = dataset.levels
    elif dataset.levels != MIXTURE_LEVELS or dataset.shape[0] not in (1, 3):
        others = ", ".join(other for other in sorted(MODELS) if other != name)
        own_images = not dataset.name.isidentifier()  # npz:, folder: and hf:, of which --levels is an option
        raise ValueError(
            f"--model {name} is for images with 256 levels and 1 or 3 channels, those of {dataset.name} have "
            f"{dataset.levels} levels and {dataset.shape[0]} channel(s): choose --model gated_pixelcnn, or another of "
            f"{others}" + (", or --levels 256" if own_images and dataset.shape[0] in (1, 3) else "")
        )
    if name == "vae":
        mixture = "logistic_mixture" if dataset.shape[0] in (1, 3) else "categorical"
        arguments["likelihood"] = "bernoulli" if dataset.levels == 2 else mixture
    if conditional:
        if dataset.n_classes is None:
            raise ValueError(f"--conditional: the images of {dataset.name} have no classes")
        arguments["n_classes"] = dataset.n_classes
    for key, value in (options or {}).items():
        if key not in accepted:
            raise ValueError(
                f"--set {key}={value}: expected NAME=VALUE with NAME one of {', '.join(accepted)}, or a setting"
            )
        arguments[key] = value
    return kind(**arguments)
