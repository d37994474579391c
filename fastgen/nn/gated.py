"""One layer of the Gated PixelCNN, which has a vertical and a horizontal stack of feature maps."""

import torch
from torch import Tensor, nn

from fastgen.nn.masked_conv import MaskedConv2d
from fastgen.ops import causal_mask
from fastgen.ops.masked_conv2d import fused, gate, runs_triton, under_autocast


class ClassBias(nn.Embedding):
    """A bias for every class and channel: classes (B,) -> (B, channels, 1, 1). Starts from N(0, 0.1^2).

    Raises:
        ValueError: n_classes is no int >= 1.
    """

    def __init__(self, n_classes: int, channels: int) -> None:
        if not isinstance(n_classes, int) or n_classes < 1:
            raise ValueError(f"n_classes must be an int >= 1 or None, got {n_classes!r}")
        super().__init__(n_classes, channels)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.1)

    def forward(self, condition: Tensor) -> Tensor:
        return super().forward(condition)[:, :, None, None]


class GatedMaskedBlock(nn.Module):
    """A layer of the Gated PixelCNN (van den Oord et al. 2016b, "Conditional Image Generation with PixelCNN Decoders",
    figure 2): two stacks (B, in_channels, H, W) -> two stacks (B, channels, H, W).

    The vertical stack sees all rows above a pixel, the horizontal stack the pixels to its left in its row; together
    they see every pixel before it, without the blind spot of stacked masked convolutions. Colours are ordered in the
    horizontal stack alone, as the vertical one sees no other colour of the pixel itself.

    Args:
        in_channels: channels of the two inputs.
        channels: channels of the two outputs.
        kernel_size: odd, at least 3. The kernels are kernel_size x kernel_size and 1 x kernel_size, masked.
        mask_type: "A" for the first layer, on the image; "B" for the later ones.
        data_channels: number of colours; in_channels and channels are multiples of it.
        n_classes: number of classes of a class-conditional bias, None for none.
        dropout: probability, before the output convolution of the horizontal stack.

    Raises:
        ValueError: kernel_size is even or below 3, mask_type is unknown, channels are no multiples of data_channels, or
            n_classes is below 1.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel_size: int = 3,
        *,
        mask_type: str = "B",
        data_channels: int = 1,
        n_classes: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not isinstance(kernel_size, int) or kernel_size < 3 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be an odd int >= 3, got {kernel_size!r}")
        reach = kernel_size // 2
        beside = causal_mask(mask_type, channels, in_channels, (1, kernel_size), data_channels).repeat(2, 1, 1, 1)
        above = torch.ones(2 * channels, in_channels, kernel_size, kernel_size, dtype=torch.bool)
        above[:, :, reach + (mask_type == "B") :] = False
        self.vertical = MaskedConv2d(in_channels, 2 * channels, kernel_size, padding=reach, mask=above)
        self.across = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.horizontal = MaskedConv2d(
            in_channels, 2 * channels, (1, kernel_size), padding=(0, reach), bias=False, mask=beside
        )
        self.output = MaskedConv2d(channels, channels, 1, mask_type="B", data_channels=data_channels)
        self.condition = None if n_classes is None else ClassBias(n_classes, 4 * channels)
        self.dropout = nn.Dropout(dropout)
        self.residual = mask_type == "B" and in_channels == channels

    def forward(self, vertical: Tensor, horizontal: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Both stacks (B, in_channels, H, W) -> both (B, channels, H, W); condition: classes (B,).

        A row of the vertical output depends on the rows above it alone, so it enters the horizontal stack unshifted.
        """
        if self._fuses(vertical):
            return self.fused(vertical, horizontal, condition)
        above = self.vertical(vertical)
        beside = self.horizontal(horizontal)
        if self.condition is not None:
            biases = self.condition(condition).chunk(2, 1)
            above = above + biases[0]
            beside = beside + biases[1]
        out = self.output(self.dropout(gate(beside + self.across(above))))
        return gate(above), out + horizontal if self.residual else out

    def _fuses(self, x: Tensor) -> bool:
        """Whether `fused` can run: on a GPU, where no layer has a hook (which would not be called) and none has been
        replaced by one of another class."""
        if not runs_triton("auto", x) or x.dim() != 4:
            return False
        layers = (self.vertical, self.horizontal, self.output, self.across)
        if not all(isinstance(layer, MaskedConv2d) for layer in layers[:3]) or type(self.across) is not nn.Conv2d:
            return False
        return not any(
            layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
            for layer in layers
        )

    def fused(self, vertical: Tensor, horizontal: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What `forward` runs on a GPU, by the kernels.

        Three products: the vertical stack, which leaves its sums as well; the horizontal one, which adds the 1x1
        convolution of these to its own; and the output with the residual.
        """
        biases: tuple[Tensor | None, ...] = (None, None)
        if self.condition is not None:
            biases = self.condition(condition).flatten(1).chunk(2, 1)
        up, beside, across = self.vertical, self.horizontal, self.across
        x, weight, bias, class_bias = under_autocast(vertical, up.weight, up.bias, biases[0])
        gated, sums = fused(x, weight, up.live_mask(), bias, up.geometry, "gated", condition=class_bias, keep_pre=True)
        x, weight, bias, class_bias, sums, across_weight = under_autocast(
            horizontal, beside.weight, across.bias, biases[1], sums, across.weight
        )
        second = {"other": sums, "other_weight": across_weight}
        out, _ = fused(x, weight, beside.live_mask(), bias, beside.geometry, "gated", condition=class_bias, **second)
        return gated, self.output(self.dropout(out), residual=horizontal if self.residual else None)
