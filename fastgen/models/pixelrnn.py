"""PixelRNN (van den Oord et al. 2016, "Pixel Recurrent Neural Networks", sections 3.3 to 3.5 and table 1)."""

from typing import Any

from torch import Tensor, nn

from fastgen.models.arguments import check_counts
from fastgen.models.softmax import SoftmaxModel, channels_of, head_of
from fastgen.nn import DiagonalBiLSTM, MaskedConv2d, RowLSTM
from fastgen.nn.gated import ClassBias

KINDS = ("diagonal_bilstm", "row_lstm")


class PixelRNN(SoftmaxModel):
    """PixelRNN: a 7x7 convolution of mask type A, residual LSTM layers, two 1x1 convolutions and a softmax for every
    colour. Levels (B, C, H, W) -> logits (B, K, C, H, W).

    Args:
        shape: (C, H, W); with C = 3 the colours are ordered R, G, B.
        levels: number of levels K of a channel.
        kind: "diagonal_bilstm", whose layers see all pixels before their own, or "row_lstm", whose layers see a
            triangle of them.
        hidden_channels: hidden units h of a layer, rounded up to a multiple of C; the residual stream has 2h.
        layers: number of LSTM layers.
        n_classes: number of classes of a class-conditional model, None for an unconditional one.
        head_channels: feature maps between the last two layers, rounded up to a multiple of C; None means 2h.
        skewed_padding: as in `fastgen.nn.DiagonalLSTM`; only for "diagonal_bilstm".

    Raises:
        ValueError: an argument is not as above.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        levels: int = 256,
        *,
        kind: str = "diagonal_bilstm",
        hidden_channels: int = 128,
        layers: int = 12,
        n_classes: int | None = None,
        head_channels: int | None = None,
        skewed_padding: bool = False,
    ) -> None:
        super().__init__(shape, levels, n_classes)
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
        if skewed_padding and kind != "diagonal_bilstm":
            raise ValueError(f"skewed_padding is an option of kind='diagonal_bilstm', got kind={kind!r}")
        check_counts(hidden_channels=hidden_channels, layers=layers)
        colours = shape[0]
        h = channels_of(hidden_channels, colours)
        head = channels_of(2 * h if head_channels is None else head_channels, colours)
        options: dict[str, Any] = {"mask_type": "B", "data_channels": colours}

        def scan() -> nn.Module:
            if kind == "row_lstm":
                return RowLSTM(2 * h, h, **options)
            return DiagonalBiLSTM(2 * h, h, skewed_padding=skewed_padding, **options)

        self.input = MaskedConv2d(colours, 2 * h, 7, padding=3, mask_type="A", data_channels=colours)
        self.blocks = nn.ModuleList(
            ResidualLSTM(scan(), MaskedConv2d(h, 2 * h, 1, **options), n_classes) for _ in range(layers)
        )
        self.head = head_of(2 * h, head, colours, levels)

    @classmethod
    def mnist(cls, **options: Any) -> "PixelRNN":
        """The paper's Diagonal BiLSTM for binarized MNIST: 7 layers of 16 units, 2 levels. Options override these."""
        return cls((1, 28, 28), **{"levels": 2, "hidden_channels": 16, "layers": 7, "head_channels": 32, **options})

    @classmethod
    def cifar10(cls, **options: Any) -> "PixelRNN":
        """The paper's Diagonal BiLSTM for CIFAR-10: 12 layers of 128 units, rounded up to 129, which R, G and B share.
        Options override these.

        The kernels are faster if the number of units is a multiple of 16, such as hidden_channels=144.
        """
        return cls((3, 32, 32), **{"hidden_channels": 128, "layers": 12, "head_channels": 1024, **options})


class ResidualLSTM(nn.Module):
    """Figure 5 (right) of the paper: 2h features -> LSTM -> h -> 1x1 -> 2h, added to the input. A class adds a bias to
    the input of the LSTM."""

    def __init__(self, scan: nn.Module, expand: MaskedConv2d, n_classes: int | None) -> None:
        super().__init__()
        self.scan = scan
        self.expand = expand
        self.condition = None if n_classes is None else ClassBias(n_classes, expand.out_channels)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        biased = x if self.condition is None else x + self.condition(condition)
        return x + self.expand(self.scan(biased))
