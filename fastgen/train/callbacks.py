"""Callbacks of a training run: the user's own, TensorBoard, grids of samples."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastgen import distributed, plots

if TYPE_CHECKING:
    from fastgen.train.run import Run


class Callback:
    """A callback is any object with one or more of these methods. They are called in every process of a job.

    They may read of a run `step`, `model`, `average` (the averaged weights, which are what is validated), `folder`,
    `settings`, `rows` (of metrics.jsonl so far), `best` and `metric`.
    """

    def on_step(self, run: "Run") -> None:
        """After a step of the optimizer."""

    def on_validation(self, run: "Run") -> None:
        """After a validation, saved; its figure is in the last of `run.rows`."""

    def on_end(self, run: "Run") -> None:
        """Once, when the run has ended well or was interrupted, with the best weights in the model."""


def notify(callbacks: list[Any], moment: str, run: "Run") -> None:
    for callback in callbacks:
        method = getattr(callback, moment, None)
        if method is not None:
            method(run)


class TensorBoard(Callback):
    """Rows and pictures of samples, in RUN/tensorboard; rows that a resumed run repeats are dropped there.

    Raises:
        ImportError: TensorBoard is not installed.
    """

    def __init__(self, run: "Run") -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.step + 1)
        self._written = len(run.rows)

    def on_step(self, run: "Run") -> None:
        for row in run.rows[self._written :]:
            for name, value in row.items():
                if name != "step":
                    self.writer.add_scalar(name, value, row["step"])
        self._written = len(run.rows)

    on_validation = on_step

    def on_end(self, run: "Run") -> None:
        self.on_step(run)
        self.writer.close()


class SampleGrids(Callback):
    """Writes samples of the averaged weights at every validation, to RUN/samples/step-0000100.png and so on, always
    from the same noise."""

    def __init__(self, count: int, tensorboard: TensorBoard | None) -> None:
        self.count, self.tensorboard = count, tensorboard

    @staticmethod
    def why_not(model: Any) -> str:
        """Why a model cannot be sampled here, "" if it can."""
        if all(hasattr(model, name) for name in ("sample", "levels", "shape", "n_classes")):
            return ""
        return f"a {type(model).__name__} has no sample(n) of images with levels"

    def on_validation(self, run: "Run") -> None:
        model: Any = run.average
        condition = None
        if model.n_classes is not None:
            condition = torch.arange(self.count, device=run.device) % model.n_classes
        with distributed.seeded(run.device, run.settings.seed):
            images = model.sample(self.count, seed=run.settings.seed, condition=condition)
        folder = run.folder / "samples"
        folder.mkdir(exist_ok=True)
        columns = plots.columns_of(self.count)
        plots.image_grid(images, model.levels, folder / f"step-{run.step:07}.png", columns=columns)
        if self.tensorboard is not None:
            pixels = np.asarray(plots.grid(images, model.levels, columns=columns))
            self.tensorboard.writer.add_image("samples", pixels, run.step, dataformats="HWC")
