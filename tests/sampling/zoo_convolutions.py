"""The zoo's convolutions, in plain PyTorch and in many people's styles."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from fastgen import Bernoulli, Categorical, LogisticMixture
from tests.sampling.zoo_case import (
    DataMask,
    PerPixelNorm,
    as_float,
    as_tokens,
    by_class,
    case,
    contiguous,
    interleaved,
    raster_mask,
)

GREY, RGB = (1, 5, 4), (3, 4, 3)


@case(GREY, Bernoulli(), convolutional=True)
def data_mask_batch_norm():
    layers = [DataMask(1, 6, 5, True, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True)]
    layers += [DataMask(6, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Conv2d(6, 1, 1))


@case(GREY, Categorical(5, "B(KC)HW"), convolutional=True)
def hooked_mask():
    def hide(module, arguments):
        module.weight.data.mul_(raster_mask(module.kernel_size, module is first))

    first = nn.Conv2d(1, 6, 3, padding="same")
    layers = [first, nn.ELU(), nn.Conv2d(6, 6, 3, padding="same"), nn.ELU(), nn.Conv2d(6, 5, 1)]
    for layer in layers[:4:2]:
        layer.register_forward_pre_hook(hide)
    return nn.Sequential(*layers)


@case((3, 4, 4), Categorical(4, "BCKHW"), convolutional=True)
class FunctionalMask(nn.Module):
    """One distribution of all colours from the pixels before; the mask is an attribute, no buffer."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([torch.empty(8, 3, 3, 3), torch.empty(8, 8, 3, 3)])
        self.masks = [raster_mask(3, True), raster_mask(3, False)]
        self.out = nn.Conv2d(8, 12, 1)

    def forward(self, x):
        for weight, mask in zip(self.weights, self.masks, strict=True):
            x = torch.tanh(F.conv2d(x, weight * mask, padding=1))
        return self.out(x).view(x.shape[0], 3, 4, *x.shape[2:])


@case(RGB, Categorical(4, "B(CK)HW"), encode=as_float, convolutional=True)
def contiguous_colours_layer_norm():
    layers = [DataMask(3, 9, 3, True, contiguous), PerPixelNorm(9, 3), nn.ReLU()]
    layers += [DataMask(9, 9, 3, False, contiguous), PerPixelNorm(9, 3), nn.ReLU()]
    return nn.Sequential(*layers, DataMask(9, 12, 1, False, contiguous))


@case(RGB, Categorical(4, "BKCHW"), convolutional=True)
class InterleavedColours(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = DataMask(3, 9, 3, True, interleaved)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.ReLU(), DataMask(9, 6, 1, False, interleaved), nn.ReLU(), DataMask(6, 9, 3, False, interleaved)
            )
            for _ in range(2)
        )
        self.out = DataMask(9, 12, 1, False, interleaved)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.out(x).unflatten(1, (4, 3))


@case(RGB, Categorical(3, "BKCHW"))
class HeadForEachColour(nn.Module):
    """The later heads are given the colours before theirs."""

    def __init__(self):
        super().__init__()
        self.context = DataMask(3, 6, 5, True)
        self.heads = nn.ModuleList(nn.Conv2d(6 + c, 3, 1) for c in range(3))

    def forward(self, x):
        context = self.context(x).sigmoid()
        return torch.stack([head(torch.cat([context, x[:, :c]], 1)) for c, head in enumerate(self.heads)], 2)


def gate(x):
    signal, valve = x.chunk(2, 1)
    return torch.tanh(signal) * torch.sigmoid(valve)


@case(GREY, Categorical(4, "B(KC)HW"), condition=by_class, convolutional=True)
class TwoStacks(nn.Module):
    """Gated, the weights masked, a class embedding in every layer."""

    def __init__(self):
        super().__init__()
        sizes = [(1, 6), (6, 6), (6, 6)]
        self.vertical = nn.ModuleList(nn.Conv2d(i, 2 * o, 3, padding=1) for i, o in sizes)
        self.horizontal = nn.ModuleList(nn.Conv2d(i, 2 * o, (1, 3), padding=(0, 1)) for i, o in sizes)
        self.link = nn.ModuleList(nn.Conv2d(2 * o, 2 * o, 1) for _, o in sizes)
        self.classes = nn.ModuleList(nn.Embedding(3, 2 * o) for _, o in sizes)
        self.out = nn.Conv2d(6, 4, 1)

    def forward(self, x, label):
        v = h = x
        for index, (vertical, horizontal) in enumerate(zip(self.vertical, self.horizontal, strict=True)):
            vertical.weight.data[:, :, 2:].zero_()
            if index == 0:
                vertical.weight.data[:, :, 1].zero_()
            horizontal.weight.data[..., 1 + (index > 0) :].zero_()
            term = self.classes[index](label)[:, :, None, None]
            above = vertical(v)
            left = horizontal(h) + self.link[index](above)
            v = gate(above + term)
            h = gate(left + term) + (h if index else 0)
        return self.out(F.relu(h))


