"""A softmax's nats from the features before a 1x1 convolution to 256 levels of three colours; watch the memory."""

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import references
from benchmarks.case import Case, Rivals
from fastgen.ops import linear_cross_entropy
from fastgen.ops.linear_cross_entropy import linear_cross_entropy_reference

# (B, F, H, W) features, levels.
Size = tuple[tuple[int, int, int, int], int]
SIZES: dict[str, list[Size]] = {
    "toy": [((2, 5, 3, 4), 7)],
    "cpu": [((16, 128, 32, 32), 256)],
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


def convolution(features: Tensor, weight: Tensor, target: Tensor, bias: Tensor) -> Tensor:
    """A 1x1 convolution and F.cross_entropy on the classes' dim."""
    logits = F.conv2d(features, weight[:, :, None, None], bias).unflatten(1, (3, -1)).transpose(1, 2)
    return references.categorical_nll(logits, target)


def torch_whole(features: Tensor, weight: Tensor, target: Tensor, bias: Tensor) -> Tensor:
    """F.linear_cross_entropy as it is by default, with the three colours as further dimensions of the weight."""
    rows = features.movedim(1, -1).flatten(0, -2)
    by_level = (tensor.unflatten(0, (3, -1)).transpose(0, 1) for tensor in (weight, bias))
    weights, biases = by_level
    levels = target.movedim(1, -1).flatten(0, -2)
    nats = F.linear_cross_entropy(rows, weights, levels, linear_bias=biases, reduction="none")
    return nats.view(len(features), -1).sum(1)


def cases(size: str, device: torch.device) -> list[Case]:
    found = []
    for features, levels in SIZES.get(size, SIZES[size.removesuffix("-full")]):
        providers: Rivals = {"eager": convolution}
        if size != "toy":
            providers["compiled"] = references.compiled(convolution)
        if hasattr(F, "linear_cross_entropy"):
            providers["F.linear_cross_entropy"] = torch_whole
        providers["fastgen"] = functools.partial(linear_cross_entropy, positions=5 if size == "toy" else 8192)
        positions = features[0] * features[2] * features[3]
        multiply_adds = positions * features[1] * 3 * levels
        found.append(
            Case(
                op="linear_cross_entropy",
                shape=f"{'x'.join(map(str, features))} to 3x{levels}",
                dtype=torch.float32,
                inputs=functools.partial(_inputs, features=features, levels=levels),
                providers=providers,
                truth=linear_cross_entropy_reference,
                flops={"fwd": 2 * multiply_adds, "bwd": 4 * multiply_adds, "full": 6 * multiply_adds},
                batch=features[0],
            )
        )
    return found
