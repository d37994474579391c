"""A model in a folder: `model.safetensors` and `config.json`. Nothing is ever unpickled.

The weights carry the configuration and a checksum in their own metadata, so that files of two different models, a
flipped bit and a file from elsewhere are all noticed; `config.json` says the same to a reader.
"""

import hashlib
import json
import math
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgen._version import __version__
from fastgen.files import make_folder, write_atomically
from fastgen.models.rebuildable import Rebuildable
from fastgen.models.softmax import channels_of

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
FORMAT = "fastgen model 1"


def unwrap(model: Any) -> Any:
    """The model inside wrappers of DataParallel, DistributedDataParallel and torch.compile, in any nest."""
    while isinstance(model, nn.Module):
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules:  # torch.compile's class takes long to import
            model = model._orig_mod
        else:
            break
    return model


def save(model: nn.Module, folder: str | os.PathLike) -> None:
    """Writes the weights of a model to FOLDER/model.safetensors and how to build it to FOLDER/config.json.

    The folder is made where it is missing. Both files are replaced whole: where the disk is full, or writing fails in
    any other way, the old ones stay.

    Args:
        model: a model of `fastgen.models`, also inside DataParallel, DDP or torch.compile. A subclass of one has
            `save_pretrained` and `from_pretrained`.

    Raises:
        TypeError: the model is none of `fastgen.models`, or was built with an argument that JSON cannot say.
        ValueError: there is a file of the folder's name.
        OSError: the folder cannot be written to.
    """
    model = unwrap(model)
    if model_classes().get(type(model).__name__) is not type(model):
        known = ", ".join(model_classes())
        raise TypeError(f"model must be one of fastgen.models ({known}), got {type(model).__qualname__}")
    write(folder, configuration(model), model.state_dict())


def write(folder: str | os.PathLike, config: dict[str, Any], weights: Mapping[str, Any]) -> None:
    """`save` for any module, of its `configuration` and its weights; raises as `encode`, and OSError."""
    folder = Path(folder)
    encoded = encode(config, weights)
    make_folder(folder)
    write_atomically({folder / name: content for name, content in encoded.items()})


def encode(config: dict[str, Any], weights: Mapping[str, Any]) -> dict[str, bytes]:
    """The two files.

    Raises:
        TypeError: a weight is no tensor, or of a type that safetensors does not know; names it.
    """
    import safetensors.torch

    tensors: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"the state of the model holds {name}, a {type(tensor).__name__}: only tensors are saved")
        tensors[name] = tensor.detach().cpu().contiguous()
    places = [tensor.data_ptr() for tensor in tensors.values()]
    if len(set(places)) < len(places):  # weights that are tied, which safetensors refuses
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    seal = json.dumps({**_identity(config), "sha256": _checksum(tensors)}, sort_keys=True)
    try:
        content = safetensors.torch.save(tensors, {"fastgen": seal})
    except (KeyError, safetensors.SafetensorError) as error:
        raise TypeError(f"the weights of the model cannot be saved ({error})") from error
    return {WEIGHTS: content, CONFIG: (json.dumps(config, indent=2) + "\n").encode()}


