"""Training steps without the optimizer, which is the same for all: loss and gradients of a batch.

The rivals hold the same parameters in plain PyTorch. On a GPU bfloat16 means autocast.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import references
from benchmarks.case import Case, Rivals
from benchmarks.images import AVAILABLE, LEVELS, SHAPES, Shape, images
from fastgen.models import GatedPixelCNN, PixelCNN, PixelRNN
from fastgen.ops import reconstruction_nll

CONVOLUTIONS = ("masked_conv2d", "reconstruction_nll")


@dataclass(frozen=True)
class SampleRequest:
    """A model of some size, on a batch of images; and the kernels that it runs."""

    name: str
    build: Callable[..., nn.Module]
    size: dict[str, int]
    kernels: tuple[str, ...]
    data: str
    shape: Shape
    levels: int
    batch: int


def _convolutions(data: str, batch: int, channels: int, layers: int) -> list[SampleRequest]:
    size = {"channels": channels, "layers": layers}
    models = (("GatedPixelCNN", GatedPixelCNN), ("PixelCNN", PixelCNN))
    return [
        SampleRequest(name, model, size, CONVOLUTIONS, data, SHAPES[data], LEVELS[data], batch)
        for name, model in models
        if data in AVAILABLE
    ]


def _scans(data: str, batch: int, hidden_channels: int, layers: int) -> list[SampleRequest]:
    """PixelRNN of both kinds."""
    size = {"hidden_channels": hidden_channels, "layers": layers}
    return [
        SampleRequest(
            f"PixelRNN {kind}",
            functools.partial(PixelRNN, kind=kind),
            size,
            (scan, *CONVOLUTIONS),
            data,
            SHAPES[data],
            LEVELS[data],
            batch,
        )
        for kind, scan in (("diagonal_bilstm", "diagonal_lstm"), ("row_lstm", "row_lstm"))
        if data in AVAILABLE
    ]


def _mnist(batch: int) -> list[SampleRequest]:
    """PixelRNN with the 7 layers of 16 units that the paper has for binarized MNIST, on random images of that shape."""
    return [replace(job, shape=(1, 28, 28), levels=2) for job in _scans("random", batch, 16, 7)]


def _toy() -> list[SampleRequest]:
    jobs = _convolutions("random", 2, 4, 1) + _scans("random", 2, 4, 1)
    return [replace(job, shape=(1, 3, 4), levels=3) for job in jobs]


JOBS: dict[str, list[SampleRequest]] = {
    "toy": _toy(),
    "cpu": _convolutions("digits", 64, 32, 3) + _convolutions("patches", 2, 32, 3) + _convolutions("random", 2, 32, 3),
    "cpu-full": [
        *(
            job
            for data, batch in (("digits", 64), ("patches", 4), ("random", 4))
            for job in _convolutions(data, batch, 48, 6)
        ),
        *_scans("digits", 64, 16, 3),
        *(job for data in ("patches", "random") for job in _scans(data, 2, 12, 1)),
    ],
    "gpu": [
        *_convolutions("digits", 256, 128, 10),
        *_mnist(16),
        *_scans("digits", 64, 16, 7),
        *(job for data in ("patches", "random") for job in _convolutions(data, 32, 128, 10)),
        *(job for data in ("patches", "random") for job in _scans(data, 16, 48, 7)),
    ],
    "gpu-full": [
        *_convolutions("digits", 256, 128, 15),
        *_mnist(64),
        *_scans("digits", 256, 16, 7),
        *(job for data in ("patches", "random") for job in _convolutions(data, 128, 128, 15)),
        *(job for data in ("patches", "random") for job in _scans(data, 64, 96, 7)),
    ],
}


def _inputs(device: torch.device, job: SampleRequest, dtype: torch.dtype) -> dict[str, Any]:
    model = job.build(job.shape, job.levels, **job.size).to(device)
    if device.type == "cuda":
        for parameter in model.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    return {
        "model": model,
        "plain": references.plain(model),
        "x": images(job.data, job.shape, job.levels, job.batch, device).long(),
        "autocast": autocast,
    }


def _few_images(inputs: dict[str, Any]) -> dict[str, Any]:
    """For the comparison: float64 takes twice the memory."""
    x = inputs["x"]
    return {"x": x if x.numel() <= 2**17 else x[:2]}


def fastgen_loss(model: nn.Module, plain: nn.Module, x: Tensor, autocast: Any) -> Tensor:
    """Mean nats an image."""
    with autocast:
        params = model(x)
    return reconstruction_nll(params, x, "categorical").mean()


def plain_loss(model: nn.Module, plain: nn.Module, x: Tensor, autocast: Any) -> Tensor:
    with autocast:
        params = plain(x)
    return references.categorical_nll(params, x).mean()


def truth(model: nn.Module, plain: nn.Module, x: Tensor, autocast: Any) -> Tensor:
    """In float64, so without autocast."""
    return nn.functional.cross_entropy(plain(x), x, reduction="none").flatten(1).sum(1).mean()


def cases(size: str, device: torch.device) -> list[Case]:
    dtypes = {"gpu": [torch.bfloat16], "gpu-full": [torch.float32, torch.bfloat16]}.get(size, [torch.float32])
    found = []
    for job in JOBS[size]:
        sizes = " ".join(f"{key}={value}" for key, value in job.size.items())
        image = "x".join(map(str, job.shape))
        for dtype in dtypes:
            providers: Rivals = {"eager": plain_loss}
            if size != "toy":
                providers["compiled"] = references.compiled(plain_loss)
            providers["fastgen"] = fastgen_loss
            if size.endswith("-full"):
                providers["fastgen, compiled"] = references.compiled(fastgen_loss)
            found.append(
                Case(
                    op="training",
                    shape=f"{job.name} {job.data} {image} levels={job.levels} B={job.batch} {sizes}",
                    dtype=dtype,
                    inputs=functools.partial(_inputs, job=job, dtype=dtype),
                    providers=providers,
                    truth=truth,
                    kernels=job.kernels,
                    modes=("full",),
                    given=_few_images,
                    batch=job.batch,
                )
            )
    return found
