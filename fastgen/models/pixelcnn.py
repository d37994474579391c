"""PixelCNN (van den Oord et al. 2016, "Pixel Recurrent Neural Networks", section 3.5 and table 1)."""

from torch import Tensor, nn

from fastgen.distributions import Categorical
from fastgen.models.autoregressive import AutoregressiveModel
from fastgen.nn import MaskedConv2d
from fastgen.nn.gated import ClassBias


class PixelCNN(AutoregressiveModel):
    """A 7x7 convolution of mask type A, residual blocks of type B, two 1x1 layers, a softmax for every colour: levels
    (B, C, H, W) -> logits (B, K, C, H, W).

    Args:
        shape: (C, H, W); with C = 3 the colours are ordered R, G, B.
        levels: number of levels of a channel.
        channels: h, feature maps of the 3x3 convolutions; the residual stream has 2h. Rounded as in `channels_of`.
        layers: number of residual blocks.
        n_classes: number of classes of a class-conditional model, None for an unconditional one.

    Raises:
        ValueError: an argument is not as above.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        levels: int = 256,
        *,
        channels: int = 128,
        layers: int = 15,
        n_classes: int | None = None,
    ) -> None:
        super().__init__(shape, levels, Categorical(levels, layout="BKCHW"), n_classes)
        if not isinstance(layers, int) or layers < 0:
            raise ValueError(f"layers must be an int >= 0, got {layers!r}")
        colours = shape[0]
        h = channels_of(channels, colours, 32)
        self.note_argument("channels", h)
        self.input = MaskedConv2d(colours, 2 * h, 7, padding=3, mask_type="A", data_channels=colours)
        self.blocks = nn.ModuleList(ResidualBlock(h, colours, n_classes) for _ in range(layers))
        self.head = nn.Sequential(
            nn.ReLU(),
            MaskedConv2d(2 * h, 2 * h, 1, mask_type="B", data_channels=colours, activation="relu"),
            MaskedConv2d(2 * h, colours * levels, 1, mask_type="B", data_channels=colours),
        )

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Levels (B, C, H, W), integers or floats in [-1, 1], and classes (B,) -> logits (B, K, C, H, W)."""
        self.check_condition(condition)
        features = self.input(self.encode(x))
        for block in self.blocks:
            features = block(features, condition)
        return logits_of_colours(self.head(features), self.shape[0])


class ResidualBlock(nn.Module):
    """Figure 5 (left): 2h features -> 1x1 -> h -> 3x3 -> h -> 1x1 -> 2h, added to the input."""

    def __init__(self, h: int, colours: int, n_classes: int | None) -> None:
        super().__init__()
        self.reduce = MaskedConv2d(2 * h, h, 1, mask_type="B", data_channels=colours, activation="relu")
        self.look = MaskedConv2d(h, h, 3, padding=1, mask_type="B", data_channels=colours, activation="relu")
        self.expand = MaskedConv2d(h, 2 * h, 1, mask_type="B", data_channels=colours)
        self.condition = None if n_classes is None else ClassBias(n_classes, h)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        own = None if self.condition is None else self.condition(condition).flatten(1)
        return self.expand(self.look(self.reduce(x.relu()), condition=own), residual=x)


def channels_of(channels: int, colours: int, unit: int = 1) -> int:
    """The number of feature maps that is built: every colour gets an equal share of them.

    `channels` itself if it is a multiple of the colours. Otherwise the share is rounded up, and, where it is more than
    half a `unit`, up to a multiple of `unit`, so that it fills the kernels' blocks: with three colours and units of 32,
    128 becomes 192 (64 a colour), which takes a kernel no longer than 129 would.

    Raises:
        ValueError: channels is no int >= 1.
    """
    if not isinstance(channels, int) or channels < 1:
        raise ValueError(f"channels must be an int >= 1, got {channels!r}")
    if channels % colours == 0:
        return channels
    share = -(-channels // colours)
    return colours * (-(-share // unit) * unit if 2 * share > unit else share)


def logits_of_colours(features: Tensor, colours: int) -> Tensor:
    """(B, C*K, H, W), the colours' groups one after the other, as (B, K, C, H, W): a view."""
    return features.unflatten(1, (colours, -1)).transpose(1, 2)
