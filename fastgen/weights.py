"""Loads weights of a run, or of a file that somebody else wrote, into a model. Nothing but tensors is unpickled."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgen import checkpoint

WRAPPERS = ("module.", "_orig_mod.", "model.")  # what DataParallel, torch.compile and Lightning put before a name
INSIDE = ("state_dict", "model_state_dict", "model", "weights")  # where training scripts keep the weights in a .pt


def load_weights(model: nn.Module, source: str | os.PathLike) -> str:
    """Loads weights into a model. Returns a note if they were matched by shape, "" if they were matched by name.

    Names are compared without the prefixes of wrappers ("module.", for example), and masks that the model makes itself
    are left out. If no name matches, but the shapes are the model's in the same order, tensors are matched by order.

    Args:
        source: a folder with model.safetensors (a run, or of `fastgen.save`), a .safetensors file, or a .pt or .pth
            file of a state dict (also inside a dict, as "state_dict" or "model"), read with weights_only=True.

    Raises:
        ValueError: the file is missing or something else, or its weights are not those of the model; names them.
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
            f"{path}: knows other names; its {len(ours)} tensors have the shapes of the model's and were taken in order"
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
    except Exception as error:  # each library has its own kinds for files that are something else
        raise ValueError(
            f"{path}: cannot be read as weights, or holds more than tensors ({type(error).__name__})"
        ) from error
    for name in INSIDE:
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
            # torch.compile on a part of a model leaves its mark inside
            return {name.replace("._orig_mod.", "."): tensor for name, tensor in tensors.items()}
