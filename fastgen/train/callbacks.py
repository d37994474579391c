"""Callbacks of a training run: the protocol, and those for TensorBoard and for grids of samples."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastgen import distributed, plots

if TYPE_CHECKING:
    from fastgen.train.run import Run


class Callback:
    """A callback is any object with one or more of these methods. Every process of a job calls them.

    They may read these attributes of a run: `step`, `model`, `average` (the model with averaged weights, which is
    validated and saved), `folder`, `settings`, `rows` (the lines of metrics.jsonl so far), `best` and `metric`.
    """

    def on_step(self, run: "Run") -> None:
        """Called after each step of the optimizer."""

    def on_validation(self, run: "Run") -> None:
        """Called after each validation, when the run is saved. The result is in the last of `run.rows`."""

    def on_end(self, run: "Run") -> None:
        """Called once, when the run has ended or was interrupted. `run.model` has the best weights."""


def notify(callbacks: list[Any], event: str, run: "Run") -> None:
    """Calls the method `event` of each callback that has it."""
    for callback in callbacks:
        method = getattr(callback, event, None)
        if method is not None:
            method(run)


class TensorBoard(Callback):
    """Writes the rows of metrics.jsonl to RUN/tensorboard. A resumed run removes the steps that it repeats.

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
    """Draws samples from the averaged weights at every validation, always from the same noise, and writes them to
    RUN/samples/step-0000100.png and so on.

    Args:
        count: number of images.
        tensorboard: where the pictures are logged too, if not None.
    """

    def __init__(self, count: int, tensorboard: TensorBoard | None) -> None:
        self.count, self.tensorboard = count, tensorboard

    @staticmethod
    def why_not(model: Any) -> str:
        """The reason why a model cannot be sampled here; "" if it can."""
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
