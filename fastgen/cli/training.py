"""fastgen train."""

import argparse
import ast
import inspect
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgen.cli.common import DATA_HELP, add_device, device_of, natural, number, positive_int

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
SMALL_IMAGE = 16 * 16  # pixels; up to here models are small by default, which a CPU can train
SMALL: dict[str, dict[str, Any]] = {
    "gated_pixelcnn": {"channels": 48, "layers": 6, "dropout": 0.3},
    "pixelcnn": {"channels": 32, "layers": 6},
    "pixelcnnpp": {"channels": 32, "layers": 2, "n_mix": 5},
    "pixelrnn": {"hidden_channels": 24, "layers": 4},
    "vae": {"latent_dim": 8, "channels": 16, "hidden": 128},
    "autoencoder": {"latent_dim": 8, "channels": 16, "hidden": 128},
}
LARGE: dict[str, dict[str, Any]] = {"vae": {"latent_dim": 64}, "autoencoder": {"latent_dim": 64}}
FROM_DATA = ("shape", "levels", "n_classes")


def add(commands: Any) -> None:
    parser = commands.add_parser("train", help="train a model", description="Train a model; the run is a folder.")
    parser.add_argument("--model", choices=sorted(MODELS), help="needed for a new run")
    parser.add_argument("--data", help=f"{DATA_HELP}; needed for a new run")
    parser.add_needed("--out", metavar="RUN", help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="continue the run in RUN, as if it had never stopped")
    parser.add_argument("--conditional", action="store_true", help="condition the model on the images' classes")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="an argument of the model, e.g. channels=64"
    )
    settings = parser.add_argument_group("settings (a resumed run keeps its own, all but --steps)")
    settings.add_argument("--steps", type=positive_int, help="optimizer steps in all (default 2000)")
    settings.add_argument("--batch-size", type=positive_int, help="images a step (default 64)")
    settings.add_argument("--lr", type=number, help="peak learning rate (default 0.001)")
    settings.add_argument("--warmup", type=natural, help="steps until the peak (default 100)")
    settings.add_argument(
        "--decay-steps", type=positive_int, help="steps of the cosine (default: the steps, at least 2000)"
    )
    settings.add_argument("--weight-decay", type=number, help="of AdamW (default 0.01)")
    settings.add_argument("--clip", type=number, help="largest norm of the gradient (default 1)")
    settings.add_argument("--ema", type=number, help="decay of the averaged weights (default 0.995)")
    settings.add_argument("--validate-every", type=positive_int, help="steps between validations (default 100)")
    settings.add_argument("--patience", type=natural, help="validations without improvement; 0: any (default 10)")
    settings.add_argument("--seed", type=natural, help="of weights, order and noise (default 0)")
    add_device(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    import torch

    from fastgen import checkpoint, data
    from fastgen.train import STATE, Settings, read_state, train

    device = device_of(arguments)
    given = {name: getattr(arguments, name) for name in Settings.__dataclass_fields__ if name != "max_seconds"}
    given = {name: value for name, value in given.items() if value is not None}
    if arguments.resume:
        state = read_state(arguments.out)
        if arguments.set or arguments.conditional:
            raise ValueError("--resume keeps the model of the run: leave out --set and --conditional")
        dataset = data.load(arguments.data or state["data"])
        settings = replace(Settings(**state["settings"]), **given)
        model = checkpoint.build(state["model"], Path(arguments.out) / STATE)
        if arguments.model and MODELS[arguments.model] != type(model).__name__:
            raise ValueError(f"--model {arguments.model}: the run in {arguments.out} is of a {type(model).__name__}")
    else:
        if (Path(arguments.out) / STATE).exists():
            raise ValueError(f"{arguments.out}: holds a run already; give --resume to continue it, or another --out")
        for name in ("model", "data"):
            if getattr(arguments, name) is None:
                raise ValueError(f"--{name} is needed for a new run")
        settings = Settings(**given)
        dataset = data.load(arguments.data)
        torch.manual_seed(settings.seed)
        model = new_model(arguments.model, dataset, arguments.conditional, arguments.set)
    if dataset.attribution:
        print(dataset.attribution)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    size = "x".join(map(str, dataset.shape))
    print(
        f"{type(model).__name__} with {parameters:,} parameters on {dataset.name}: {len(dataset.train)} images of "
        f"{size} with {dataset.levels} levels, on {device}",
        flush=True,
    )
    result = train(model, dataset, arguments.out, settings, resume=arguments.resume, device=device)
    ending = f"{result.reason} at step {result.steps}; validation {result.metric} {result.best:.4f}"
    print(f"{ending}; saved in {arguments.out}")
    if result.reason == "interrupted":
        print(f"continue with: fastgen train --resume --out {arguments.out}")
        return 130
    return 0


def new_model(name: str, dataset: "Dataset", conditional: bool = False, options: Sequence[str] = ()) -> Any:
    """A model for the images of a data set, with fresh weights.

    Args:
        name: of MODELS.
        options: texts NAME=VALUE, arguments of the constructor.

    Raises:
        ValueError: an option is misspelt or the constructor refuses it; the data has no classes.
    """
    from fastgen import models

    kind = getattr(models, MODELS[name])
    height, width = dataset.shape[1:]
    sizes = SMALL if height * width <= SMALL_IMAGE else LARGE
    arguments: dict[str, Any] = {"shape": dataset.shape, **sizes.get(name, {})}
    accepted = [key for key in inspect.signature(kind).parameters if key not in FROM_DATA]
    if "levels" in inspect.signature(kind).parameters:
        arguments["levels"] = dataset.levels
    if name == "vae":
        arguments["likelihood"] = "bernoulli" if dataset.levels == 2 else "logistic_mixture"
    if conditional:
        if dataset.n_classes is None:
            raise ValueError(f"--conditional: the images of {dataset.name} have no classes")
        arguments["n_classes"] = dataset.n_classes
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or key not in accepted:
            raise ValueError(f"--set {option}: expected NAME=VALUE with NAME one of {', '.join(accepted)}")
        try:
            arguments[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            arguments[key] = value
    try:
        return kind(**arguments)
    except TypeError as error:
        raise ValueError(f"--set {' '.join(options)}: {error}") from error
