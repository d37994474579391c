"""Loads weights from a run, or from a file that other code wrote, into a model. Only tensors are unpickled."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgen import checkpoint

WRAPPERS = ("module.", "_orig_mod.", "model.")  # prefixes of names by DataParallel, torch.compile and Lightning
STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model", "weights")  # where training scripts' .pt hold the weights


def load_weights(model: nn.Module, source: str | os.PathLike) -> str:
    """Loads weights into a model.

    Tensors are matched by name, without the prefixes of wrappers such as "module."; masks that the model computes
    itself are ignored. If no name matches, but the tensors have the shapes of the model's in the same order, they are
    matched in this order.

    Args:
        model: the module whose parameters and buffers are overwritten.
        source: a folder with model.safetensors (a run, or written by `fastgen.save`), a .safetensors file, or a .pt or
            .pth file of a state dict, also inside a dict (as "state_dict" or "model"), read with weights_only=True.

    Returns:
        A note for the user if tensors were matched by order, otherwise "".

    Raises:
        ValueError: the file is missing or holds something else, or its tensors do not fit the model; names them.
    """
    model, path = checkpoint.unwrap(model), Path(source)
    path = path / checkpoint.WEIGHTS if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path}: no such file, expected a run's folder, a .safetensors or a .pt file of weights")
    loaded, ours = _without_wrappers(_read(path)), model.state_dict()
    masks = [name for name in loaded if name not in ours and name.rpartition(".")[2] == "mask"]
    loaded = {name: tensor for name, tensor in loaded.items() if name not in masks}
    note = ""
    if not loaded.keys() & ours.keys() and [t.shape for t in loaded.values()] == [t.shape for t in ours.values()]:
        loaded = dict(zip(ours, loaded.values(), strict=True))
        note = (
            f"{path}: uses other names; its {len(ours)} tensors have the shapes of the model's and were taken in order"
        )
    checkpoint.check_fit(model, loaded, path)
    model.load_state_dict(loaded)
    return note


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            import safetensors.torch

            content: Any = safetensors.torch.load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each library raises its own exceptions for foreign files
        raise ValueError(
            f"{path}: cannot be read as weights, or holds more than tensors ({type(error).__name__})"
        ) from error
    for name in STATE_DICT_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected a dict of tensors by name")
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{path}: holds no tensors by name")
    return tensors


def _without_wrappers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    while True:
        for wrapper in WRAPPERS:
            if all(name.startswith(wrapper) for name in tensors):
                tensors = {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}
                break
        else:
            # a part of the model was compiled: the prefix is in the middle of a name
            return {name.replace("._orig_mod.", "."): tensor for name, tensor in tensors.items()}
