"""Everything that changes while a model is trained, in one object that can be saved and restored whole."""

import copy
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgen import checkpoint
from fastgen.data import Dataset
from fastgen.files import write_atomically
from fastgen.train.measure import batch_of, mean_loss, unit
from fastgen.train.settings import Settings

METRICS = "metrics.jsonl"
STATE = "training.pt"
FORMAT = "fastgen training state 1"


class Run:
    """A model, its average, its optimizer, the random states, and what was measured so far.

    Attributes:
        step: optimizer steps taken.
        best: lowest validation figure of a scheduled validation, in `metric`'s unit; infinite before the first.
        rows: of metrics.jsonl.
    """

    def __init__(self, model: Any, dataset: Dataset, folder: Path, settings: Settings, device: torch.device) -> None:
        self.model = model.to(device).train()
        self.dataset, self.folder, self.settings, self.device = dataset, folder, settings, device
        self.metric, self.factor = unit(model)
        self.average = copy.deepcopy(model).eval()
        decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
        others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=settings.lr)
        self.amp = None
        if device.type == "cuda":
            self.amp = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp == torch.float16)
        self.step = 0
        self.best = float("inf")
        self.best_weights: dict[str, Tensor] = {}
        self.stale = 0  # validations since the best one
        self.rows: list[dict[str, float]] = []
        self.loss_sum = torch.zeros((), device=device)  # since the last row, as is the count
        self.loss_count = 0
        self.gradient_norm = torch.zeros((), device=device)
        self.writer: Any = None
        torch.manual_seed(settings.seed)

    # --- one step

    def _indices(self) -> Tensor:
        """Places of this step's images: each epoch is a permutation of its own, its remainder left out."""
        count = len(self.dataset.train)
        size = min(self.settings.batch_size, count)
        epoch, position = divmod(self.step, count // size)
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + epoch)
        return torch.randperm(count, generator=generator)[position * size : (position + 1) * size]

    def train_step(self) -> None:
        x, condition = batch_of(self.model, self.dataset.train[self._indices()], self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate(self.step)
        with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
            loss = self.model.loss(x, condition)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        self.gradient_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        self._update_average()
        self.loss_sum += loss.detach()
        self.loss_count += 1

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = min(self.settings.ema, (1 + self.step) / (10 + self.step))  # the first weights are soon forgotten
        averages, values = list(self.average.parameters()), list(self.model.parameters())
        torch._foreach_lerp_(averages, values, 1 - decay)
        for average, value in zip(self.average.buffers(), self.model.buffers(), strict=True):
            average.copy_(value)

    # --- what is measured

    def log(self) -> float:
        """Adds a row on training; returns its loss. Waits for the device.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        loss = float(self.loss_sum) / self.loss_count * self.factor
        row = {
            "step": self.step,
            f"train_{self.metric}": loss,
            "learning_rate": self.settings.learning_rate(self.step - 1),
            "gradient_norm": float(self.gradient_norm),
        }
        self._check_finite(loss)
        self.loss_sum.zero_()
        self.loss_count = 0
        self._add(row)
        return loss

    def validate(self) -> float:
        """Adds a row on the validation images, scored by the averaged weights; keeps them where they are the best."""
        value = self._validation()
        self._add({"step": self.step, f"validation_{self.metric}": value})
        if value < self.best:
            self.best, self.stale = value, 0
            self.best_weights = {name: tensor.cpu().clone() for name, tensor in self.average.state_dict().items()}
            checkpoint.save(self.average, self.folder)
        else:
            self.stale += 1
        return value

    def _validation(self) -> float:
        split, seed = self.dataset.validation, self.settings.seed
        value = mean_loss(self.average, split, self.device, seed=seed) * self.factor
        self._check_finite(value)
        return value

    def _check_finite(self, loss: float) -> None:
        if not loss < float("inf"):
            raise FloatingPointError(f"the loss is {loss} at step {self.step}: try a lower learning rate")

    def _add(self, row: dict[str, float]) -> None:
        self.rows.append(row)
        if self.writer is not None:
            for name, value in row.items():
                if name != "step":
                    self.writer.add_scalar(name, value, self.step)

    @contextmanager
    def tensorboard(self) -> Iterator[None]:
        """Writes rows to TensorBoard too, where it is installed; those that a resumed run repeats are dropped."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            yield
            return
        with SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.step + 1) as self.writer:
            yield

    def over(self) -> str:
        """Why there is nothing more to do, "" where there is."""
        if self.settings.patience and self.stale >= self.settings.patience:
            return "no improvement"
        return "finished" if self.step >= self.settings.steps else ""

    def finish(self, interrupted: bool) -> float:
        """Leaves the model with its best weights, saved. Where training ended between two scheduled validations, the
        last weights are validated too; a resumed run will not know of it, so that it equals one that never ended.
        Returns the best validation figure."""
        best, weights = self.best, self.best_weights
        if self.step % self.settings.validate_every:
            self.save()
            if not (interrupted and weights):
                value = self._validation()
                self._add({"step": self.step, f"validation_{self.metric}": value})
                if value < best:
                    best, weights = value, self.average.state_dict()
                    checkpoint.save(self.average, self.folder)
                self._write_metrics()
        self.model.load_state_dict(weights)
        self.model.eval()
        return best

    # --- files

    def _write_metrics(self) -> None:
        write_atomically({self.folder / METRICS: "".join(json.dumps(row) + "\n" for row in self.rows).encode()})

    def save(self) -> None:
        """Writes training.pt and metrics.jsonl."""
        state = {
            "format": FORMAT,
            "model": checkpoint.configuration(self.model),
            "data": self.dataset.name,
            "settings": asdict(self.settings),
            "step": self.step,
            "best": self.best,
            "best_weights": self.best_weights,
            "stale": self.stale,
            "rows": self.rows,
            "weights": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "loss": (self.loss_sum, self.loss_count),
            "gradient_norm": self.gradient_norm,
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomically({self.folder / STATE: buffer.getvalue()})
        self._write_metrics()

    def restore(self, state: dict[str, Any]) -> None:
        """Takes the state that `read_state` gave.

        Raises:
            ValueError: it is of another model, other data or other settings; names them.
        """
        path = self.folder / STATE
        own = checkpoint.configuration(self.model)
        differences = [
            (key, state["model"][key], own[key]) for key in ("class", "arguments") if state["model"][key] != own[key]
        ]
        if state["data"] != self.dataset.name:
            differences.append(("data", state["data"], self.dataset.name))
        for name, value in asdict(self.settings).items():
            if name not in ("steps", "max_seconds") and value != state["settings"].get(name):
                differences.append((name, state["settings"].get(name), value))
        if differences:
            name, value, given = differences[0]
            raise ValueError(f"{path}: this run has {name} = {value}, and cannot be resumed with {given}")
        try:
            self.model.load_state_dict(state["weights"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.step, self.best, self.stale = state["step"], state["best"], state["stale"]
            self.best_weights, self.rows = state["best_weights"], state["rows"]
            self.loss_sum, self.loss_count = state["loss"][0].to(self.device), state["loss"][1]
            self.gradient_norm = state["gradient_norm"].to(self.device)
            torch.set_rng_state(state["random"])
            if state["random_cuda"] is not None and self.device.type == "cuda":
                torch.cuda.set_rng_state(state["random_cuda"], self.device)
        except Exception as error:  # whatever torch says to tensors and numbers that do not belong there
            raise ValueError(f"{path}: is damaged ({error})") from error
        if self.best_weights:
            best = copy.deepcopy(self.average)
            best.load_state_dict(self.best_weights)
            checkpoint.save(best, self.folder)


def read_state(folder: str | os.PathLike) -> dict[str, Any]:
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
    kinds = {"model": dict, "data": str, "settings": dict}
    if (
        not isinstance(state, dict)
        or state.get("format") != FORMAT
        or any(not isinstance(state.get(name), kind) for name, kind in kinds.items())
    ):
        raise ValueError(f"{path}: is not a training state written by fastgen")
    return state
