"""PixelCNN++ (Salimans et al. 2017, "PixelCNN++: Improving the PixelCNN with Discretized Logistic Mixture Likelihood
and Other Modifications")."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from fastgen.distributions import LogisticMixture
from fastgen.models.arguments import check_counts, check_dropout
from fastgen.models.autoregressive import AutoregressiveModel
from fastgen.nn.gated import ClassBias

RESOLUTIONS = 3


class PixelCNNPP(AutoregressiveModel):
    """PixelCNN++: shifted convolutions instead of masks, three resolutions, a mixture of logistics with 256 levels.
    Levels (B, C, H, W) -> parameters (B, 10 * n_mix, H, W) for C = 3 and (B, 3 * n_mix, H, W) for C = 1, in the order
    of `fastgen.LogisticMixture`.

    There are two streams: one sees the rows above a pixel, the other also the pixels to its left. Convolutions of
    stride 2 take both streams down to the two lower resolutions, transposed convolutions back up; each layer on the way
    up also sees a layer of the same resolution on the way down. The network sees nothing of the pixel that it
    describes. The mixture orders the colours: the means of green and blue are linear in the colours before them
    (equation 3).

    Args:
        shape: (C, H, W), any height and width; C = 1 or 3.
        channels: feature maps of each stream.
        layers: number of residual layers at each resolution.
        n_mix: number of components of the mixture.
        n_classes: number of classes of a class-conditional model, None for an unconditional one.
        dropout: dropout probability in every residual layer.
        weight_norm: True applies weight normalization to all convolutions, as in the paper.

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
        check_dropout(dropout)
        inputs = shape[0] + 1  # forward adds a channel of ones, which distinguishes the image from its padding
        self.rows_above = ShiftedConv2d(inputs, channels, (2, 3))
        self.row_above = ShiftedConv2d(inputs, channels, (1, 3))
        self.pixels_left = ShiftedConv2d(inputs, channels, (2, 1), leftward=True)

        def layer(skip: bool) -> TwoStreams:
            return TwoStreams(channels, skip, n_classes, dropout)

        steps = range(RESOLUTIONS - 1)
        self.down = nn.ModuleList(nn.ModuleList(layer(False) for _ in range(layers)) for _ in range(RESOLUTIONS))
        self.shrink = nn.ModuleList(Shrink(channels) for _ in steps)
        # The way down leaves one skip connection for each layer and one for the input of each resolution. The way up
        # uses all of them.
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
    """A residual layer of both streams (figure 2). The second stream sees the first as it is after this layer.

    Args:
        channels: feature maps of each stream.
        skip: whether the layer gets a skip connection: it is on the way up.
    """

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
    """x + a * sigmoid(b). Two convolutions compute a and b from x and from `others`, the skip connection and the other
    stream.

    Args:
        channels: feature maps of x.
        leftward: whether this is the second stream, which also sees the pixels to the left.
        others: feature maps of `others`; 0 if there are none.
    """

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
    """Halves the height and width of both streams, rounded up."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.above = ShiftedConv2d(channels, channels, (2, 3), stride=2)
        self.left = ShiftedConv2d(channels, channels, (2, 2), stride=2, leftward=True)

    def forward(self, above: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
        return self.above(above), self.left(left)


class Grow(nn.Module):
    """Doubles the height and width of both streams and crops them to `size` (H, W). A pixel influences its own 2x2
    block and later ones, so that the order of the pixels is kept."""

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
    """A convolution whose outputs see no row below their own. In columns the kernel is centred; with `leftward` it ends
    at the output's own column."""

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
    """Moves the rows down by one; the first row becomes zeros."""
    return F.pad(x, (0, 0, 1, -1))


def shift_right(x: Tensor) -> Tensor:
    """Moves the columns right by one; the first column becomes zeros."""
    return F.pad(x, (1, -1))
