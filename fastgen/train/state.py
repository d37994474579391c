"""training.pt: a run between two steps, as tensors, numbers and text. It does not know of devices or processes."""

import io
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from fastgen import checkpoint, distributed
from fastgen.files import write_atomically
from fastgen.train import parallel
from fastgen.train.run import Run

METRICS = "metrics.jsonl"
STATE = "training.pt"
FORMAT = "fastgen training state 2"
MAY_CHANGE = ("steps", "max_seconds", "patience", "lr", "samples", "parallel", "cuda_graph")


def save(run: Run) -> None:
    """Writes training.pt, metrics.jsonl and, where there are best weights, the model; all processes must call it."""
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
    return "".join(json.dumps(row) + "\n" for row in run.rows).encode()


def restore(run: Run, state: dict[str, Any]) -> list[str]:
    """Puts a state that `read` gave into a run. Returns the settings that have a new value, as "NAME OLD -> NEW".

    A run that had stopped without improvement goes on where one of these is new.

    Raises:
        ValueError: it is of another model, other images or other settings; names them.
    """
    path = run.folder / STATE
    given, before = asdict(run.settings), {**asdict(type(run.settings)()), **state["settings"]}
    differences = [(key, state["model"][key], run.configuration[key]) for key in ("class", "arguments")]
    if state["data"]["sha256"] != run.data.sha256:
        raise ValueError(
            f"{path}: this run is of other images than {run.data.name} (was {state['data']['name']}) holds"
        )
    differences += [(name, before.get(name), value) for name, value in given.items() if name not in MAY_CHANGE]
    for name, value, other in differences:
        if value != other:
            raise ValueError(f"{path}: this run has {name} = {value}, and cannot be resumed with {other}")
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
        if distributed.rank() == 0:  # the sum over all is that of the file
            run.loss_sum = state["loss"][0].to(run.device)
        run.loss_count, run.gradient_norm = state["loss"][1], state["gradient_norm"].to(run.device)
    except Exception as error:  # whatever torch says to tensors and numbers that do not belong there
        raise ValueError(f"{path}: is damaged ({error})") from error
    if before["patience"] and run.stale >= before["patience"] and changed:
        run.stale = 0
    if run.best_weights and distributed.rank() == 0:
        checkpoint.write(run.folder, run.configuration, run.best_weights)
    return [f"{name} {before[name]} -> {given[name]}" for name in changed]


def read(folder: str | os.PathLike) -> dict[str, Any]:
    """The contents of FOLDER/training.pt on the CPU: tensors, numbers and text, nothing that runs.

    Raises:
        ValueError: the file is missing or is not one that a run wrote; names it.
    """
    path = Path(folder) / STATE
    if not path.is_file():
        raise ValueError(f"{path}: no such file, so there is no run to resume")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, zipfile and pickle raise many kinds for files that are something else
        raise ValueError(f"{path}: is not a training state, or damaged ({type(error).__name__})") from error
    if (
        not isinstance(state, dict)
        or state.get("format") != FORMAT
        or any(not isinstance(state.get(name), dict) for name in ("model", "data", "settings"))
    ):
        raise ValueError(f"{path}: is not a training state written by this version of fastgen")
    return state
