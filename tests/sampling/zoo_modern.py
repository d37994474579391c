"""The zoo's younger habits: complex rotations, selective scans, experts, codes, weights made by other networks."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from fastgen import Bernoulli, Categorical
from tests.sampling.zoo_case import DataMask, as_tokens, case
from tests.sampling.zoo_sequences import Tokens

GREY = (1, 4, 4)
PARAMETERS = Categorical(4, "B(KC)HW")


@case(GREY, PARAMETERS, encode=as_tokens)
class ComplexRotations(Tokens):
    """Positions as complex numbers, one key and value for all heads."""

    def __init__(self):
        super().__init__()
        self.q, self.kv = nn.Linear(8, 8), nn.Linear(8, 8)
        angles = torch.outer(torch.arange(16.0), torch.tensor([1.0, 0.1]))
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles))

    def turned(self, x):
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * self.turns[:, None]).flatten(3).type_as(x)

    def mix(self, x):
        batch, length, _ = x.shape
        q = self.turned(self.q(x).view(batch, length, 2, 4)).transpose(1, 2)
        k, v = self.kv(x).view(batch, length, 1, 8).chunk(2, -1)
        k, v = (t.transpose(1, 2).expand(-1, 2, -1, -1) for t in (self.turned(k), v))
        return x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


@case(GREY, PARAMETERS, encode=as_tokens)
class StrongestThree(Tokens):
    """Only the three strongest scores count; the softmax is written out, hidden scores are very low, not infinite."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def mix(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        place = torch.arange(x.shape[1])
        scores = q @ k.mT / math.sqrt(8) + torch.where(place[:, None] >= place, 0.0, -1e30)
        scores = scores.masked_fill(scores < scores.topk(3, -1).values[..., -1:], -1e30)
        weights = torch.exp(scores - scores.max(-1, keepdim=True)[0])
        return x + weights / weights.sum(-1, keepdim=True) @ v


@case(GREY, PARAMETERS, encode=as_tokens)
class SelectiveScan(Tokens):
    """A state space whose steps depend on the input, behind a depthwise convolution that is padded and cut."""

    def __init__(self):
        super().__init__()
        self.into, self.back = nn.Linear(8, 24), nn.Linear(12, 8)
        self.near = nn.Conv1d(12, 12, 4, groups=12, padding=3)
        self.select = nn.Linear(12, 1 + 2 * 3)
        self.step, self.decay = nn.Linear(1, 12), nn.Parameter(torch.empty(12, 3))

    def mix(self, x):
        length = x.shape[1]
        y, valve = self.into(x).chunk(2, -1)
        y = F.silu(self.near(y.mT)[..., :length].mT)
        step, into, out = self.select(y).split([1, 3, 3], -1)
        step = F.softplus(self.step(step))
        keep = torch.exp(-step.unsqueeze(-1) * self.decay.abs())
        given = torch.einsum("bld,bln,bld->bldn", step, into, y)
        state, found = torch.zeros_like(keep[:, 0]), []
        for t in range(length):
            state = keep[:, t] * state + given[:, t]
            found.append(torch.einsum("bdn,bn->bd", state, out[:, t]))
        return x + self.back(torch.stack(found, 1) * F.silu(valve))


@case(GREY, PARAMETERS)
class ExpertsAndCodes(nn.Module):
    """The two best of three experts for each pixel; features replaced by the nearest of twelve codes."""

    def __init__(self):
        super().__init__()
        self.first, self.choose = DataMask(1, 6, 3, True), nn.Linear(6, 3)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.codes, self.out = nn.Embedding(12, 6), nn.Conv2d(12, 4, 1)

    def forward(self, x):
        y = self.first(x).permute(0, 2, 3, 1)
        shares, numbers = self.choose(y).softmax(-1).topk(2, -1)
        mixed = 0
        for number, expert in enumerate(self.experts):
            mixed = mixed + expert(y) * (shares * (numbers == number)).sum(-1, keepdim=True)
        code = torch.cdist(mixed.reshape(-1, 6), self.codes.weight).argmin(1)
        quantized = mixed + (self.codes(code).view_as(mixed) - mixed).detach()
        return self.out(torch.cat((quantized.tanh(), y), -1).permute(0, 3, 1, 2))


