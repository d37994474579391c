"""The zoo's transformers and what took their place, in public repositories' manners: positions, experts, kernels."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from fastgen import Categorical
from tests.sampling.zoo_case import as_tokens, case
from tests.sampling.zoo_sequences import Tokens

GREY = (1, 4, 4)
PARAMETERS = Categorical(4, "B(KC)HW")


def heads(x, count):
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


@case(GREY, PARAMETERS, encode=as_tokens)
class RotatedGroupedQueries(Tokens):
    """Llama: halves rotated, two queries for each key, root mean squares and SwiGLU written out."""

    def __init__(self):
        super().__init__()
        self.q, self.kv, self.o = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.gate, self.up, self.down = (nn.Linear(*size, bias=False) for size in ((8, 12), (8, 12), (12, 8)))
        self.scales = nn.Parameter(torch.ones(2, 8))
        angles = torch.outer(torch.arange(16.0), 100 ** -torch.tensor([0.0, 1.0])).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def norm(self, x, k):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scales[k]

    def turned(self, x):
        a, b = x.chunk(2, -1)
        return x * self.cos + torch.cat((-b, a), -1) * self.sin

    def mix(self, x):
        y = self.norm(x, 0)
        q, (k, v) = heads(self.q(y), 2), self.kv(y).chunk(2, -1)
        k, v = (heads(one, 1).repeat_interleave(2, 1) for one in (k, v))
        scores = self.turned(q) @ self.turned(k).transpose(2, 3) / 2
        scores = scores + torch.full((16, 16), float("-inf")).triu(1)
        y = (F.softmax(scores, -1, dtype=torch.float32).type_as(q) @ v).transpose(1, 2).flatten(2)
        x = x + self.o(y)
        y = self.norm(x, 1)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


@case(GREY, PARAMETERS, encode=as_tokens)
class SlopesByDistance(Tokens):
    """ALiBi, and a feed-forward layer of squared ReLUs."""

    def __init__(self):
        super().__init__()
        self.qkv, self.mlp = nn.Linear(8, 24), nn.ModuleList([nn.Linear(8, 16), nn.Linear(16, 8)])
        place = torch.arange(16)
        apart = (place[None] - place[:, None]).float()
        bias = apart * torch.tensor([0.5, 0.25])[:, None, None]
        self.register_buffer("bias", bias.masked_fill(apart > 0, torch.finfo(torch.float32).min))

    def mix(self, x):
        q, k, v = (heads(one, 2) for one in self.qkv(x).chunk(3, -1))
        weights = (torch.einsum("bhid,bhjd->bhij", q, k) * 0.5 + self.bias).softmax(-1)
        x = x + torch.einsum("bhij,bhjd->bhid", weights, v).transpose(1, 2).flatten(2)
        return F.layer_norm(x + self.mlp[1](F.relu(self.mlp[0](x)) ** 2), (8,))


@case(GREY, PARAMETERS, encode=as_tokens)
class BucketsOfDistance(Tokens):
    """T5: a learned bias for each bucket of distances; no scale, no bias in any layer."""

    def __init__(self):
        super().__init__()
        self.qkv, self.distance = nn.Linear(8, 24, bias=False), nn.Embedding(6, 2)

    def mix(self, x):
        length = x.shape[1]
        apart = (torch.arange(length)[:, None] - torch.arange(length)).clamp(min=0)
        far = 3 + (torch.log(apart.float().clamp(min=1) / 3) / math.log(16 / 3) * 3).long()
        bias = self.distance(torch.where(apart < 3, apart, far.clamp(max=5))).permute(2, 0, 1)[None]
        q, k, v = (heads(one, 2) for one in self.qkv(x).chunk(3, -1))
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        scores = (torch.matmul(q, k.mT) + bias).masked_fill(hidden, torch.finfo(x.dtype).min)
        return x + (F.softmax(scores.float(), dim=-1).type_as(scores) @ v).transpose(1, 2).flatten(2)


@case(GREY, PARAMETERS, encode=as_tokens)
class SkewedRelations(Tokens):
    """Music Transformer: relative positions by padding and another shape of the scores."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.relations = nn.Parameter(torch.empty(2, 16, 4))

    def mix(self, x):
        length = x.shape[1]
        q, k, v = (heads(one(x), 2) for one in (self.q, self.k, self.v))
        skewed = F.pad(q @ self.relations[:, -length:].mT, (1, 0))
        relative = skewed.reshape(len(x), 2, length + 1, length)[:, :, 1:]
        scores = (q @ k.mT + relative) / 2
        mask = torch.triu(torch.ones(length, length), 1) == 1
        return x + (scores.masked_fill(mask, -1e9).softmax(-1) @ v).transpose(1, 2).reshape(len(x), length, 8)


