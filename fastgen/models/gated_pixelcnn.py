"""Gated PixelCNN (van den Oord et al. 2016b, "Conditional Image Generation with PixelCNN Decoders")."""

from functools import partial

from torch import Tensor, nn

from fastgen.models.arguments import check_counts, check_dropout
from fastgen.models.softmax import SoftmaxModel, channels_of, head_of, logits_of_colours
from fastgen.nn import GatedMaskedBlock


class GatedPixelCNN(SoftmaxModel):
    """Gated PixelCNN: a 7x7 gated layer of mask type A, 3x3 gated layers of type B, two 1x1 convolutions and a softmax
    for every colour. Levels (B, C, H, W) -> logits (B, K, C, H, W).

    Args:
        shape: (C, H, W); with C = 3 the colours are ordered R, G, B.
        levels: number of levels K of a channel.
        channels: feature maps of each of the two stacks. If C does not divide them, they are rounded up as in
            `fastgen.models.softmax.channels_of`: 128 become 192 for RGB.
        layers: number of gated layers, including the first.
        n_classes: number of classes of a class-conditional model, None for an unconditional one.
        dropout: dropout probability before the output convolution of every layer.

    Raises:
        ValueError: an argument is not as above.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        levels: int = 256,
        *,
        channels: int = 128,
        layers: int = 10,
        n_classes: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(shape, levels, n_classes)
        check_counts(layers=layers)
        check_dropout(dropout)
        colours = shape[0]
        channels = channels_of(channels, colours, 32)
        self.note_argument("channels", channels)
        layer = partial(GatedMaskedBlock, data_channels=colours, n_classes=n_classes, dropout=dropout)
        rest = (layer(channels, channels) for _ in range(layers - 1))
        self.blocks = nn.ModuleList([layer(colours, channels, 7, mask_type="A"), *rest])
        self.head = head_of(channels, channels, colours, levels)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Levels (B, C, H, W), integers or floats in [-1, 1], and classes (B,) -> logits (B, K, C, H, W)."""
        self.check_condition(condition)
        vertical = horizontal = self.encode(x)
        for block in self.blocks:
            vertical, horizontal = block(vertical, horizontal, condition)
        return logits_of_colours(self.head(horizontal), self.shape[0])
