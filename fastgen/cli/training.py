"""fastgen train."""

import argparse
import ast
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgen.cli import config
from fastgen.cli.common import add_data, add_device, device_of, load_data, load_run_data, natural, number, positive_int

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
MIXTURE_LEVELS = 256  # of PixelCNN++
RESOLVED = "train.toml"  # in the run's folder


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="train a model",
        description="Train a model; the run is a folder. Under torchrun, processes share each step: "
        "torchrun --nproc-per-node N -m fastgen train ...",
    )
    parser.add_argument("--model", choices=sorted(MODELS), help="needed for a new run, but with --init-from RUN")
    add_data(parser, needed=False, more="; needed for a new run")
    parser.add_needed("--out", metavar="RUN", help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="continue the run in RUN, as if it had never stopped")
    parser.add_argument(
        "--init-from",
        metavar="WEIGHTS",
        help="start from weights: another RUN, or a .pt or .safetensors file of a model of the same shapes",
    )
    parser.add_argument(
        config.FLAG,
        metavar="FILE",
        help=f"options in a TOML file (name = value, [set] for --set), such as the {RESOLVED} of a run",
    )
    parser.add_argument(
        "--conditional", action=argparse.BooleanOptionalAction, help="condition the model on the images' classes"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an argument of the model, e.g. channels=64, or a setting",
    )
    settings = parser.add_argument_group(
        "settings (a resumed run keeps its own; --steps, --patience, --lr and how it is computed may be new)"
    )
    settings.add_argument("--steps", type=positive_int, help="optimizer steps in all (default 2000)")
    settings.add_argument("--batch-size", type=positive_int, help="images a step, of all processes (default 64)")
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
    settings.add_argument("--max-seconds", type=number, help="time after which training stops")
    settings.add_argument("--seed", type=natural, help="of weights, order and noise (default 0)")
    settings.add_argument("--beta", type=number, help="weight of the KL of a VAE (default 1)")
    settings.add_argument("--beta-warmup", type=natural, help="steps over which it rises from 0 (default 0)")
    settings.add_argument("--free-bits", type=number, help="least KL of a latent dimension, nats (default 0)")
    settings.add_argument("--samples", type=natural, help="images drawn at each validation, RUN/samples (default 0)")
    computed = ("auto", "float32", "bfloat16")
    settings.add_argument("--precision", choices=computed, help="auto: half on GPUs, float32 elsewhere (default)")
    settings.add_argument("--parallel", choices=("ddp", "fsdp"), help="of several processes (default ddp)")
    settings.add_argument(
        "--cuda-graph", action=argparse.BooleanOptionalAction, help="replay steps as a CUDA graph (default: no)"
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
            raise ValueError("--resume keeps the model of the run: leave out --set, --conditional and --init-from")
        settings = _settings({**state["settings"], **given})
        model = checkpoint.build(state["model"], Path(arguments.out) / STATE)
        if arguments.model and MODELS[arguments.model] != type(model).__name__:
            raise ValueError(f"--model {arguments.model}: the run in {arguments.out} is of a {type(model).__name__}")
        loading = {name: value for name, value in state["data"]["loading"].items() if name != "levels"}
        dataset = load_run_data(arguments, model, data=state["data"]["name"], **loading)
    else:
        if (Path(arguments.out) / STATE).exists():
            raise ValueError(f"{arguments.out}: holds a run already; give --resume to continue it, or another --out")
        if arguments.data is None:
            raise ValueError("--data is needed for a new run")
        settings = _settings(given)
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
        callbacks=[Resolved(config.written(_resolved(model, dataset, settings)))],
    )
    best = f"; validation {result.metric} {result.best:.4f}" if result.best < float("inf") else ""
    print(f"{result.reason} at step {result.steps}{best}; saved in {arguments.out}")
    if result.reason == "interrupted":
        print(f"continue with: fastgen train --resume --out {arguments.out}")
        return 130
    if result.reason == "no improvement" and result.steps < settings.steps:
        print(
            f"no better validation in {settings.patience}; to go on, --resume with another --patience (0: any), --lr "
            "or --steps"
        )
    return 0


class Resolved:
    """A callback that writes the options of a run to its folder, after the first step."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def on_step(self, run: Any) -> None:
        from fastgen import distributed, files

        if self.content and distributed.rank() == 0:
            files.write_atomically({run.folder / RESOLVED: self.content})
            self.content = b""


def _settings(given: Mapping[str, Any]) -> Any:
    from fastgen.train import Settings

    try:
        return Settings(**given)
    except TypeError as error:  # a comparison with what is no number, from --set
        raise ValueError(f"--set: {error}") from error


def _new_run(arguments: argparse.Namespace, options: dict[str, Any], seed: int) -> tuple[Any, "Dataset"]:
    import torch

    from fastgen import checkpoint

    if arguments.model is None:
        if arguments.init_from is None or not Path(arguments.init_from).is_dir():
            raise ValueError("--model is needed for a new run (but with --init-from RUN, whose model it takes)")
        if options or arguments.conditional is not None:
            raise ValueError("--set and --conditional need --model: without it the model is that of --init-from RUN")
        model = checkpoint.load(arguments.init_from)
        return model, load_run_data(arguments, model)
    dataset = load_data(arguments)
    torch.manual_seed(seed)
    return new_model(arguments.model, dataset, bool(arguments.conditional), options), dataset


def _resolved(model: Any, dataset: "Dataset", settings: Any) -> dict[str, Any]:
    """All options with which the run could be begun anew."""
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
    """NAME=VALUE texts as a dict. A VALUE that is a literal of Python becomes its value, any other stays text."""
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set {text}: expected NAME=VALUE")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def new_model(
    name: str, dataset: "Dataset", conditional: bool = False, options: Mapping[str, Any] | None = None
) -> Any:
    """A model for the images of a data set, with fresh weights.

    Args:
        name: of MODELS.
        options: arguments of the constructor.

    Raises:
        ValueError: an option is misspelt or the constructor refuses it; the data has no classes, or is not for it.
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
        raise ValueError(
            f"--model {name} is for 256 levels of 1 or 3 channels, the images of {dataset.name} have {dataset.levels} "
            f"levels of {dataset.shape[0]}: take --model gated_pixelcnn, or another of {others}"
            + (", or --levels 256" if not dataset.name.isidentifier() and dataset.shape[0] in (1, 3) else "")
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
    try:
        return kind(**arguments)
    except TypeError as error:
        said = " ".join(f"{key}={value!r}" for key, value in (options or {}).items())
        raise ValueError(f"--set {said}: {error}") from error
