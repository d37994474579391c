"""Nats of a softmax over 256 levels of three colours, from the features before the last 1x1 convolution, summed over
the images as in a training step. The point is the memory that it saves."""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.cases import references
from benchmarks.harness.case import Case, Rivals
from fastgen.ops import linear_cross_entropy
from fastgen.ops.linear_cross_entropy import linear_cross_entropy_reference

# Shape (B, F, H, W) of the features, number of levels.
Size = tuple[tuple[int, int, int, int], int]
SIZES: dict[str, list[Size]] = {
    "toy": [((2, 5, 3, 4), 7)],
    "cpu": [((16, 128, 32, 32), 256)],
    "cpu-full": [((16, 128, 32, 32), 256)],
    "gpu": [((64, 128, 32, 32), 256), ((64, 1024, 32, 32), 256)],
    "gpu-full": [((64, 128, 32, 32), 256), ((64, 1024, 32, 32), 256), ((64, 128, 64, 64), 256)],
}


def _inputs(device: torch.device, features: tuple[int, int, int, int], levels: int) -> dict[str, Tensor]:
    batch, width, *image = features
    x = torch.randn(features, device=device).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(3 * levels, width, device=device) / width**0.5
    return {
        "features": x.requires_grad_(),
        "weight": weight.requires_grad_(),
        "target": torch.randint(levels, (batch, 3, *image), device=device),
        "bias": torch.zeros(3 * levels, device=device).requires_grad_(),
    }


def summed(nats: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The sum over the images of a function that returns nats (B,)."""

    def total(features: Tensor, weight: Tensor, target: Tensor, bias: Tensor) -> Tensor:
        return nats(features, weight, target, bias).sum()

    return total


def cases(size: str, device: torch.device) -> Iterator[Case]:
    for features, levels in SIZES[size]:
        eager = summed(references.convolution_cross_entropy)
        providers: Rivals = {"eager": eager, "compiled": references.compiled(eager)}
        if hasattr(F, "linear_cross_entropy") and hasattr(nn, "LinearCrossEntropyOptions"):  # since torch 2.13
            torch_function = references.linear_cross_entropy_torch
            providers["F.linear_cross_entropy"] = summed(torch_function)
            providers["F.linear_cross_entropy, chunked"] = summed(functools.partial(torch_function, chunked=True))
        operation = functools.partial(linear_cross_entropy, positions=5 if size == "toy" else 8192)
        providers["fastgen"] = summed(operation)
        positions = features[0] * features[2] * features[3]
        multiply_adds = positions * features[1] * 3 * levels
        yield Case(
            op="linear_cross_entropy",
            shape=f"{'x'.join(map(str, features))} to 3x{levels}",
            dtype=torch.float32,
            inputs=functools.partial(_inputs, features=features, levels=levels),
            providers=providers,
            truth=summed(linear_cross_entropy_reference),
            flops=(2 * multiply_adds, 4 * multiply_adds),
            batch=features[0],
        )
