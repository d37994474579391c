"""A model in a folder: `model.safetensors` and `config.json`. Nothing is ever unpickled.

The metadata of the weights repeats the configuration and adds a checksum. `load` thereby notices files of two different
models, a flipped bit and a file that fastgen did not write.
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
    """The model without its wrappers (DataParallel, DistributedDataParallel, torch.compile), however nested."""
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

    Creates the folder where it is missing. Both files are replaced whole: if the disk is full, or writing fails for
    another reason, the old files stay.

    Args:
        model: a model of `fastgen.models`, also inside DataParallel, DDP or torch.compile. Your own subclass of such a
            model is saved by its `save_pretrained` and loaded by its `from_pretrained`.

    Raises:
        TypeError: the model's class is not in `fastgen.models`, or a constructor argument cannot be written as JSON.
        ValueError: `folder` is a file.
        OSError: the folder cannot be written to.
    """
    model = unwrap(model)
    if model_classes().get(type(model).__name__) is not type(model):
        known = ", ".join(model_classes())
        raise TypeError(f"model must be one of fastgen.models ({known}), got {type(model).__qualname__}")
    write(folder, configuration(model), model.state_dict())


def write(folder: str | os.PathLike, config: dict[str, Any], weights: Mapping[str, Any]) -> None:
    """Writes the two files of `save` for any module, given its `configuration` and its state dict.

    Raises:
        TypeError: as `encode`.
        ValueError, OSError: as `save`.
    """
    folder = Path(folder)
    encoded = encode(config, weights)
    make_folder(folder)
    write_atomically({folder / name: content for name, content in encoded.items()})


def encode(config: dict[str, Any], weights: Mapping[str, Any]) -> dict[str, bytes]:
    """The contents of `model.safetensors` and `config.json`, by file name.

    Raises:
        TypeError: an entry of the state dict is not a tensor, or safetensors does not know its dtype.
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
    """Loads the model that `fastgen.save` wrote into a folder, on the CPU, in evaluation mode.

    Args:
        folder: a folder written by `fastgen.save` or by a training run.
        kind: the class to build, for your own subclass of a model; None takes the class of `fastgen.models` that
            `config.json` names.

    Raises:
        ValueError: the folder is missing, or does not hold such a model, complete and unchanged. The message names the
            file and what is wrong with it.
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
            f"{folder / CONFIG}: unknown class {config['class']!r}, expected one of {', '.join(model_classes())}; load "
            "your own subclass with its from_pretrained, or the weights alone with fastgen.weights.load_weights"
        )
    if kind is not None and config["class"] != kind.__name__:
        raise ValueError(f"{folder / CONFIG}: holds a {config['class']!r}, expected a {kind.__name__!r}")
    tensors = _read_weights(folder / WEIGHTS, config)
    model = build(config, folder / CONFIG, kind)
    check_fit(model, tensors, folder / WEIGHTS)
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def pretrained(name: str | os.PathLike) -> Path:
    """A local folder. If `name` is USER/NAME and no such path exists, downloads that repository of the Hugging Face
    hub with `huggingface_hub` and returns the folder of its files.

    Raises:
        ValueError: the repository cannot be downloaded, or huggingface_hub is not installed.
    """
    if Path(name).exists() or len(Path(name).parts) != 2 or Path(name).is_absolute():
        return Path(name)
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ValueError(f"{name}: no such folder; from the hub it needs: pip install huggingface_hub") from error
    try:
        return Path(snapshot_download(str(name), allow_patterns=[WEIGHTS, CONFIG]))
    except Exception as error:  # network errors, and the hub's own exception classes
        raise ValueError(f"{name}: no such folder, and not to be had from the hub ({type(error).__name__})") from error


def configuration(model: nn.Module) -> dict[str, Any]:
    """The content of `config.json` for a model. For a module that is not one of fastgen's models, this is its class
    name, without arguments.

    Raises:
        TypeError: a constructor argument cannot be written as JSON.
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
    """The entries that must be equal in both files. `versions` is information for people and may differ."""
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
    except Exception as error:  # safetensors raises many exception classes for damaged files
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
    """Builds the model that a configuration describes, with fresh weights. torch's random state does not change.

    Args:
        config: the content of `config.json`.
        path: the file that the configuration came from, for error messages.
        kind: the class to build; None takes the class of `fastgen.models` that the configuration names.

    Raises:
        ValueError: the class is unknown, or its constructor refuses the arguments. The message names the file.
    """
    try:
        kind = kind or model_classes()[config["class"]]
        arguments: dict[str, Any] = {
            key: tuple(v) if isinstance(v, list) else v for key, v in config["arguments"].items()
        }
        if config["class"] in ("PixelCNN", "GatedPixelCNN") and arguments["shape"][0] > 1:
            # Today's files hold the number of channels that was built. Older ones hold the number that was asked for,
            # which was then rounded up to a multiple of the colours.
            arguments["channels"] = channels_of(arguments.get("channels", 128), arguments["shape"][0])
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            return kind(**arguments)
    except Exception as error:  # a constructor may raise anything for foreign arguments
        raise ValueError(f"{path}: no model can be built from its class and arguments ({error})") from error


def check_fit(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raises ValueError, naming the file, where tensors differ from the model's state dict in their names, their shapes
    or in being floating-point."""
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
