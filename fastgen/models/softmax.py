"""The base class of the models that end in a softmax for every colour: PixelCNN, Gated PixelCNN, PixelRNN."""

from torch import Tensor, nn

from fastgen.distributions import Categorical
from fastgen.models.arguments import check_counts
from fastgen.models.autoregressive import AutoregressiveModel
from fastgen.nn import MaskedConv2d


class SoftmaxModel(AutoregressiveModel):
    """Base class. A subclass sets `input`, which maps the image to feature maps, `blocks`, which transform these, and
    `head`, which maps them to logits.

    Args:
        shape: (C, H, W); with C = 3 the colours are ordered R, G, B.
        levels: number of levels K of a channel.
        n_classes: number of classes of a class-conditional model, None for an unconditional one.
    """

    input: nn.Module
    blocks: nn.ModuleList  # (features, condition) -> features
    head: nn.Module

    def __init__(self, shape: tuple[int, int, int], levels: int, n_classes: int | None) -> None:
        check_counts(2, levels=levels)
        super().__init__(shape, levels, Categorical(levels, layout="BKCHW"), n_classes)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Levels (B, C, H, W), integers or floats in [-1, 1], and classes (B,) -> logits (B, K, C, H, W)."""
        self.check_condition(condition)
        features = self.input(self.encode(x))
        for block in self.blocks:
            features = block(features, condition)
        return logits_of_colours(self.head(features), self.shape[0])


def head_of(channels: int, hidden: int, colours: int, levels: int) -> nn.Sequential:
    """The last two 1x1 layers: features (B, channels, H, W) -> (B, C*K, H, W)."""
    return nn.Sequential(
        nn.ReLU(),
        MaskedConv2d(channels, hidden, 1, mask_type="B", data_channels=colours, activation="relu"),
        MaskedConv2d(hidden, colours * levels, 1, mask_type="B", data_channels=colours),
    )


def channels_of(channels: int, colours: int, unit: int = 1) -> int:
    """Rounds a number of feature maps up so that every colour gets an equal share.

    A multiple of the number of colours stays as it is. Otherwise the share of a colour is rounded up to an integer, and
    if that is more than half a `unit`, to a multiple of `unit`, the width of the kernels' blocks. For 3 colours and a
    unit of 32, 128 becomes 192 (64 per colour), which takes a kernel no longer than 129.

    Raises:
        ValueError: channels is not an int >= 1.
    """
    check_counts(channels=channels)
    if channels % colours == 0:
        return channels
    share = -(-channels // colours)
    return colours * (-(-share // unit) * unit if 2 * share > unit else share)


def logits_of_colours(features: Tensor, colours: int) -> Tensor:
    """Views features (B, C*K, H, W), the K logits of each colour one after the other, as (B, K, C, H, W)."""
    return features.unflatten(1, (colours, -1)).transpose(1, 2)
