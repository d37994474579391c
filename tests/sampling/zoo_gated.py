"""The zoo's gates and scales in public repositories' manners: PixelSNAIL, FiLM, WaveNet, MADE."""

import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from fastgen import Bernoulli, Categorical, LogisticMixture
from tests.sampling.zoo_case import DataMask, as_float, as_tokens, by_class, case


@case((1, 5, 4), Categorical(4, "B(KC)HW"), condition=by_class, convolutional=True)
class ModulatedResidual(nn.Module):
    """FiLM: each block scaled and shifted by the class; the block depthwise, normalized and widened as in ConvNeXt."""

    def __init__(self):
        super().__init__()
        self.first = DataMask(1, 10, 5, True)
        self.depthwise = nn.ModuleList(DataMask(10, 10, 5, groups=10) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(10) for _ in range(2))
        self.films = nn.ModuleList(nn.Embedding(3, 20) for _ in range(2))
        self.wide = nn.ModuleList(nn.Linear(10, 20) for _ in range(2))
        self.narrow = nn.ModuleList(nn.Linear(20, 10) for _ in range(2))
        self.scale = nn.Parameter(torch.full((10,), 0.5))
        self.out = nn.Conv2d(10, 4, 1)

    def forward(self, x, label):
        x = self.first(x)
        for depthwise, norm, film, wide, narrow in zip(
            self.depthwise, self.norms, self.films, self.wide, self.narrow, strict=True
        ):
            scale, shift = film(label)[:, None, None].chunk(2, -1)
            y = norm(depthwise(x).permute(0, 2, 3, 1)) * (1 + scale) + shift
            x = x + (self.scale * narrow(F.gelu(wide(y)))).permute(0, 3, 1, 2)
        return self.out(F.elu(x))


@case((1, 5, 4), Categorical(4, "B(KC)HW"))
class Snail(nn.Module):
    """PixelSNAIL: gated residual blocks with shifted kernels, and attention over what was drawn, coordinates beside."""

    def __init__(self):
        super().__init__()
        self.pads = [nn.ZeroPad2d((1, 1, 2, 0)), nn.ZeroPad2d((1, 0, 1, 0))]
        self.above, self.left = nn.Conv2d(1, 6, (2, 3)), nn.Conv2d(1, 6, (2, 1))
        self.inner = parametrizations.weight_norm(nn.Conv2d(12, 6, 2))
        self.wide = parametrizations.weight_norm(nn.Conv2d(12, 12, 2))
        self.query, self.key, self.value = nn.Conv2d(8, 4, 1), nn.Conv2d(9, 4, 1), nn.Conv2d(9, 6, 1)
        self.out = nn.Conv2d(12, 4, 1)

    @staticmethod
    def concat_elu(x):
        return F.elu(torch.cat([x, -x], 1))

    def forward(self, x):
        batch, _, height, width = x.shape
        up = self.above(self.pads[0](x))[:, :, :-1]
        left = self.left(F.pad(x, (1, 0, 1, 0)))[..., :-1]
        y = up + left
        z = self.inner(self.pads[1](self.concat_elu(y)))
        a, b = self.wide(self.pads[1](self.concat_elu(z))).chunk(2, 1)
        y = y + a * torch.sigmoid(b)
        rows = torch.linspace(-0.5, 0.5, height).view(1, 1, -1, 1).expand(batch, 1, height, width)
        columns = torch.linspace(-0.5, 0.5, width).view(1, 1, 1, -1).expand(batch, 1, height, width)
        places = torch.cat((rows, columns), 1)
        known = torch.cat((x, y, places), 1)
        query, key, value = (
            one(given).flatten(2).mT
            for one, given in ((self.query, torch.cat((y, places), 1)), (self.key, known), (self.value, known))
        )
        mask = torch.tril(torch.ones(height * width, height * width), -1).unsqueeze(0)
        start = torch.ones(height * width, 1)
        start[0] = 0
        scores = (query @ key.mT / 2).masked_fill(mask == 0, -1e4)
        seen = (torch.softmax(scores, -1) * start) @ value
        return self.out(self.concat_elu(seen.mT.view_as(y))) / 3


@case((3, 3, 4), LogisticMixture(2))
class SoftplusScales(nn.Module):
    """Scales by softplus, with a floor; means bounded; the hidden layers switch by thresholds of their own."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([DataMask(3, 8, 3, True), DataMask(8, 8, 3)])
        self.threshold = nn.Parameter(torch.zeros(8))
        self.out = nn.Conv2d(8, 20, 1)

    def forward(self, x):
        for layer in self.layers:
            y = layer(x)
            threshold = self.threshold.view(1, -1, 1, 1)
            x = torch.where(y >= threshold, y, 0.1 * torch.log1p(y.abs()))
        found = self.out(x)
        logits, rest = found[:, :2], found[:, 2:].unflatten(1, (3, 6))
        means, scales, mixed = rest.split(2, 2)
        scales = torch.log(F.softplus(scales) + 0.05)
        return torch.cat((logits, torch.cat((F.hardtanh(means), scales, mixed), 2).flatten(1, 2)), 1)


@case((1, 4, 5), Bernoulli(), encode=as_float)
class ConnectedDirectly(nn.Module):
    """MADE with a mask for direct connections and a learned temperature."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        degrees = [torch.arange(20), torch.randint(19, (24,), generator=generator)]
        self.into, self.direct, self.back = nn.Linear(20, 24), nn.Linear(20, 20, bias=False), nn.Linear(24, 20)
        self.temperature = nn.Parameter(torch.tensor(0.3))
        self.register_buffer("in_mask", (degrees[1][:, None] >= degrees[0]).float())
        self.register_buffer("out_mask", (degrees[0][:, None] > degrees[1]).float())
        self.register_buffer("direct_mask", torch.ones(20, 20).tril(-1))

    def forward(self, x):
        flat = x.flatten(1)
        hidden = F.selu(F.linear(flat, self.in_mask * self.into.weight, self.into.bias))
        found = F.linear(hidden, self.out_mask * self.back.weight, self.back.bias)
        found = found + F.linear(flat, self.direct_mask * self.direct.weight)
        return (found / F.softplus(self.temperature)).view_as(x)


def sound(n):
    return torch.randn(n, 3, 14, generator=torch.Generator().manual_seed(1))


@case((1, 1, 14), Categorical(4, "B(KC)HW"), encode=as_tokens, condition=sound)
class ConditionedWaves(nn.Module):
    """WaveNet with a local condition: tanh times sigmoid of both, scaled sums, an embedding for each level."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(4, 6)
        self.dilated = nn.ModuleList(nn.Conv1d(6, 12, 2, dilation=2**k, padding=2**k) for k in range(3))
        self.local = nn.ModuleList(nn.Conv1d(3, 12, 1, bias=False) for _ in range(3))
        self.residual = nn.ModuleList(nn.Conv1d(6, 12, 1) for _ in range(3))
        self.out = nn.Sequential(nn.ReLU(), nn.Conv1d(6, 6, 1), nn.ReLU(), nn.Conv1d(6, 4, 1))

    def forward(self, x, condition):
        y = F.pad(self.embedding(x.flatten(1)).mT, (1, -1))
        skips = torch.zeros_like(y)
        for dilated, local, residual in zip(self.dilated, self.local, self.residual, strict=True):
            z = dilated(y)[..., : y.shape[-1]] + local(condition)
            a, b = z.tensor_split(2, 1)
            step, skip = residual(torch.tanh(a) * torch.sigmoid(b)).tensor_split(2, 1)
            y, skips = (y + step) * math.sqrt(0.5), skips + skip
        return self.out(skips).unsqueeze(2)
