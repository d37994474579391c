"""training.pt: the state of a run between two steps, as tensors, numbers and text. It depends neither on the devices
nor on the number of processes."""

import io
import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from fastgen import checkpoint, distributed
from fastgen.files import write_atomically
from fastgen.train import parallel
from fastgen.train.run import Run
from fastgen.train.settings import Settings

METRICS = "metrics.jsonl"
STATE = "training.pt"
FORMAT = "fastgen training state 2"
FIELDS = {
    "model": dict,
    "data": dict,
    "settings": dict,
    "step": int,
    "validated": int,
    "best": float,
    "best_weights": dict,
    "stale": int,
    "rows": list,
    "weights": dict,
    "average": dict,
    "optimizer": dict,
    "scaler": dict,
    "loss": tuple,
    "gradient_norm": Tensor,
}
DATA_FIELDS = {"name": str, "loading": dict, "sha256": str}
MAY_CHANGE = ("steps", "max_seconds", "patience", "lr", "samples", "parallel", "cuda_graph")


def save(run: Run) -> None:
    """Writes training.pt, metrics.jsonl and, once there has been a validation, the model with the best weights. All
    processes must call it.

    Raises:
        FloatingPointError: a weight is not finite. The state that was saved before, which can be resumed, stays.
    """
    run.check_weights()
    state = {
        "format": FORMAT,
        "model": run.configuration,
        "data": {"name": run.data.name, "loading": run.data.loading, "sha256": run.data.sha256},
        "settings": asdict(run.settings),
        "step": run.step,
        "validated": run.validated,
        "best": run.best,
        "best_weights": run.best_weights,
        "stale": run.stale,
        "rows": run.rows,
        "weights": parallel.whole(run.model.state_dict()),
        "average": run.averaged(),
        "optimizer": parallel.whole(run.optimizer.state_dict()),
        "schedule": run.schedule.state_dict() if isinstance(run.schedule, LRScheduler) else None,
        "scaler": run.scaler.state_dict(),
        "loss": (distributed.merged(run.loss_sum), run.loss_count),
        "gradient_norm": run.gradient_norm,
    }
    if distributed.rank() == 0:
        if run.best_weights:
            checkpoint.write(run.folder, run.configuration, run.best_weights)
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomically({run.folder / STATE: buffer.getvalue(), run.folder / METRICS: metrics(run)})


def metrics(run: Run) -> bytes:
    """The content of metrics.jsonl."""
    return "".join(json.dumps(row) + "\n" for row in run.rows).encode()


def restore(run: Run, state: dict[str, Any]) -> list[str]:
    """Restores a run from a state that `read` returned. Returns the settings that have a new value, as texts
    "NAME OLD -> NEW".

    A new value of steps, patience or lr also lets a run go on that had stopped without improvement.

    Raises:
        ValueError: the state has another model, other images or other settings; names them.
    """
    path = run.folder / STATE
    given, before = asdict(run.settings), {**asdict(Settings()), **state["settings"]}
    must_agree = [(key, state["model"][key], run.configuration[key]) for key in ("class", "arguments")]
    if state["data"]["sha256"] != run.data.sha256:
        raise ValueError(
            f"{path}: was trained on other images than {run.data.name} (was {state['data']['name']}) holds now"
        )
    must_agree += [(name, before.get(name), value) for name, value in given.items() if name not in MAY_CHANGE]
    for name, saved_value, value in must_agree:
        if saved_value != value:
            raise ValueError(f"{path}: this run has {name} = {saved_value}, and cannot be resumed with {value}")
    if run.settings.steps < state["step"]:
        raise ValueError(
            f"steps must be at least {state['step']}, which this run has reached, got {run.settings.steps}"
        )
    changed = [name for name in ("steps", "patience", "lr") if before[name] != given[name]]
    try:
        parallel.load_model(run.model, state["weights"])
        parallel.load_model(run.average, state["average"])
        parallel.load_optimizer(run.optimizer, state["optimizer"])
        if isinstance(run.schedule, LRScheduler):
            run.schedule.load_state_dict(state["schedule"])
        run.scaler.load_state_dict(state["scaler"])
        run.step, run.validated = state["step"], state["validated"]
        run.best, run.best_weights, run.stale = state["best"], state["best_weights"], state["stale"]
        run.rows = state["rows"]
        if distributed.rank() == 0:  # the file holds the sum over all processes, which must be counted once
            run.loss_sum = state["loss"][0].to(run.device)
        run.loss_count, run.gradient_norm = state["loss"][1], state["gradient_norm"].to(run.device)
    except Exception as error:  # torch raises many exceptions for tensors and numbers that do not fit
        raise ValueError(f"{path}: is damaged, or of another optimizer or schedule ({error})") from error
    if before["patience"] and run.stale >= before["patience"] and changed:
        run.stale = 0
    if run.best_weights and distributed.rank() == 0:
        checkpoint.write(run.folder, run.configuration, run.best_weights)
    return [f"{name} {before[name]} -> {given[name]}" for name in changed]


def read(folder: str | os.PathLike) -> dict[str, Any]:
    """Reads FOLDER/training.pt: tensors on the CPU, numbers and text. No code in the file is run.

    Raises:
        ValueError: the file is missing, or this version of fastgen did not write it; names the file.
    """
    path = Path(folder) / STATE
    if not path.is_file():
        raise ValueError(f"{path}: no such file, so there is no run to resume")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not compare the checksums
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, zipfile and pickle raise many exceptions for foreign files
        raise ValueError(f"{path}: is not a training state, or damaged ({type(error).__name__})") from error
    if damaged:
        raise ValueError(f"{path}: is damaged: the checksum of {damaged} does not match")
    if (
        not _has(state, FIELDS)
        or state.get("format") != FORMAT
        or not _has(state["data"], DATA_FIELDS)
        or not state["settings"].keys() <= Settings.__dataclass_fields__.keys()
    ):
        raise ValueError(f"{path}: is not a training state written by this version of fastgen")
    return state


def _has(state: Any, fields: Mapping[str, type]) -> bool:
    """Whether a state holds all fields, each of its type."""
    return isinstance(state, dict) and all(isinstance(state.get(name), kind) for name, kind in fields.items())
