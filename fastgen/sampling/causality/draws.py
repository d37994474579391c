"""Which draws an image takes, in which order, and which outputs of the model each of them reads: `Draws`.

An image (1, 2, 2) in raster order has four draws. Their draw index, by pixel, is

    0 1
    2 3

and a model is causal in this order where every output depends only on levels of a lower draw index than its own. With
three channels a draw may be a whole pixel, all channels at once, or one channel of a pixel.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgen.distributions import Bernoulli, Categorical, Distribution, LogisticMixture

Order = list[
    tuple[int, int, int]
]  # (channel, row, column) of each draw; channel 0 where all channels are drawn at once


def raster(shape: Sequence[int], channels_ordered: bool) -> Order:
    """(channel, row, column) in raster order; all channels of a pixel at once, called channel 0, where not ordered."""
    channels = range(shape[0]) if channels_ordered else (0,)
    return [(c, i, j) for i in range(shape[1]) for j in range(shape[2]) for c in channels]


def draw_index_of(order: Order, shape: Sequence[int]) -> Tensor:
    """Draw index of every level, (1, C, H, W) int32."""
    draw_index = torch.full((1, *shape), -1, dtype=torch.int32)
    index = torch.tensor(order)
    numbers = torch.arange(len(order), dtype=torch.int32)
    if len(order) == shape[1] * shape[2]:
        draw_index[0, :, index[:, 1], index[:, 2]] = numbers
    else:
        draw_index[0, index[:, 0], index[:, 1], index[:, 2]] = numbers
    return draw_index


@dataclass(frozen=True, eq=False)
class Draws:
    """The draws of an image and what they read.

    Attributes:
        order: the draws, first to last.
        channel_of: for each parameter of a pixel, in the output's shape (1, ...) without the pixels, the first channel
            whose draw reads it.
        shape: (C, H, W).
    """

    order: Order
    channel_of: Tensor
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.order)

    def reordered(self, numbers: Tensor) -> "Draws":
        return Draws([self.order[k] for k in numbers.tolist()], self.channel_of, self.shape)

    def of_levels(self) -> Tensor:
        """Draw index of every level, (1, C, H, W) int32."""
        return draw_index_of(self.order, self.shape)

    def of_outputs(self) -> Tensor:
        """Draw index at which each output element is needed first, of the output's shape (1, ..., H, W)."""
        return self.of_levels()[0][self.channel_of.reshape(-1)].view(1, *self.channel_of.shape[1:], *self.shape[1:])

    def latest_of(self, ready: Tensor) -> Tensor:
        """For each draw, in order, the greatest ready time of what it reads, (draws,)."""
        found = torch.full((len(self),), -2, dtype=torch.long)
        return found.scatter_reduce(0, self.of_outputs().reshape(-1).long(), ready.reshape(-1).long(), "amax")


def raster_variants(draws: Draws) -> list[Tensor]:
    """Raster orders from the other corners and along columns, as numbers of draws: what a model flips or transposes
    before it reads."""
    _, height, width = draws.shape
    channel, i, j = torch.tensor(draws.order).unbind(1)
    found = []
    for row in (i, height - 1 - i):
        for column in (j, width - 1 - j):
            found.append(((row * width + column) * draws.shape[0] + channel).argsort())
            found.append(((column * height + row) * draws.shape[0] + channel).argsort())
    return found[1:]


def possible_draws(shape: Sequence[int], channel_layouts: Sequence[Tensor], params: tuple[int, ...]) -> list[Draws]:
    """Whole pixels in raster order; where there are several channels, for each layout also channel by channel.

    Args:
        channel_layouts: `Draws.channel_of` of each.
        params: shape of a pixel's parameters, (1, ...).
    """
    shape = tuple(shape)
    found = [Draws(raster(shape, False), torch.zeros(params, dtype=torch.long), shape)]
    if shape[0] > 1:
        order = raster(shape, True)
        found += [Draws(order, layout, shape) for layout in channel_layouts]
    return found


def layouts_of(distribution: Distribution, params: tuple[int, ...], channels: int) -> list[Tensor]:
    """For each parameter of a pixel the channel that it belongs to; several ways where that is not known, since the
    model's own pass has the last word; none for a mixture, whose parameters belong to all channels."""
    numbers = torch.arange(torch.Size(params[1:]).numel(), dtype=torch.float64).view(1, *params[1:])
    found = torch.zeros(numbers.numel(), dtype=torch.long)
    if isinstance(distribution, Categorical):
        for channel, of_channel in enumerate(distribution.logits(numbers)[0].unbind(1)):
            found[of_channel.long().flatten()] = channel
    elif isinstance(distribution, Bernoulli):
        found = numbers[0].long().flatten() // max(1, numbers.numel() // channels)
    elif isinstance(distribution, LogisticMixture):
        return []
    else:
        return possible_layouts(params, channels)
    return [found.view(1, *params[1:])]


def possible_layouts(shape: Sequence[int], channels: int) -> list[Tensor]:
    """Ways in which the parameters of a pixel, of this shape, may belong to channels: of its shape, int64."""
    if channels == 1:
        return [torch.zeros(tuple(shape), dtype=torch.long)]
    found = []
    numbers = torch.arange(channels)
    for d, size in enumerate(shape):
        if size == channels and d > 0:
            found.append(numbers.view([-1 if k == d else 1 for k in range(len(shape))]).expand(tuple(shape)))
    if not found and len(shape) > 1 and shape[1] % channels == 0:
        tail = [1] * (len(shape) - 2)
        for axis in (numbers.repeat_interleave(shape[1] // channels), numbers.repeat(shape[1] // channels)):
            found.append(axis.view(1, -1, *tail).expand(tuple(shape)))
    return found or [torch.zeros(tuple(shape), dtype=torch.long)]