def load(folder: str | os.PathLike, kind: type[Rebuildable] | None = None) -> Any:
    """The model that `fastgen.save` wrote into a folder, on the CPU, in evaluation mode.

    Args:
        kind: the class, where it is a subclass of one of `fastgen.models`; None is the one of `fastgen.models` that the
            folder names.

    Raises:
        ValueError: the folder is missing or does not hold such a model, whole and unchanged; names the file and what
            is wrong with it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder, expected one with {WEIGHTS} and {CONFIG} written by fastgen.save")
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: has no {name}, so it is not a folder written by fastgen.save")
    config = _read_config(folder / CONFIG)
    if kind is None and config["class"] not in model_classes():
        raise ValueError(
            f"{folder / CONFIG}: unknown class {config['class']!r}, expected one of {', '.join(model_classes())}; a "
            "model of one's own is read by its from_pretrained, or by fastgen.weights.load_weights"
        )
    if kind is not None and config["class"] != kind.__name__:
        raise ValueError(f"{folder / CONFIG}: is of the class {config['class']!r}, not of {kind.__name__!r}")
    tensors = _read_weights(folder / WEIGHTS, config)
    model = build(config, folder / CONFIG, kind)
    check_fit(model, tensors, folder / WEIGHTS)
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def pretrained(name: str | os.PathLike) -> Path:
    """The folder of that name, or else of the Hugging Face hub's repository of that name, downloaded by
    `huggingface_hub`.

    Raises:
        ValueError: there is neither.
    """
    if Path(name).exists() or len(Path(name).parts) != 2 or Path(name).is_absolute():
        return Path(name)
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ValueError(f"{name}: no such folder; from the hub it needs: pip install huggingface_hub") from error
    try:
        return Path(snapshot_download(str(name), allow_patterns=[WEIGHTS, CONFIG]))
    except Exception as error:  # the network, and a kind of its own for each answer of the hub
        raise ValueError(f"{name}: no such folder, and not to be had from the hub ({type(error).__name__})") from error


def configuration(model: nn.Module) -> dict[str, Any]:
    """The content of `config.json` for a model. A module that is none of fastgen's is described by its class alone.

    Raises:
        TypeError: it was built with an argument that JSON cannot say.
    """
    name = type(model).__name__
    arguments = model.constructor_arguments() if isinstance(model, Rebuildable) else {}
    for key, value in arguments.items():
        if not _is_plain(value):
            raise TypeError(f"{name} was built with {key}={value!r}, which cannot be written as JSON")
    versions = {"fastgen": __version__, "torch": str(torch.__version__), "python": platform.python_version()}
    plain = json.loads(json.dumps(arguments))  # tuples become lists, as they will be when read
    return {"format": FORMAT, "class": name, "arguments": plain, "versions": versions}


def model_classes() -> dict[str, type[Rebuildable]]:
    """The public model classes by name."""
    from fastgen import models

    public = {name: getattr(models, name) for name in models.__all__}
    return {name: kind for name, kind in public.items() if isinstance(kind, type) and issubclass(kind, Rebuildable)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, (bool, int, str))


def _identity(config: dict[str, Any]) -> dict[str, Any]:
    """The entries that must be equal in both files; the versions are for people."""
    return {key: config[key] for key in ("format", "class", "arguments")}


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not JSON ({error})") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(f"{path}: is not a configuration written by fastgen.save (its format is not {FORMAT!r})")
    if not isinstance(config.get("class"), str) or not isinstance(config.get("arguments"), dict):
        raise ValueError(f"{path}: names no class with its arguments")
    return config


def _read_weights(path: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    import safetensors

    try:
        with safetensors.safe_open(path, "pt") as file:
            seal = json.loads((file.metadata() or {}).get("fastgen", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # safetensors has a kind of its own for each way to be damaged
        raise ValueError(f"{path}: is not a safetensors file, or damaged ({error})") from error
    if not isinstance(seal, dict) or "sha256" not in seal:
        raise ValueError(f"{path}: was not written by fastgen.save")
    checksum = seal.pop("sha256")
    if seal != _identity(config):
        raise ValueError(f"{path}: belongs to another model than {CONFIG} beside it: {json.dumps(seal)}")
    if checksum != _checksum(tensors):
        raise ValueError(f"{path}: is damaged: its checksum does not match")
    return tensors


def build(config: dict[str, Any], path: Path, kind: type[Rebuildable] | None = None) -> Rebuildable:
    """The model of a configuration read from a file, with fresh weights; torch's random state stays as it is.

    Args:
        kind: its class; None is the one of `fastgen.models` that the configuration names.

    Raises:
        ValueError: its class or arguments are not those of a model; names the file.
    """
    try:
        kind = kind or model_classes()[config["class"]]
        arguments: dict[str, Any] = {
            key: tuple(v) if isinstance(v, list) else v for key, v in config["arguments"].items()
        }
        if config["class"] in ("PixelCNN", "GatedPixelCNN") and arguments["shape"][0] > 1:
            # Files say the channels that were built if these are others than was asked for. Older files do not: theirs
            # were rounded up to a multiple of the colours.
            arguments["channels"] = channels_of(arguments.get("channels", 128), arguments["shape"][0])
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            return kind(**arguments)
    except Exception as error:  # whatever a constructor says to foreign arguments
        raise ValueError(f"{path}: no model can be built from its class and arguments ({error})") from error


def check_fit(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raises ValueError, with the path, where the names, shapes or kinds of tensors are not those of a model."""
    expected = model.state_dict()
    missing, unknown = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or unknown:
        raise ValueError(f"{path}: does not fit {type(model).__name__}: missing {missing[:3]}, unknown {unknown[:3]}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            got, wanted = tuple(tensor.shape), tuple(expected[name].shape)
            raise ValueError(f"{path}: {name} has the shape {got}, {type(model).__name__} needs {wanted}")
        if tensor.is_floating_point() != expected[name].is_floating_point():
            raise ValueError(f"{path}: {name} has the type {tensor.dtype}, expected {expected[name].dtype}")
