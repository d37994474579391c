"""Training steps without the optimizer, which is the same for all: loss and gradients of a batch.

The rivals hold the same parameters in plain PyTorch. On a GPU bfloat16 means autocast.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import references
from benchmarks.case import Case, Rivals
from fastgen.models import GatedPixelCNN, PixelCNN, PixelRNN
from fastgen.ops import reconstruction_nll

Shape = tuple[int, int, int]
DIGITS, MNIST, CIFAR = (1, 8, 8), (1, 28, 28), (3, 32, 32)
# Name, images, levels, batch, the model, the kernels it runs.
Job = tuple[str, Shape, int, int, Callable[..., nn.Module], dict[str, int], tuple[str, ...]]
CONVOLUTIONS = ("masked_conv2d", "reconstruction_nll")
SCANS = {"diagonal_bilstm": ("diagonal_lstm", *CONVOLUTIONS), "row_lstm": ("row_lstm", *CONVOLUTIONS)}


def _jobs(batch: dict[Shape, int], levels: dict[Shape, int], channels: int, layers: int) -> list[Job]:
    size = {"channels": channels, "layers": layers}
    return [
        (name, shape, levels[shape], batch[shape], model, size, CONVOLUTIONS)
        for shape in batch
        for name, model in (("PixelCNN", PixelCNN), ("GatedPixelCNN", GatedPixelCNN))
    ]


def _scans(shape: Shape, levels: int, batch: int, hidden_channels: int, layers: int) -> list[Job]:
    """PixelRNN of both kinds: of 7 layers of 16 units and two levels, the paper's for MNIST."""
    size = {"hidden_channels": hidden_channels, "layers": layers}
    return [
        (f"PixelRNN {kind}", shape, levels, batch, functools.partial(PixelRNN, kind=kind), size, kernels)
        for kind, kernels in SCANS.items()
    ]


LEVELS = {DIGITS: 17, CIFAR: 256}
JOBS: dict[str, list[Job]] = {
    "toy": _jobs({(1, 3, 4): 2}, {(1, 3, 4): 3}, 4, 1) + _scans((1, 3, 4), 3, 2, 4, 1),
    "cpu": _jobs({DIGITS: 64}, LEVELS, 32, 3),
    "cpu-full": _jobs({DIGITS: 64, CIFAR: 4}, LEVELS, 48, 6) + _scans(DIGITS, 17, 64, 16, 3),
    "gpu": _jobs({DIGITS: 256, CIFAR: 32}, LEVELS, 128, 10) + _scans(MNIST, 2, 16, 16, 7),
    "gpu-full": _jobs({DIGITS: 256, CIFAR: 128}, LEVELS, 128, 15) + _scans(MNIST, 2, 64, 16, 7),
}


def images(device: torch.device, shape: Shape, levels: int, batch: int) -> Tensor:
    """Handwritten digits, or random levels in other shapes: the time of a step does not depend on them."""
    if shape != DIGITS:
        return torch.randint(levels, (batch, *shape), device=device)
    from sklearn.datasets import load_digits

    return torch.from_numpy(load_digits().images[:batch]).long().unsqueeze(1).to(device)


def _inputs(device: torch.device, job: Job, dtype: torch.dtype) -> dict[str, Any]:
    _, shape, levels, batch, build, size, _ = job
    model = build(shape, levels, **size).to(device)
    if device.type == "cuda":
        for parameter in model.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    return {
        "model": model,
        "plain": references.plain(model),
        "x": images(device, shape, levels, batch),
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
        name, shape, levels, batch, _, of_model, kernels = job
        sizes = " ".join(f"{key}={value}" for key, value in of_model.items())
        for dtype in dtypes:
            providers: Rivals = {"eager": plain_loss}
            if size != "toy":
                providers["compiled"] = references.compiled(plain_loss)
            providers["fastgen"] = fastgen_loss
            if size.endswith("-full"):
                providers["fastgen, compiled"] = references.compiled(fastgen_loss)
            image = "x".join(map(str, shape))
            found.append(
                Case(
                    op="training",
                    shape=f"{name} {image} levels={levels} B={batch} {sizes}",
                    dtype=dtype,
                    inputs=functools.partial(_inputs, job=job, dtype=dtype),
                    providers=providers,
                    truth=truth,
                    kernels=kernels,
                    modes=("full",),
                    given=_few_images,
                    batch=batch,
                )
            )
    return found
