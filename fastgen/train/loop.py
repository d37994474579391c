"""`train`, the training loop."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

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
    """How a training run ended.

    Attributes:
        steps: optimizer steps taken in all, including those before a resumption.
        reason: "finished", "no improvement", "out of time" or "interrupted".
        best: lowest validation loss, in the unit `metric`; infinite if there was no validation.
        metric: the unit of the loss; see `fastgen.train.unit`.
        seconds: wall time of this call of `train`.
    """

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
    """Trains a model. Afterwards it is in evaluation mode, with the averaged weights that were best in validation.

    Ctrl-C (SIGINT) and SIGTERM save the state and end the run: after the current step, or at once during a validation.
    A second Ctrl-C ends the program without saving. Under `torchrun`, call it inside `fastgen.distributed.processes()`:
    the processes then share each step and each validation, and rank 0 writes the files.

    Args:
        model: any module with `loss(x[, condition]) -> ()` or `log_prob(x[, condition]) -> (B,)` nats. Wrappers
            (DataParallel, DDP, torch.compile) are removed. A model of `fastgen.models` gets classes if it has
            n_classes, any other module if its method has a second argument.
        data: a `fastgen.data.Dataset`; or a torch Dataset of images, or of pairs of images and classes, of which a
            tenth is held out for validation; or a DataLoader, which has no validation (the latest weights count as the
            best); or a pair of Datasets or DataLoaders for training and validation. Integer images become int64, float
            images reach the model unchanged.
        folder: the folder of the run; see the docstring of `fastgen.train`.
        settings: number of steps, learning rate and so on; see `fastgen.train.Settings`.
        callbacks: objects with methods of `fastgen.train.Callback`.
        init_from: a source of weights to start from, as in `fastgen.weights.load_weights`.
        resume: True continues from `training.pt` exactly where the run stopped. The settings `steps`, `max_seconds`,
            `patience`, `lr`, `samples`, `parallel` and `cuda_graph` may have new values.
        augment: a function of images (n, C, H, W) that returns images, applied to training batches. Its random numbers
            must come from torch's default generators.
        optimizer: an optimizer of the model's parameters, or a function that makes one from the parameters (needed for
            "fsdp"); None is AdamW. Without `schedule`, the learning rates of your optimizer are not changed.
        schedule: a function from the number of the step, counted from 0, to the learning rate; or a torch LRScheduler
            of `optimizer`, which is stepped after each step; None is the warm-up and cosine of the settings.
        progress: True shows a progress bar on a terminal, and elsewhere prints a line for each validation.
        device: the device to train on; None is the GPU if there is one.

    Returns:
        How the run ended.

    Raises:
        ValueError: model and data do not fit; no parameter can be trained; the loss has another shape; the optimizer
            has other parameters than the model; the schedule is of another optimizer; there are no images; torch does
            not find the device; `folder` is a file, already holds a run, or holds none to resume; the run to resume
            differs in model, images or settings, or has taken more than `steps` steps.
        TypeError: model, data, settings, augment, optimizer or schedule is not one of the above; the model cannot be
            saved.
        OSError: the folder cannot be written to, or the disk is full. What was saved before stays.
        FloatingPointError: the loss or a weight is not finite. What was saved before stays.
    """
    started = time.monotonic()
    model = checkpoint.unwrap(model)
    Loss(model)  # raises TypeError for a model that cannot be trained
    if isinstance(data, Dataset) and isinstance(model, Rebuildable):
        check_fit(model, data)
    _check_settings(model, settings)
    kinds: Any = (
        ("augment", augment, (), "a function of images"),
        ("optimizer", optimizer, torch.optim.Optimizer, "an optimizer or a function that makes one"),
        ("schedule", schedule, LRScheduler, "a function of the step or an LRScheduler"),
    )
    for name, value, kind, expected in kinds:
        if not (value is None or callable(value) or isinstance(value, kind)):
            raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")
    checkpoint.encode(checkpoint.configuration(model), model.state_dict())  # raises now if the model cannot be saved
    if init_from is not None:
        if resume:
            raise ValueError("init_from is for a new run: a resumed run continues with its own weights")
        note = load_weights(model, init_from)
        if progress and note:
            print(note, flush=True)
    device = _checked_device(device)
    folder = Path(folder)
    if not resume and (folder / state.STATE).exists():
        raise ValueError(f"folder {str(folder)!r} holds a run already: resume=True continues it")
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
    callbacks = [*_built_in_callbacks(run), *callbacks]
    with Interrupts() as interrupts:
        reason = _loop(run, interrupts, callbacks, progress, started)
        best = _finish(run, interrupts, reason, callbacks)
        notify(callbacks, "on_end", run)
    return Result(run.step, reason, best, run.metric, time.monotonic() - started)


def _check_settings(model: Any, settings: Settings) -> None:
    """Raises TypeError if `settings` are not Settings, ValueError for settings that this model cannot have."""
    if not isinstance(settings, Settings):
        raise TypeError(f"settings must be a fastgen.train.Settings, got {type(settings).__name__}")
    unknown = settings.loss_options(0).keys() - Loss(model).options
    if unknown:
        raise ValueError(f"{min(unknown)} is a setting for a VAE: the loss of {type(model).__name__} does not take it")
    if settings.samples:
        if SampleGrids.why_not(model):
            raise ValueError(f"samples must be 0: {SampleGrids.why_not(model)}")
        if parallel.sharded(settings):
            raise ValueError('samples must be 0 with parallel="fsdp": one process draws them')


def _checked_device(device: torch.device | str | None) -> torch.device:
    """The device, or the default. Raises ValueError if torch does not find it."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device must be one that torch finds, got {device!r}: {str(error).splitlines()[0]}"
        ) from error
    return torch.device(device)


