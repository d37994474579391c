"""`train`: steps and validations until there is a reason to end."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen import checkpoint, distributed
from fastgen.data import Dataset
from fastgen.files import clear_leftovers, make_folder, write_atomically
from fastgen.models.rebuildable import Rebuildable
from fastgen.train import parallel, state
from fastgen.train.batches import Data
from fastgen.train.callbacks import SampleGrids, TensorBoard, notify
from fastgen.train.interrupts import Interrupted, Interrupts
from fastgen.train.measure import Loss, check_fit
from fastgen.train.run import Optimizer, Run, Schedule
from fastgen.train.settings import Settings
from fastgen.weights import load_weights

LOG_EVERY = 10  # steps


@dataclass(frozen=True)
class Result:
    """How a run ended: `reason` is "finished", "no improvement", "out of time" or "interrupted"; `best` is the lowest
    validation figure, in the unit that `metric` names, infinite where none was measured."""

    steps: int
    reason: str
    best: float
    metric: str
    seconds: float


def train(
    model: Any,
    data: Any,
    folder: str | os.PathLike,
    settings: Settings,
    *,
    callbacks: Sequence[Any] = (),
    init_from: str | os.PathLike | None = None,
    resume: bool = False,
    augment: Callable[[Tensor], Tensor] | None = None,
    optimizer: Optimizer | None = None,
    schedule: Schedule | None = None,
    progress: bool = True,
    device: torch.device | str | None = None,
) -> Result:
    """Trains a model, and leaves it with the averaged weights that were best, in evaluation mode.

    SIGINT (Ctrl-C) and SIGTERM end the run after the step at hand, or at once during a validation, with the state
    saved; a second Ctrl-C at once. Under `torchrun`, inside `fastgen.distributed.processes()`, the processes share
    each step and each validation, and that of rank 0 writes.

    Args:
        model: any module with `loss(x[, condition]) -> ()` or `log_prob(x[, condition]) -> (B,)` nats; wrappers of
            DataParallel, DDP and torch.compile are taken off. Classes are given to a model of `fastgen.models` that has
            n_classes, and to another whose method has a second argument.
        data: a `fastgen.data.Dataset`; a torch Dataset of images, or pairs of images and classes, of which a tenth is
            held out for validation; a DataLoader, without validation (the latest weights then count as the best); or
            a pair of the last two, for training and validation. Integers reach the model as int64, floats as they are.
        folder: the folder of the run; see the module's docstring.
        callbacks: see `fastgen.train.Callback`.
        init_from: weights to start from, as `fastgen.weights.load_weights` takes them.
        resume: go on from `training.pt`, exactly as if the run had never ended. `steps`, `max_seconds`, `patience`,
            `lr`, `samples` and how it is computed may differ from the run's settings.
        augment: images (n, C, H, W) -> images, for training only; random numbers from torch's default generators.
        optimizer: an optimizer of the model's parameters, or a function of them that gives one (needed for "fsdp");
            None is AdamW. Its learning rates are left alone unless a schedule is given.
        schedule: the learning rate of a step, counted from 0, or a torch LRScheduler, stepped at each step; None is the
            settings' warm-up and cosine.
        progress: a bar on a terminal, elsewhere a line for each validation.
        device: None is the GPU where there is one.

    Raises:
        ValueError: model and data do not fit; nothing of the model can be trained; its loss has another shape; the
            optimizer is of other parameters; data are empty; the folder is a file, has no run to resume, or another
            one, or one that has gone further than `steps`.
        TypeError: model or data are none of the above, or cannot be saved.
        OSError: the folder cannot be written to, the disk is full. What was saved before stays.
        FloatingPointError: the loss is not finite.
    """
    started = time.monotonic()
    model = checkpoint.unwrap(model)
    Loss(model)  # refuses what cannot be trained
    if isinstance(data, Dataset) and isinstance(model, Rebuildable):
        check_fit(model, data)
    _check_settings(model, settings)
    checkpoint.encode(checkpoint.configuration(model), model.state_dict())  # what cannot be saved is known now
    if init_from is not None:
        if resume:
            raise ValueError("init_from is for a new run: a resumed one has weights of its own")
        note = load_weights(model, init_from)
        if progress and note:
            print(note, flush=True)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    folder = Path(folder)
    if not resume and (folder / state.STATE).exists():
        raise ValueError(f"folder {str(folder)!r} holds a run already: resume=True goes on with it")
    saved = state.read(folder) if resume else None
    if distributed.rank() == 0:
        make_folder(folder)
        clear_leftovers(folder)
    options: dict[str, Any] = {"augment": augment, "optimizer": optimizer, "schedule": schedule}
    run = Run(model, Data(data), folder, settings, device, **options)
    if saved is not None:
        changed = state.restore(run, saved)
        if progress and changed:
            print(f"resumed at step {run.step} with {', '.join(changed)}", flush=True)
    callbacks = [*_own_callbacks(run), *callbacks]
    with Interrupts() as interrupts:
        reason = _loop(run, interrupts, callbacks, progress, started)
        best = _finish(run, interrupts, reason, callbacks)
        notify(callbacks, "on_end", run)
    return Result(run.step, reason, best, run.metric, time.monotonic() - started)


def _check_settings(model: Any, settings: Settings) -> None:
    """Raises ValueError for settings that are not for this model."""
    unknown = settings.loss_options(0).keys() - Loss(model).options
    if unknown:
        raise ValueError(f"{min(unknown)} is a setting for a VAE: the loss of {type(model).__name__} does not take it")
    if settings.samples:
        if SampleGrids.why_not(model):
            raise ValueError(f"samples must be 0: {SampleGrids.why_not(model)}")
        if parallel.sharded(settings):
            raise ValueError('samples must be 0 with parallel="fsdp": one process draws them')


def _own_callbacks(run: Run) -> list[Any]:
    if distributed.rank():
        return []
    try:
        board = TensorBoard(run)
    except ImportError:
        board = None
    grids = [SampleGrids(run.settings.samples, board)] if run.settings.samples else []
    return [*grids, *([board] if board else [])]


def _loop(run: Run, interrupts: Interrupts, callbacks: list[Any], progress: bool, started: float) -> str:
    """Steps and validations until there is a reason to end, which is returned."""
    from tqdm import tqdm

    settings, reason = run.settings, run.over()
    shown = progress and distributed.rank() == 0
    with tqdm(total=settings.steps, initial=run.step, unit="step", disable=None if shown else True) as bar:
        while not reason:
            if run.validation_is_due():
                value = _measured(run, interrupts)
                if value is None:
                    return "interrupted"
                run.record(value)
                state.save(run)
                if shown and bar.disable:
                    print(f"step {run.step} of {settings.steps}: {_figure(run, value)}", flush=True)
                notify(callbacks, "on_validation", run)
            else:
                run.train_step()
                bar.update()
                if run.step % LOG_EVERY == 0:
                    bar.set_postfix_str(f"{run.metric} {run.log():.3f} (validation {run.best:.3f})", refresh=False)
                notify(callbacks, "on_step", run)
            reason = run.over()
            late = settings.max_seconds is not None and time.monotonic() - started > settings.max_seconds
            if not reason and distributed.any_of_us(late):
                reason = "out of time"
            if not reason and distributed.any_of_us(interrupts.caught):
                reason = "interrupted"
    return reason


def _figure(run: Run, value: float) -> str:
    return "saved" if run.data.validation is None else f"validation {run.metric} {value:.4f}"


def _measured(run: Run, interrupts: Interrupts) -> float | None:
    """The validation figure, None where an interrupt came: at once, or where there are several processes after the
    batch at hand, since they must agree."""
    try:
        if distributed.active():
            return run.measure(lambda: interrupts.caught)
        with interrupts.at_once():
            return run.measure()
    except Interrupted:
        return None


def _finish(run: Run, interrupts: Interrupts, reason: str, callbacks: list[Any]) -> float:
    """Leaves the model with its best weights, saved. Where training ended between two scheduled validations, the last
    weights are validated too; a resumed run will not know of it, so that it equals one that never ended. An interrupted
    run is not validated. Returns the best validation figure."""
    best, weights = run.best, run.best_weights
    if run.step != run.validated:
        state.save(run)
        value = None if reason == "interrupted" else _measured(run, interrupts)
        if value is not None:
            run.add_validation(value)
            notify(callbacks, "on_validation", run)
        if not weights or (value is not None and value < best):
            best, weights = float("inf") if value is None else value, run.averaged()
            if distributed.rank() == 0:
                checkpoint.write(run.folder, run.configuration, weights)
        if distributed.rank() == 0:
            write_atomically({run.folder / state.METRICS: state.metrics(run)})
    parallel.load_model(run.model, weights)
    run.model.eval()
    return best if run.data.validation is not None else float("inf")