@case(GREY, PARAMETERS, encode=as_tokens)
class ImageGPT(Tokens):
    """Layers as in GPT-2: convolutions of one place as products, a masked bias that is selected, its own GELU."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([torch.empty(8, 24), torch.empty(8, 8), torch.empty(8, 16), torch.empty(16, 8)])
        self.biases = nn.ParameterList([torch.zeros(one.shape[1]) for one in self.weights])
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(3))
        self.register_buffer("seen", torch.tril(torch.ones(16, 16, dtype=torch.bool)).view(1, 1, 16, 16))
        self.register_buffer("masked", torch.tensor(-1e4))

    def product(self, x, k):
        return torch.addmm(self.biases[k], x.reshape(-1, x.shape[-1]), self.weights[k]).view(*x.shape[:-1], -1)

    def mix(self, x):
        q, k, v = (heads(one, 2) for one in self.product(self.norms[0](x), 0).split(8, 2))
        scores = torch.where(self.seen, q @ k.transpose(-1, -2) / 2, self.masked)
        x = x + self.product((scores.softmax(-1) @ v).permute(0, 2, 1, 3).contiguous().view(x.shape), 1)
        y = self.product(self.norms[1](x), 2)
        y = 0.5 * y * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (y + 0.044715 * torch.pow(y, 3.0))))
        return self.norms[2](x + self.product(y, 3))


@case(GREY, PARAMETERS, encode=as_tokens)
class WindowsOfKeys(Tokens):
    """Local attention: each query sees the five places up to its own, by unfolded keys; GELU by its error function."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def mix(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        k, v = (F.pad(one, (0, 0, 4, 0)).unfold(1, 5, 1) for one in (k, v))  # (B, T, 8, 5)
        inside = torch.arange(x.shape[1])[:, None] + torch.arange(5) >= 4
        weights = (torch.einsum("btd,btdw->btw", q, k) / 8**0.5).masked_fill(~inside, -torch.inf).softmax(-1)
        y = self.out(torch.einsum("btw,btdw->btd", weights, v))
        return x + 0.5 * y * (1.0 + torch.erf(y / math.sqrt(2.0)))


@case(GREY, PARAMETERS, encode=as_tokens)
class SwitchedExperts(Tokens):
    """One expert for each token, of the greatest share; hard choices by one_hot."""

    def __init__(self):
        super().__init__()
        self.router, self.experts = nn.Linear(8, 3, bias=False), nn.Parameter(torch.empty(3, 8, 8))
        self.mixing = nn.Linear(16, 8)

    def mix(self, x):
        before = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), 1)
        x = F.mish(self.mixing(torch.cat((x, before), -1)))
        shares = self.router(x).softmax(-1)
        share, number = shares.max(-1)
        chosen = F.one_hot(number, 3).to(x.dtype)
        every = torch.einsum("btd,edf->btef", x, self.experts)
        return x + share.unsqueeze(-1) * (chosen.unsqueeze(-1) * every).sum(2)