def vectors(n):
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(0))


@case(GREY, PARAMETERS, condition=vectors)
class KernelsByCondition(nn.Module):
    """Another network makes the kernels; the images of a batch are groups of one convolution."""

    def __init__(self):
        super().__init__()
        self.kernels = nn.Linear(5, 24)
        self.register_buffer("mask", torch.tensor([1.0, 1, 1, 1, 0, 0]).view(1, 1, 2, 3))
        self.out = nn.Conv2d(4, 4, 1)

    def forward(self, x, condition):
        batch, _, height, width = x.shape
        kernels = self.kernels(condition).view(batch * 4, 1, 2, 3) * self.mask
        rows = F.pad(x, (1, 1, 1, 0)).view(1, batch, height + 1, width + 2)
        return self.out(F.conv2d(rows, kernels, groups=batch).view(batch, 4, height, width).tanh())


@case(GREY, Bernoulli())
class TakesABatchOfOneForNone(nn.Module):
    """Two stacks side by side, taken apart and squeezed twice: of a single image nothing would be left to convolve."""

    def __init__(self):
        super().__init__()
        self.vertical = nn.Conv2d(1, 6, (2, 3), padding=(2, 1))
        self.horizontal = nn.Conv2d(1, 6, (1, 2))
        self.link, self.out = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 1, 1)

    def forward(self, x):
        above = self.vertical(x)[:, :, : x.shape[2]]
        left = self.horizontal(F.pad(x, (2, 0)))[..., :-1]
        above, left = (torch.squeeze(one, 0) for one in torch.split(torch.stack((above, left), 0), 1, 0))
        above, left = torch.squeeze(above, 0), torch.squeeze(left, 0)
        return self.out((self.link(above) + left).tanh())


@case((1, 6, 6), PARAMETERS)
class BlurredContext(nn.Module):
    """Rows above, blurred to half the size and brought back by linear interpolation."""

    def __init__(self):
        super().__init__()
        self.first, self.out = DataMask(1, 5, 3, True), nn.Conv2d(10, 4, 1)
        binomial = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("blur", torch.outer(binomial, binomial).expand(5, 1, 3, 3))

    def forward(self, x):
        near = self.first(x).relu()
        far = F.conv2d(F.pad(near, (1, 1, 2, 0)), self.blur, stride=2, groups=5)
        far = F.interpolate(far, size=x.shape[-2:], mode="bilinear", align_corners=True)
        return self.out(torch.cat((near, F.pad(far, (0, 0, 5, -5))), 1))


@case((1, 4, 5), Bernoulli())
class SkewedBothWays(nn.Module):
    """The image skewed by padding and another shape, from the left and mirrored, as in diagonal BiLSTMs."""

    def __init__(self):
        super().__init__()
        self.first, self.to_gates = DataMask(1, 4, 3, True), nn.Conv2d(4, 16, 1)
        self.between, self.out = nn.Conv1d(4, 16, 2, padding=1), nn.Conv2d(8, 1, 1)

    def scanned(self, x):
        batch, channels, height, width = x.shape
        gates = F.pad(self.to_gates(x), (0, height)).flatten(2)[..., :-height]
        hidden = cell = gates.new_zeros(batch, channels, height)
        found = []
        for column in gates.view(batch, 16, height, width + height - 1).unbind(-1):
            o, f, i, g = (column + self.between(hidden)[..., :-1]).chunk(4, 1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            hidden = o.sigmoid() * cell.tanh()
            found.append(hidden)
        states = F.pad(torch.stack(found, -1).flatten(2), (0, height))
        return states.view(batch, channels, height, width + height)[..., :width]

    @torch.inference_mode()
    def forward(self, x):
        features = self.first(x)
        right = F.pad(self.scanned(features.flip(3)).flip(3), (0, 0, 1, -1))
        return self.out(torch.cat((self.scanned(features), right), 1))
