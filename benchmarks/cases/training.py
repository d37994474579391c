"""Training steps: loss and gradients of a batch, without the optimizer, which is the same for all providers.

The rivals have the same parameters in plain PyTorch. bfloat16 means autocast.
"""

import functools
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.cases import references
from benchmarks.harness.case import Case, Rivals
from fastgen.data import load
from fastgen.models import GatedPixelCNN, PixelCNN, PixelRNN
from fastgen.ops import reconstruction_nll

Shape = tuple[int, int, int]
SHAPES: dict[str, Shape] = {"digits": (1, 8, 8), "patches": (3, 32, 32), "random": (3, 32, 32)}
LEVELS = {"digits": 17, "patches": 256, "random": 256}
# The first two data sets come from scikit-learn.
AVAILABLE = [name for name in SHAPES if name == "random" or importlib.util.find_spec("sklearn")]


def images(data: str, shape: Shape, levels: int, batch: int, device: torch.device) -> Tensor:
    """The first training images of a data set, or random levels, uint8 (batch, C, H, W).

    Raises:
        ValueError: the data set has fewer images, or images of another shape.
    """
    if data == "random":
        return torch.randint(levels, (batch, *shape), dtype=torch.uint8, device=device)
    first_images = load(data).train.images[:batch]
    if tuple(first_images.shape) != (batch, *shape):
        raise ValueError(f"{data} has no {batch} images {shape}, found {tuple(first_images.shape)}")
    return first_images.to(device)


CONVOLUTIONS: dict[str, Any] = {"GatedPixelCNN": GatedPixelCNN, "PixelCNN": PixelCNN}
SCANS: dict[str, Any] = {
    f"PixelRNN {kind}": functools.partial(PixelRNN, kind=kind) for kind in ("diagonal_bilstm", "row_lstm")
}
MODELS = CONVOLUTIONS | SCANS


class Job(NamedTuple):
    """A model and a batch of images.

    Attributes:
        model: a key of MODELS.
        data: a key of SHAPES.
        batch: number of images.
        size: further arguments of the model.
        shape: (C, H, W) of an image.
        levels: number of levels of a channel.
    """

    model: str
    data: str
    batch: int
    size: dict[str, int]
    shape: Shape
    levels: int


def _convolutions(data: str, batch: int, channels: int, layers: int) -> list[Job]:
    return _of(CONVOLUTIONS, data, batch, {"channels": channels, "layers": layers})


def _scans(data: str, batch: int, hidden_channels: int, layers: int) -> list[Job]:
    return _of(SCANS, data, batch, {"hidden_channels": hidden_channels, "layers": layers})


def _of(models: Iterable[str], data: str, batch: int, size: dict[str, int]) -> list[Job]:
    return [Job(name, data, batch, size, SHAPES[data], LEVELS[data]) for name in models if data in AVAILABLE]


def _mnist(batch: int) -> list[Job]:
    """PixelRNN with 7 layers of 16 units, as in the paper for binarized MNIST, on random images of MNIST's shape."""
    return [job._replace(shape=(1, 28, 28), levels=2) for job in _scans("random", batch, 16, 7)]


COLOURS = ("patches", "random")
JOBS: dict[str, list[Job]] = {
    "toy": [j._replace(shape=(1, 3, 4), levels=3) for jobs in (_convolutions, _scans) for j in jobs("random", 2, 4, 1)],
    "cpu": _convolutions("digits", 64, 32, 3) + _convolutions("patches", 2, 32, 3) + _convolutions("random", 2, 32, 3),
    "cpu-full": [
        *(job for data, n in (("digits", 64), ("patches", 4), ("random", 4)) for job in _convolutions(data, n, 48, 6)),
        *_scans("digits", 64, 16, 3),
        *(job for data in COLOURS for job in _scans(data, 2, 12, 1)),
    ],
    "gpu": [
        *_convolutions("digits", 256, 128, 10),
        *_mnist(16),
        *_scans("digits", 64, 16, 7),
        *(job for data in COLOURS for job in _convolutions(data, 32, 128, 10)),
        *(job for data in COLOURS for job in _scans(data, 16, 48, 7)),
    ],
    "gpu-full": [
        *_convolutions("digits", 256, 128, 15),
        *_mnist(64),
        *_scans("digits", 256, 16, 7),
        *(job for data in COLOURS for job in _convolutions(data, 128, 128, 15)),
        *(job for data in COLOURS for job in _scans(data, 64, 96, 7)),
    ],
}


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def _inputs(device: torch.device, job: Job, dtype: torch.dtype) -> dict[str, Any]:
    model = MODELS[job.model](job.shape, job.levels, **job.size).to(device)
    if device.type == "cuda":
        for parameter in model.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    x = images(job.data, job.shape, job.levels, job.batch, device).long()
    return {"model": model, "plain": references.plain(model), "x": x, "autocast": autocast(device, dtype)}


def _few_images(inputs: dict[str, Any]) -> dict[str, Any]:
    """Fewer images for the comparison, since float64 takes twice the memory."""
    x = inputs["x"]
    return {"x": x if x.numel() <= 2**17 else x[:2]}


def fastgen_loss(model: nn.Module, plain: nn.Module, x: Tensor, autocast: Any) -> Tensor:
    """Mean nats per image, by fastgen's model and loss."""
    with autocast:
        params = model(x)
    return reconstruction_nll(params, x, "categorical").mean()


def plain_loss(model: nn.Module, plain: nn.Module, x: Tensor, autocast: Any) -> Tensor:
    """Mean nats per image, by the model and the loss in plain PyTorch."""
    with autocast:
        params = plain(x)
    return references.categorical_nll(params, x).mean()


def truth(model: nn.Module, plain: nn.Module, x: Tensor, autocast: Any) -> Tensor:
    """Mean nats per image in plain PyTorch, without autocast: it is called with float64 inputs."""
    return nn.functional.cross_entropy(plain(x), x, reduction="none").flatten(1).sum(1).mean()


def steps(
    size: str,
    op: str,
    shape: str,
    inputs: Callable[..., Any],
    rivals: Rivals,
    fastgen_loss: Callable[..., Tensor],
    **more: Any,
) -> Iterator[Case]:
    """The cases of one model, one for each dtype. `inputs` takes the dtype as a keyword argument."""
    dtypes = {"gpu": [torch.bfloat16], "gpu-full": [torch.float32, torch.bfloat16]}.get(size, [torch.float32])
    providers = {**rivals, "fastgen": fastgen_loss}
    if size.endswith("-full"):
        providers["fastgen, compiled"] = references.compiled(fastgen_loss)
    for dtype in dtypes:
        case_inputs = functools.partial(inputs, dtype=dtype)
        yield Case(op, shape, dtype, case_inputs, providers, modes=("full",), **more)


def cases(size: str, device: torch.device) -> Iterator[Case]:
    for job in JOBS[size]:
        sizes = " ".join(f"{key}={value}" for key, value in job.size.items())
        shape = f"{job.model} {job.data} {'x'.join(map(str, job.shape))} levels={job.levels} B={job.batch} {sizes}"
        inputs, more = functools.partial(_inputs, job=job), {"truth": truth, "given": _few_images, "batch": job.batch}
        # Compiling unrolls the loops of a scan, which takes minutes.
        compiled = "compiled, unrolled" if job.model in SCANS else "compiled"
        rivals: Rivals = {"eager": plain_loss, compiled: references.compiled(plain_loss)}
        yield from steps(size, "training", shape, inputs, rivals, fastgen_loss, **more)
