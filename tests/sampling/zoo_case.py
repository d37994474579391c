"""What the models of the zoo share: how one is registered and built, masks in a stranger's style."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    shape: tuple[int, int, int]
    distribution: Any
    encode: Callable[[torch.Tensor], torch.Tensor] | None = None
    condition: Callable[[int], Any] | None = None
    convolutional: bool = False  # whether the promise of work_ratio <= 1.05 is made for it

    def arguments(self, n):
        return {
            "distribution": self.distribution,
            "encode": self.encode,
            "condition": None if self.condition is None else self.condition(n),
        }


CASES: dict[str, Case] = {}


def case(shape, distribution, **options):
    def add(make):
        CASES[make.__name__] = Case(make, shape, distribution, **options)
        return make

    return add


def built(name, n):
    """The model in eval mode with lively weights: from default ones a deep network's output is nearly constant."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    this = CASES[name]
    model = this.make().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1 and "original1" not in key:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (2 / fan_in**0.5))
            elif "bias" in key:
                parameter.normal_(0, 0.3, generator=generator)
    return model, this.shape, this.arguments(n)


def by_class(n):
    return torch.arange(n) % 3


def as_float(x):
    return x.float()


def as_tokens(x):
    return x.squeeze(1)


def raster_mask(size, hides_centre):
    """(k, k), 1 where a kernel may look."""
    height, width = (size, size) if isinstance(size, int) else size
    mask = torch.zeros(height, width)
    mask[: height // 2] = 1
    mask[height // 2, : width // 2 + (not hides_centre)] = 1
    return mask


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class DataMask(nn.Conv2d):
    """Multiplies its own weight by the mask in every forward pass. `colour(channel)` orders colours at the centre."""

    def __init__(self, inputs, outputs, size, hides_centre=False, colour=None, **options):
        super().__init__(inputs, outputs, size, padding=size // 2 * options.get("dilation", 1), **options)
        mask = raster_mask(size, hides_centre).expand_as(self.weight).clone()
        if colour is not None:
            of_input = torch.tensor([colour(i, inputs) for i in range(inputs)])
            of_output = torch.tensor([colour(o, outputs) for o in range(outputs)]).unsqueeze(1)
            sees = of_input < of_output if hides_centre else of_input <= of_output
            mask[:, :, size // 2, size // 2] = sees.float()
        self.register_buffer("mask", mask)

    def forward(self, x):
        self.weight.data *= self.mask
        return super().forward(x)


def contiguous(channel, count):
    return channel * 3 // count


def interleaved(channel, count):
    return channel % 3


class PerPixelNorm(nn.LayerNorm):
    """Each pixel's channels, in `groups` groups, on their own."""

    def __init__(self, channels, groups):
        super().__init__(channels // groups)
        self.groups = groups

    def forward(self, x):
        x = x.permute(0, 2, 3, 1)
        return super().forward(x.unflatten(-1, (self.groups, -1))).flatten(-2).permute(0, 3, 1, 2)
