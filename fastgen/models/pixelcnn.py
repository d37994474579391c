"""PixelCNN (van den Oord et al. 2016, "Pixel Recurrent Neural Networks", section 3.5 and table 1)."""

from torch import Tensor, nn

from fastgen.models.arguments import check_counts
from fastgen.models.softmax import SoftmaxModel, channels_of, head_of
from fastgen.nn import MaskedConv2d
from fastgen.nn.gated import ClassBias


class PixelCNN(SoftmaxModel):
    """PixelCNN: a 7x7 convolution of mask type A, residual blocks of type B, two 1x1 convolutions and a softmax for
    every colour. Levels (B, C, H, W) -> logits (B, K, C, H, W).

    Args:
        shape: (C, H, W); with C = 3 the colours are ordered R, G, B.
        levels: number of levels K of a channel.
        channels: feature maps h of the 3x3 convolutions; the residual stream has 2h. If C does not divide them, they
            are rounded up as in `fastgen.models.softmax.channels_of`: 128 become 192 for RGB.
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
        super().__init__(shape, levels, n_classes)
        check_counts(0, layers=layers)
        colours = shape[0]
        h = channels_of(channels, colours, 32)
        self.note_argument("channels", h)
        self.input = MaskedConv2d(colours, 2 * h, 7, padding=3, mask_type="A", data_channels=colours)
        self.blocks = nn.ModuleList(ResidualBlock(h, colours, n_classes) for _ in range(layers))
        self.head = head_of(2 * h, 2 * h, colours, levels)


class ResidualBlock(nn.Module):
    """Figure 5 (left) of the paper: 2h features -> 1x1 -> h -> 3x3 -> h -> 1x1 -> 2h, added to the input."""

    def __init__(self, h: int, colours: int, n_classes: int | None) -> None:
        super().__init__()
        self.reduce = MaskedConv2d(2 * h, h, 1, mask_type="B", data_channels=colours, activation="relu")
        self.look = MaskedConv2d(h, h, 3, padding=1, mask_type="B", data_channels=colours, activation="relu")
        self.expand = MaskedConv2d(h, 2 * h, 1, mask_type="B", data_channels=colours)
        self.condition = None if n_classes is None else ClassBias(n_classes, h)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        bias = None if self.condition is None else self.condition(condition).flatten(1)
        return self.expand(self.look(self.reduce(x.relu()), condition=bias), residual=x)