@case(GREY, PARAMETERS, encode=as_tokens)
class HiddenTokens(Tokens):
    """Tokens that are 0 are padding: nobody attends to them, which the drawn levels decide."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        self.padding = F.pad(x.flatten(1)[:, :-1] == 0, (1, 0))
        return super().forward(x)

    def mix(self, x):
        length = x.shape[1]
        q, k, v = self.qkv(x).chunk(3, -1)
        hidden = self.padding[:, None] | torch.ones(length, length, dtype=torch.bool).triu(1)
        hidden = hidden & ~torch.eye(length, dtype=torch.bool)
        return x + (q @ k.mT / 3).masked_fill(hidden, float("-inf")).softmax(-1) @ v


@case(GREY, PARAMETERS, encode=as_tokens)
class Retention(Tokens):
    """Scores that decay with the distance instead of a softmax, each head normalized by itself, and a gate."""

    def __init__(self):
        super().__init__()
        self.qkvg, self.out = nn.Linear(8, 32), nn.Linear(8, 8)
        apart = torch.arange(16.0)[:, None] - torch.arange(16.0)
        decay = torch.tensor([0.9, 0.6])[:, None, None] ** apart
        self.register_buffer("decay", torch.where(apart >= 0, decay, 0.0))

    def mix(self, x):
        q, k, v, g = self.qkvg(x).chunk(4, -1)
        q, k, v = (heads(one, 2) for one in (q, k, v))
        y = (q @ k.mT * self.decay) @ v
        y = F.layer_norm(y, (4,)).transpose(1, 2).flatten(2)
        return x + self.out(F.silu(g) * y)


@case(GREY, PARAMETERS, encode=as_tokens)
class ShiftedMixing(Tokens):
    """RWKV: each token mixed with the one before it, a sum that decays, kept from overflowing by its greatest term."""

    def __init__(self):
        super().__init__()
        self.shares = nn.Parameter(torch.rand(4, 8))
        self.k, self.v, self.r, self.o = (nn.Linear(8, 8, bias=False) for _ in range(4))
        self.decay, self.bonus = nn.Parameter(torch.zeros(8)), nn.Parameter(torch.zeros(8))
        self.up, self.down = nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False)

    def mix(self, x):
        before = F.pad(x, (0, 0, 1, -1))
        k, v, r, c = (torch.lerp(before, x, share.sigmoid()) for share in self.shares)
        k, v, r = self.k(k), self.v(v), torch.sigmoid(self.r(r))
        a = b = torch.zeros_like(x[:, 0])
        most, found = torch.full_like(a, -1e38), []
        for t in range(x.shape[1]):
            q = torch.maximum(most, self.bonus + k[:, t])
            old, new = torch.exp(most - q), torch.exp(self.bonus + k[:, t] - q)
            found.append((old * a + new * v[:, t]) / (old * b + new))
            q = torch.maximum(most - torch.exp(self.decay), k[:, t])
            old, new = torch.exp(most - torch.exp(self.decay) - q), torch.exp(k[:, t] - q)
            a, b, most = old * a + new * v[:, t], old * b + new, q
        x = x + self.o(r * torch.stack(found, 1))
        return x + self.down(torch.square(torch.relu(self.up(c))))


@case(GREY, PARAMETERS, encode=as_tokens)
class LongConvolutions(Tokens):
    """S4D and Hyena: kernels as long as the sequence, made of decaying waves, between gates."""

    def __init__(self):
        super().__init__()
        self.into, self.back = nn.Linear(8, 36), nn.Linear(12, 8)
        self.short = nn.Conv1d(36, 36, 3, groups=36, padding=2)
        self.rate, self.wave, self.mixed = (nn.Parameter(torch.empty(12, 3)) for _ in range(3))
        self.skip = nn.Parameter(torch.ones(12))

    def mix(self, x):
        length = x.shape[1]
        a, b, v = self.short(self.into(x).mT)[..., :length].chunk(3, 1)
        time = torch.arange(length)
        modes = torch.exp(-F.softplus(self.rate)[..., None] * time) * torch.cos(self.wave[..., None] * time)
        kernel = (self.mixed[..., None] * modes).sum(1)  # (12, T)
        y = a * v
        y = F.conv1d(F.pad(y, (length - 1, 0)), kernel.flip(-1)[:, None], groups=12) + y * self.skip[:, None]
        return F.layer_norm(x + self.back((y * b).mT), (8,))
