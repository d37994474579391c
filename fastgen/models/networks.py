"""Encoders and decoders for images of any size: convolutions of stride 2 and transposed convolutions, or MLPs."""

from itertools import pairwise

from torch import Tensor, nn

from fastgen.models.arguments import check_counts, check_shape
from fastgen.nn.gated import ClassBias

NETWORKS = ("convolutional", "mlp")
SMALLEST = 4  # pixels: convolutions of stride 2 follow each other until no side is longer
Shape = tuple[int, int, int]


class Encoder(nn.Module):
    """Encodes float images (B, C, H, W) as (B, outputs).

    The convolutional network is a 3x3 convolution, convolutions of stride 2 until no side is longer than 4 pixels (they
    double the channels, up to four times the first) and a linear layer. The MLP has two hidden layers. A class adds a
    bias to the first layer.

    Args:
        shape: (C, H, W) of an image.
        outputs: number of outputs for each image.
        network: "convolutional" or "mlp".
        channels: feature maps at full resolution.
        hidden: units of a hidden layer of the MLP.
        n_classes: number of classes, None for an unconditional network.

    Raises:
        ValueError: an argument is not as above.
    """

    def __init__(
        self, shape: Shape, outputs: int, *, network: str, channels: int, hidden: int, n_classes: int | None
    ) -> None:
        super().__init__()
        check_network(shape, network, channels=channels, hidden=hidden)
        colours, height, width = shape
        first = channels if network == "convolutional" else hidden
        self.condition = None if n_classes is None else ClassBias(n_classes, first)
        if network == "mlp":
            self.input: nn.Module = nn.Sequential(
                nn.Flatten(), nn.Linear(colours * height * width, hidden), nn.Unflatten(1, (hidden, 1, 1))
            )
            rest: list[nn.Module] = [nn.Flatten(), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()]
            features = hidden
        else:
            self.input = nn.Conv2d(colours, channels, 3, padding=1)
            rest = [nn.ReLU()]
            stages = stages_of(shape, channels)
            for (before, _, _), (after, _, _) in pairwise(stages):
                rest += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU()]
            rest.append(nn.Flatten())
            features = stages[-1][0] * stages[-1][1] * stages[-1][2]
        self.layers = nn.Sequential(*rest, nn.Linear(features, outputs))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        features = self.input(x)
        if self.condition is not None:
            features = features + self.condition(condition)
        return self.layers(features)


class Decoder(nn.Module):
    """Decodes (B, inputs) to (B, planes, H, W): the mirror image of `Encoder`, with transposed convolutions.

    Args:
        shape: (C, H, W) of an image.
        inputs: number of inputs for each image.
        planes: number of outputs for each pixel.
        network, channels, hidden, n_classes: as in `Encoder`.

    Raises:
        ValueError: an argument is not as above.
    """

    def __init__(
        self, shape: Shape, inputs: int, planes: int, *, network: str, channels: int, hidden: int, n_classes: int | None
    ) -> None:
        super().__init__()
        check_network(shape, network, channels=channels, hidden=hidden)
        self.planes = planes
        _, height, width = shape
        if network == "mlp":
            self.input = nn.Linear(inputs, hidden)
            rest: list[nn.Module] = [nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()]
            rest += [nn.Linear(hidden, planes * height * width), nn.Unflatten(1, (planes, height, width))]
        else:
            stages = stages_of(shape, channels)[::-1]
            self.input = nn.Linear(inputs, stages[0][0] * stages[0][1] * stages[0][2])
            rest = [nn.ReLU(), nn.Unflatten(1, stages[0])]
            for (before, low, narrow), (after, high, wide) in pairwise(stages):
                # The encoder made h pixels of 2h - 1 or of 2h; the output padding is 0 or 1 respectively.
                padding = (high - 2 * low + 1, wide - 2 * narrow + 1)
                rest += [nn.ConvTranspose2d(before, after, 3, stride=2, padding=1, output_padding=padding), nn.ReLU()]
            rest.append(nn.Conv2d(channels, planes, 3, padding=1))
        self.condition = None if n_classes is None else ClassBias(n_classes, self.input.out_features)
        self.layers = nn.Sequential(*rest)

    @property
    def bias(self) -> Tensor:
        """The bias of the last layer: a view (planes, 1) of a convolution's, (planes, H * W) of an MLP's."""
        last = next(layer for layer in reversed(self.layers) if isinstance(layer, nn.Conv2d | nn.Linear))
        assert last.bias is not None
        return last.bias.view(self.planes, -1)

    def forward(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        features = self.input(z)
        if self.condition is not None:
            features = features + self.condition(condition).flatten(1)
        return self.layers(features)


def stages_of(shape: Shape, channels: int) -> list[Shape]:
    """(channels, height, width) of the feature maps at each resolution, from the largest to the smallest."""
    _, height, width = shape
    stages = [(channels, height, width)]
    while max(height, width) > SMALLEST:
        height, width = (height + 1) // 2, (width + 1) // 2
        stages.append((channels * min(2 ** len(stages), 4), height, width))
    return stages


def check_network(shape: Shape, network: str, **counts: int) -> None:
    """Raises ValueError if shape is not three positive ints, network is unknown, or a count is not a positive int."""
    check_shape(shape)
    if network not in NETWORKS:
        raise ValueError(f"network must be one of {NETWORKS}, got {network!r}")
    check_counts(**counts)