@case((1, 6, 4), Categorical(4, "B(KC)HW"), convolutional=True)
class PadAndCrop(nn.Module):
    """No mask anywhere: kernels that end at the pixel, padded too much, cropped and shifted."""

    def __init__(self):
        super().__init__()
        self.vertical = nn.ModuleList(nn.Conv2d(c, 12, (2, 3), padding=(2, 1)) for c in (1, 6))
        self.horizontal = nn.ModuleList(nn.Conv2d(c, 12, (1, 2), padding=(0, 2)) for c in (1, 6))
        self.link = nn.ModuleList(nn.Conv2d(12, 12, 1) for _ in range(2))
        self.out = nn.Conv2d(6, 4, 1)

    def forward(self, x):
        height, width = x.shape[-2:]
        v = h = x
        for index in range(2):
            above = self.vertical[index](v)
            left = self.horizontal[index](h)[:, :, :, : width + 1][..., index : width + index]
            left += self.link[index](above[:, :, :height])
            v, h = gate(above[:, :, 1 : height + 1]), gate(left)
        return self.out(h)


class Shifted(nn.Module):
    """A weight-normed convolution whose kernel ends in its own row (and column, where it does not look right)."""

    def __init__(self, inputs, outputs, size, leftward=False, stride=1):
        super().__init__()
        height, width = size
        side = (width - 1, 0) if leftward else (width // 2, width // 2)
        self.pad = nn.ZeroPad2d((*side, height - 1, 0))
        self.conv = parametrizations.weight_norm(nn.Conv2d(inputs, outputs, size, stride))

    def forward(self, x):
        return self.conv(self.pad(x))


@case((3, 4, 6), LogisticMixture(2), convolutional=True)
class Plusplus(nn.Module):
    """Down by strides, up by transposed convolutions, what the way down leaves is used on the way up."""

    def __init__(self, channels=5):
        super().__init__()
        self.above = Shifted(4, channels, (2, 3))
        self.left = Shifted(4, channels, (2, 1), True)
        self.layers = nn.ModuleList(Shifted(2 * channels, 2 * channels, (2, 2), True) for _ in range(4))
        self.skip = nn.ModuleList(parametrizations.weight_norm(nn.Linear(2 * channels, 2 * channels)) for _ in range(2))
        self.down = Shifted(channels, channels, (2, 2), True, 2)
        self.up = parametrizations.weight_norm(nn.ConvTranspose2d(channels, channels, 2, 2), dim=1)
        self.out = nn.Conv2d(channels, 20, 1)

    @staticmethod
    def concat_elu(x):
        return F.elu(torch.cat([x, -x], 1))

    def forward(self, x):
        x = F.pad(x, (0, 0, 0, 0, 0, 1), value=1.0)
        u = F.pad(self.above(x), (0, 0, 1, 0))[:, :, :-1] + F.pad(self.left(x), (1, 0))[..., :-1]
        kept = [u]
        for index, layer in enumerate(self.layers):
            y = layer(self.concat_elu(u))
            if index > 1:
                skip = self.concat_elu(kept.pop()).permute(0, 2, 3, 1)
                y = y + self.skip[index - 2](skip.reshape(-1, skip.shape[-1])).view(*skip.shape[:3], -1).permute(
                    0, 3, 1, 2
                )
            a, b = torch.split(y, y.shape[1] // 2, 1)
            u = u + a * torch.sigmoid(b)
            if index == 0:
                kept.append(u := self.down(u))
            if index == 2:
                u = self.up(u)
        return self.out(F.elu(u))


@case((1, 6, 6), Categorical(3, "B(KC)HW"))
class CoarseContext(nn.Module):
    """Rows above at half the size, pooled and brought back by nearest neighbours, beside a masked convolution."""

    def __init__(self):
        super().__init__()
        self.coarse = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.fine = DataMask(1, 4, 3, True)
        self.out = nn.Conv2d(12, 3, 1)

    def forward(self, x):
        above = F.pad(x, (0, 0, 4, 0))[:, :, :-4]
        coarse = F.relu(self.coarse(above))
        back = F.interpolate(coarse, scale_factor=2, mode="nearest")
        pooled = F.max_pool2d(F.pad(x, (1, 1, 3, 0))[:, :, :-1], 3, stride=1).expand(-1, 2, -1, -1)
        mean = F.avg_pool2d(F.pad(x, (1, 0, 0, 0))[..., :-1], (1, 2), 1, (0, 1))[..., :-1].expand(-1, 2, -1, -1)
        return self.out(torch.cat((back, self.fine(x), pooled, mean), 1))


@case((1, 7, 6), Categorical(4, "B(KC)HW"), convolutional=True)
def dilated():
    layers = [DataMask(1, 6, 3, True), nn.LeakyReLU()]
    layers += [DataMask(6, 6, 3, dilation=2), nn.SiLU(), DataMask(6, 6, 3, dilation=3), nn.PReLU()]
    return nn.Sequential(*layers, nn.Conv2d(6, 4, 1))


@case(GREY, Categorical(4, "B(KC)HW"), convolutional=True)
def depthwise_channels_last():
    layers = [
        DataMask(1, 8, 3, True),
        nn.GELU(),
        DataMask(8, 8, 5, groups=8),
        nn.Conv2d(8, 8, 1, groups=2),
        nn.Hardswish(),
    ]
    return nn.Sequential(*layers, nn.ChannelShuffle(4), nn.Conv2d(8, 4, 1)).to(memory_format=torch.channels_last)


@case(GREY, Categorical(4, "B(KC)HW"))
class CountedNeighbours(nn.Module):
    """Partial convolutions: every output is divided by the number of neighbours that it saw."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([DataMask(1, 6, 3, True, bias=False), DataMask(6, 6, 3, bias=False)])
        self.out = nn.Conv2d(6, 4, 1)

    def forward(self, x):
        for layer in self.layers:
            seen = F.conv2d(torch.ones_like(x[:1, :1]), layer.mask[:1, :1], padding=1)
            x = F.relu(layer(x) * torch.where(seen > 0, 1 / seen, torch.zeros_like(seen)))
            x = x / (x.pow(2).mean(1, keepdim=True) + 1e-5).sqrt()
        return self.out(x)


@case(GREY, Categorical(6, "B(KC)HW"), encode=as_tokens, convolutional=True)
class EmbeddedTokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 5)
        self.net = nn.Sequential(DataMask(5, 6, 3, True), nn.ReLU(), DataMask(6, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 1))

    def forward(self, x):
        size = (*x.size(), -1)
        return self.net(self.embedding(x.view(-1)).view(size).permute(0, 3, 1, 2))


@case(GREY, Categorical(6, "B(KC)HW"), encode=as_tokens, convolutional=True)
class OneHotTokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("place", torch.linspace(-0.5, 0.5, 20).view(1, 1, 5, 4))
        self.net = nn.Sequential(DataMask(6, 6, 3, True), nn.ReLU(), DataMask(6, 6, 3), nn.ReLU())
        self.out = nn.Conv2d(7, 6, 1)

    def forward(self, x):
        x = F.one_hot(x, 6).permute(0, 3, 1, 2).type_as(self.place)
        return self.out(torch.cat((self.net(x), self.place.expand(x.shape[0], -1, -1, -1)), 1))


@case((1, 4, 6), Categorical(3, "B(KC)HW"))
class BlocksOfFour(nn.Module):
    """Space to depth: blocks see the rows of blocks above, pixels also their own neighbours."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Conv2d(4, 8, (2, 3), padding=(1, 1))
        self.pixels = DataMask(1, 4, 3, True)
        self.out = nn.Conv2d(6, 3, 1)

    def forward(self, x):
        blocks = F.relu(self.blocks(F.pixel_unshuffle(x, 2)))[:, :, :-1].roll(1, 2) * torch.tensor(
            [[[0.0]], [[1.0]]]
        ).view(1, 1, 2, 1)
        return self.out(torch.cat((F.pixel_shuffle(blocks, 2), F.softplus(self.pixels(x))), 1))


@case((1, 4, 5), Bernoulli())
class WrittenIntoABuffer(nn.Module):
    """Rows one after the other, each written into its place."""

    def __init__(self):
        super().__init__()
        self.left = nn.Conv1d(5, 4, 2)
        self.out = nn.Conv1d(4, 1, 1)

    def forward(self, x):
        batch, _, height, width = x.shape
        state = x.new_full((batch, 4, height + 1, width), torch.nan)
        state[:, :, 0] = 0.0
        for i in range(height):
            row = torch.cat((x[:, :, i], state[:, :, i]), 1)
            row[:, 0] = F.pad(row[:, 0], (1, 0))[:, :-1]
            state[:, :, i + 1].copy_(torch.tanh(self.left(F.pad(row, (1, 0)))))
        return torch.stack([self.out(row) for row in state[:, :, 1:].unbind(2)], 2)


@case(GREY, Bernoulli(), convolutional=True)
def double_precision():
    return nn.Sequential(DataMask(1, 6, 3, True), nn.Softsign(), nn.Conv2d(6, 1, 1)).double()


@case(GREY, Categorical(3, "B(KC)HW"), convolutional=True)
def half_precision():
    return nn.Sequential(
        DataMask(1, 6, 3, True), nn.ReLU(), DataMask(6, 6, 3), nn.ReLU(), nn.Conv2d(6, 3, 1)
    ).bfloat16()


@case(GREY, Categorical(3, "B(KC)HW"), convolutional=True)
def wide_half_precision():
    """Sums over so many channels that they may not be rounded halfway."""
    return nn.Sequential(
        DataMask(1, 32, 3, True), nn.ReLU(), DataMask(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 3, 1)
    ).bfloat16()
