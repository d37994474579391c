"""The loop."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastgen.data import Dataset
from fastgen.files import make_folder
from fastgen.train.interrupts import Interrupts
from fastgen.train.measure import check_fit
from fastgen.train.run import Run, read_state
from fastgen.train.settings import Settings

LOG_EVERY = 10  # steps


@dataclass(frozen=True)
class Result:
    """How a run ended: `reason` is "finished", "no improvement", "out of time" or "interrupted"."""

    steps: int
    reason: str
    best: float
    metric: str
    seconds: float


def train(
    model: Any,
    dataset: Dataset,
    folder: str | os.PathLike,
    settings: Settings,
    *,
    resume: bool = False,
    progress: bool = True,
    device: torch.device | str | None = None,
) -> Result:
    """Trains a model of `fastgen.models`, and leaves it with the weights that were best, in evaluation mode.

    SIGINT (Ctrl-C) and SIGTERM end the run after the step at hand, saved; a second Ctrl-C at once.

    Args:
        folder: of the run; see the module's docstring.
        resume: go on from `training.pt`, exactly as if the run had never ended; only `steps` and `max_seconds` may
            differ from its settings.
        progress: a bar on a terminal, elsewhere a line for each validation.
        device: None is the GPU where there is one. GPUs compute in bfloat16 where they can (float16 where not).

    Raises:
        ValueError: model and data do not fit; the folder has no run to resume, or another one.
        OSError: the folder cannot be written to, the disk is full. What was saved before stays.
        FloatingPointError: the loss is not finite.
    """
    check_fit(model, dataset)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    make_folder(Path(folder))
    run = Run(model, dataset, Path(folder), settings, device)
    if resume:
        run.restore(read_state(folder))
    started, reason = time.monotonic(), run.over()
    from tqdm import tqdm

    bar = tqdm(total=settings.steps, initial=run.step, unit="step", disable=None if progress else True)
    with Interrupts() as interrupts, run.tensorboard(), bar:
        while not reason:
            run.train_step()
            bar.update()
            if run.step % LOG_EVERY == 0:
                bar.set_postfix_str(f"{run.metric} {run.log():.3f} (validation {run.best:.3f})", refresh=False)
            if run.step % settings.validate_every == 0:
                value = run.validate()
                run.save()
                if progress and bar.disable:
                    print(f"step {run.step} of {settings.steps}: validation {run.metric} {value:.4f}", flush=True)
            reason = run.over()
            if not reason and settings.max_seconds is not None and time.monotonic() - started > settings.max_seconds:
                reason = "out of time"
            if not reason and interrupts.caught:
                reason = "interrupted"
        best = run.finish(interrupted=reason == "interrupted")
    return Result(run.step, reason, best, run.metric, time.monotonic() - started)
