"""The loss of a model as training and validation use it, its unit, and its mean over a data set."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastgen import distributed
from fastgen.data import Dataset, Split
from fastgen.models import VAE, Autoencoder
from fastgen.models.autoregressive import AutoregressiveModel
from fastgen.train.batches import Batch, Indexed, Loaded
from fastgen.train.interrupts import Interrupted

LOGITS_AT_ONCE = 2**25  # 256 MiB in float64; scoring holds a few tensors of this size


class Loss(nn.Module):
    """A module whose forward pass is the loss of a model, so that DDP, FSDP and CUDA graphs can wrap it.

    Args:
        model: a module with `loss(x[, condition])`, the mean over a batch, or `log_prob(x[, condition])`, (B,) nats.

    Raises:
        TypeError: the module has neither.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._is_loss = callable(getattr(model, "loss", None))
        if not self._is_loss and not callable(getattr(model, "log_prob", None)):
            raise TypeError(
                f"model must have loss(x[, condition]) or log_prob(x[, condition]), {type(model).__name__} has neither"
            )
        parameters = inspect.signature(model.loss if self._is_loss else model.log_prob).parameters.values()  # type: ignore[arg-type]
        names = {parameter.name for parameter in parameters}
        self.options = {"beta", "free_bits"} & names
        if hasattr(model, "n_classes"):
            self.conditional = model.n_classes is not None
        else:
            positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
            self.conditional = len(positional) > 1 and positional[1].name not in self.options

    def forward(self, x: Tensor, condition: Tensor | None = None, **options: Any) -> Tensor:
        """The mean over the batch, (). Raises ValueError if the model's method returns another shape."""
        classes = () if condition is None else (condition,)
        if self._is_loss:
            loss = self.model.loss(x, *classes, **options)  # type: ignore[operator]
            self._check("loss", loss, (), "the mean over the batch")
            return loss
        log_prob = self.model.log_prob(x, *classes, **options)  # type: ignore[operator]
        self._check("log_prob", log_prob, (len(x),), "one for each image")
        return -log_prob.mean()

    def _check(self, method: str, value: Any, shape: tuple[int, ...], meaning: str) -> None:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        if got != shape:
            raise ValueError(f"model.{method} must return a tensor of the shape {shape}, {meaning}, got {got}")

    def batch(self, batch: Batch, device: torch.device) -> Batch:
        """Moves a batch to the device: images, integers as int64, and classes if the model takes them."""
        x, labels = batch
        x = x.to(device)
        labels = labels.to(device) if self.conditional and labels is not None else None
        return x if x.is_floating_point() else x.long(), labels


def unit(model: Any, shape: tuple[int, ...] | None = None, floats: bool = False) -> tuple[str, float]:
    """The unit in which the loss of a model is reported, and the factor that converts the loss to it.

    The unit is "bits_per_dim" for a likelihood of levels, "squared_error" (per dimension) for an autoencoder,
    "density_nats" (per image) for a Gaussian VAE of float images, and "loss", with the factor 1, for any other module
    with its own `loss`.

    Args:
        shape: the shape of an image; None takes the model's.
        floats: whether the images are floats instead of levels.
    """
    dims = math.prod(model.shape if shape is None else shape)
    if isinstance(model, Autoencoder):
        return "squared_error", 1 / dims
    if floats and isinstance(model, VAE) and model.likelihood == "gaussian":
        return "density_nats", 1.0
    if isinstance(model, (AutoregressiveModel, VAE)) or not hasattr(model, "loss"):
        return "bits_per_dim", 1 / (dims * math.log(2))
    return "loss", 1.0


def check_fit(model: Any, dataset: Dataset) -> None:
    """Raises ValueError if the images have another shape, number of levels or number of classes than the model."""
    if model.shape != dataset.shape:
        same_size = model.shape[1:] == dataset.shape[1:]
        advice = "" if same_size else "; resize=N and crop=N (--resize N --crop N) change the size of image files"
        raise ValueError(
            f"the images of {dataset.name} have the shape {dataset.shape}, the model's are {model.shape}{advice}"
        )
    if model.levels != dataset.levels:
        raise ValueError(f"the images of {dataset.name} have {dataset.levels} levels, the model has {model.levels}")
    if model.n_classes is not None and (dataset.n_classes is None or dataset.n_classes > model.n_classes):
        raise ValueError(
            f"the model is conditional on {model.n_classes} classes, {dataset.name} has {dataset.n_classes or 'none'}"
        )


def images_at_once(model: Any) -> int:
    """The default number of images that a model scores in one pass: 256, or fewer if the model's output would take too
    much memory."""
    if not hasattr(model, "levels"):
        return 256
    return max(1, min(256, LOGITS_AT_ONCE // (math.prod(model.shape) * model.levels)))


@torch.no_grad()
def mean_loss(
    model: Any,
    split: Split | Indexed | Loaded,
    device: torch.device,
    *,
    batch_size: int | None = None,
    seed: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> float:
    """The mean of a model's loss over all images. The processes of a job divide the batches among themselves; the mean
    does not depend on their number. torch's random state does not change.

    Args:
        model: as in `train`.
        split: the images.
        device: the device of the model.
        batch_size: images in a pass; None is `images_at_once`.
        seed: seed of the noise in the loss (of a VAE).
        stop: a function that is called after each round of batches; True in any process makes all of them give up.

    Raises:
        Interrupted: `stop` returned True in one of the processes.
        TypeError, ValueError: as in `train`.
    """
    loss, source = Loss(model), Indexed(split) if isinstance(split, Split) else split
    count, rank = distributed.world_size(), distributed.rank()
    sums, images, batch = [], 0, None
    for number, batch in enumerate(source.chunks(batch_size or images_at_once(model))):
        sums.append(0.0)
        if number % count == rank:
            with distributed.seeded(device, seed, number):
                sums[-1] = float(loss(*loss.batch(batch, device))) * len(batch[0])
        images += len(batch[0])
        if number % count == count - 1 and distributed.any_of_us(stop()):
            raise Interrupted
    if batch is not None and rank >= len(sums) % count > 0:
        loss(*loss.batch(batch, device))  # an idle process joins the last round: sharded models need all processes
    return float(distributed.merged(torch.tensor(sums, dtype=torch.float64)).sum()) / images