def _built_in_callbacks(run: Run) -> list[Any]:
    """TensorBoard, if it is installed, and grids of samples, if the settings ask for them; in the process of rank 0."""
    if distributed.rank():
        return []
    try:
        board = TensorBoard(run)
    except ImportError:
        board = None
    grids = [SampleGrids(run.settings.samples, board)] if run.settings.samples else []
    return [*grids, *([board] if board else [])]


def _loop(run: Run, interrupts: Interrupts, callbacks: list[Any], progress: bool, started: float) -> str:
    """Runs steps and validations until there is a reason to end, and returns the reason."""
    from tqdm import tqdm

    settings, reason = run.settings, run.over()
    shown = progress and distributed.rank() == 0
    with tqdm(total=settings.steps, initial=run.step, unit="step", disable=None if shown else True) as bar:
        while not reason:
            if run.validation_is_due():
                value = _validated(run, interrupts)
                if value is None:
                    return "interrupted"
                run.record(value)
                state.save(run)
                if shown and bar.disable:
                    result = "saved" if run.data.validation is None else f"validation {run.metric} {value:.4f}"
                    print(f"step {run.step} of {settings.steps}: {result}", flush=True)
                notify(callbacks, "on_validation", run)
            else:
                run.train_step()
                bar.update()
                if run.step % LOG_EVERY == 0:
                    bar.set_postfix_str(f"{run.metric} {run.log():.3f} (validation {run.best:.3f})", refresh=False)
                notify(callbacks, "on_step", run)
            reason = run.over()
            out_of_time = settings.max_seconds is not None and time.monotonic() - started > settings.max_seconds
            if not reason and distributed.any_of_us(out_of_time):
                reason = "out of time"
            if not reason and distributed.any_of_us(interrupts.caught):
                reason = "interrupted"
    return reason


def _validated(run: Run, interrupts: Interrupts) -> float | None:
    """The validation loss, or None if a signal interrupted the validation: at once in a single process; with several
    processes, which must stop together, after the current batch."""
    try:
        if distributed.active():
            return run.measure(lambda: interrupts.caught)
        with interrupts.at_once():
            return run.measure()
    except Interrupted:
        return None


def _finish(run: Run, interrupts: Interrupts, reason: str, callbacks: list[Any]) -> float:
    """Gives the model its best weights, saves them, and returns the best validation loss.

    If training ended between two scheduled validations, the last weights are validated too, unless the run was
    interrupted. training.pt does not record this validation, so that a resumed run equals one that never stopped."""
    best, weights = run.best, run.best_weights
    if run.step != run.validated:
        state.save(run)
        value = None if reason == "interrupted" else _validated(run, interrupts)
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
