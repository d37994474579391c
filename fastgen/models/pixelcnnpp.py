"""PixelCNN++ (Salimans et al. 2017): shifted convolutions without masks, three resolutions, a mixture of logistics."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from fastgen.distributions import LogisticMixture
from fastgen.models.arguments import check_counts
from fastgen.models.autoregressive import AutoregressiveModel
from fastgen.nn.gated import ClassBias

RESOLUTIONS = 3


class PixelCNNPP(AutoregressiveModel):
    """Two streams: one sees the rows above a pixel, the other these and the pixels to its left.

    Both go through three resolutions, down by convolutions of stride 2 and up by transposed ones, and every layer on
    the way up sees the layer of its resolution on the way down. The order of the colours is the mixture's own: its
    means of green and blue are linear in the colours before them (equation 3), so that the network sees nothing of the
    pixel that it describes. Images have 256 levels and any size: levels (B, C, H, W) -> parameters
    (B, 10 * n_mix, H, W) for C = 3, (B, 3 * n_mix, H, W) for C = 1, in the order of `fastgen.LogisticMixture`.

    Args:
        shape: (C, H, W), C = 1 or 3.
        channels: feature maps of each stream.
        layers: residual layers of a resolution.
        n_mix: components of the mixture.
        n_classes: number of classes of a class-conditional model, None for an unconditional one.
        dropout: probability, in every residual layer.
        weight_norm: all convolutions keep their weights as a length and a direction, as in the paper.

    Raises:
        ValueError: an argument is not as above.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        channels: int = 160,
        layers: int = 5,
        n_mix: int = 10,
        n_classes: int | None = None,
        dropout: float = 0.5,
        weight_norm: bool = False,
    ) -> None:
        super().__init__(shape, 256, LogisticMixture(n_mix), n_classes)
        if shape[0] not in (1, 3):
            raise ValueError(f"shape must have 1 or 3 channels for a mixture of logistics, got {shape!r}")
        check_counts(channels=channels, layers=layers)
        inputs = shape[0] + 1  # a channel of ones tells the image from the zeros around it
        self.rows_above = ShiftedConv2d(inputs, channels, (2, 3))
        self.row_above = ShiftedConv2d(inputs, channels, (1, 3))
        self.pixels_left = ShiftedConv2d(inputs, channels, (2, 1), leftward=True)

        def layer(skip: bool) -> TwoStreams:
            return TwoStreams(channels, skip, n_classes, dropout)

        steps = range(RESOLUTIONS - 1)
        self.down = nn.ModuleList(nn.ModuleList(layer(False) for _ in range(layers)) for _ in range(RESOLUTIONS))
        self.shrink = nn.ModuleList(Shrink(channels) for _ in steps)
        # The way down leaves one skip a layer, and one for what enters each resolution: the way up uses them all.
        counts = [layers] + [layers + 1 for _ in steps]
        self.up = nn.ModuleList(nn.ModuleList(layer(True) for _ in range(count)) for count in counts)
        self.grow = nn.ModuleList(Grow(channels) for _ in steps)
        self.head = nn.Conv2d(channels, n_mix * (10 if shape[0] == 3 else 3), 1)
        if weight_norm:
            for module in list(self.modules()):
                if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                    parametrizations.weight_norm(module, dim=int(isinstance(module, nn.ConvTranspose2d)))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Levels (B, C, H, W), integers or floats in [-1, 1], and classes (B,) -> the mixture's (B, P, H, W).

        P = 10 * n_mix for RGB and 3 * n_mix for one channel, in the order of `fastgen.LogisticMixture`.
        """
        self.check_condition(condition)
        x = self.encode(x)
        x = torch.cat((x, torch.ones_like(x[:, :1])), 1)
        above = shift_down(self.rows_above(x))
        left = shift_down(self.row_above(x)) + shift_right(self.pixels_left(x))
        skips = [(above, left)]
        for level, stage in enumerate(self.down):
            if level > 0:
                above, left = self.shrink[level - 1](above, left)
                skips.append((above, left))
            for layer in stage.children():
                above, left = layer(above, left, None, condition)
                skips.append((above, left))
        above, left = skips.pop()
        for level, stage in enumerate(self.up):
            if level > 0:
                above, left = self.grow[level - 1](above, left, skips[-1][0].shape[2:])
            for layer in stage.children():
                above, left = layer(above, left, skips.pop(), condition)
        return self.head(F.elu(left))


class TwoStreams(nn.Module):
    """A residual layer of both streams (figure 2). The second sees the first as it is after this layer."""

    def __init__(self, channels: int, skip: bool, n_classes: int | None, dropout: float) -> None:
        super().__init__()
        self.above = GatedResidual(channels, False, channels if skip else 0, n_classes, dropout)
        self.left = GatedResidual(channels, True, 2 * channels if skip else channels, n_classes, dropout)

    def forward(
        self, above: Tensor, left: Tensor, skip: tuple[Tensor, Tensor] | None, condition: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if skip is None:
            above = self.above(above, None, condition)
            return above, self.left(left, above, condition)
        above = self.above(above, skip[0], condition)
        return above, self.left(left, torch.cat((above, skip[1]), 1), condition)


class GatedResidual(nn.Module):
    """x + a * sigmoid(b). Two convolutions compute a and b from x, the skip connection and the other stream."""

    def __init__(self, channels: int, leftward: bool, others: int, n_classes: int | None, dropout: float) -> None:
        super().__init__()
        kernel_size = (2, 2) if leftward else (2, 3)
        self.first = ShiftedConv2d(2 * channels, channels, kernel_size, leftward=leftward)
        self.second = ShiftedConv2d(2 * channels, 2 * channels, kernel_size, leftward=leftward)
        with torch.no_grad():
            self.second.weight.mul_(0.1)  # the layer starts near the identity
        self.others = nn.Conv2d(2 * others, channels, 1) if others else None
        self.condition = None if n_classes is None else ClassBias(n_classes, 2 * channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, others: Tensor | None, condition: Tensor | None) -> Tensor:
        features = self.first(concat_elu(x))
        if self.others is not None and others is not None:
            features = features + self.others(concat_elu(others))
        features = self.second(self.dropout(concat_elu(features)))
        if self.condition is not None:
            features = features + self.condition(condition)
        signal, valve = features.chunk(2, 1)
        return x + signal * valve.sigmoid()


class Shrink(nn.Module):
    """Both streams at half the size, rounded up."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.above = ShiftedConv2d(channels, channels, (2, 3), stride=2)
        self.left = ShiftedConv2d(channels, channels, (2, 2), stride=2, leftward=True)

    def forward(self, above: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
        return self.above(above), self.left(left)


class Grow(nn.Module):
    """Both streams at twice the size, cropped to (H, W). A pixel reaches its own 2x2 block and no earlier one, so the
    order of the pixels is kept."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.above = nn.ConvTranspose2d(channels, channels, (2, 3), 2, padding=(0, 1), output_padding=(0, 1))
        self.left = nn.ConvTranspose2d(channels, channels, 2, 2)

    def forward(self, above: Tensor, left: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        height, width = size
        above, left = self.above(above), self.left(left)
        if above.shape[2:] != (height, width):
            above, left = above[:, :, :height, :width], left[:, :, :height, :width]
        return above, left


class ShiftedConv2d(nn.Conv2d):
    """Each output sees the pixels above it and in its own row: as many to its left as to its right, or, where
    `leftward`, its own column and those to its left."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: tuple[int, int], stride: int = 1, leftward: bool = False
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride)
        height, width = kernel_size
        self.pads = (width - 1, 0, height - 1, 0) if leftward else (width // 2, width // 2, height - 1, 0)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, self.pads) if any(self.pads) else x)


def concat_elu(x: Tensor) -> Tensor:
    return F.elu(torch.cat((x, -x), 1))


def shift_down(x: Tensor) -> Tensor:
    """Moves the rows down by one; the first becomes zeros."""
    return F.pad(x, (0, 0, 1, -1))


def shift_right(x: Tensor) -> Tensor:
    """Moves the columns right by one; the first becomes zeros."""
    return F.pad(x, (1, -1))
