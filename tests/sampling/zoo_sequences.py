"""The zoo's attention, recurrence and fully connected layers."""

import itertools
import math

import torch
from torch import nn
from torch.nn import functional as F

from fastgen import Bernoulli, Categorical
from tests.sampling.zoo_case import DataMask, as_float, as_tokens, case

GREY = (1, 4, 4)


class Tokens(nn.Module):
    """Pixels as a sequence, shifted by one place: (B, H, W) integers -> (B, K, H, W) logits. `mix` does the rest."""

    def __init__(self, levels=4, width=8, places=16):
        super().__init__()
        self.token = nn.Embedding(levels + 1, width)
        self.place = nn.Parameter(torch.empty(1, places, width))
        self.head = nn.Linear(width, levels)
        self.levels = levels

    def forward(self, x):
        tokens = x.flatten(1)
        tokens = torch.cat((torch.full_like(tokens[:, :1], self.levels), tokens[:, :-1]), 1)
        mixed = self.mix(self.token(tokens) + self.place)
        return self.head(mixed).view(*x.shape, -1).permute(0, 3, 1, 2) / 3


@case(GREY, Categorical(4, "B(KC)HW"), encode=as_tokens)
class TriangularTransformer(Tokens):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))
        self.qkv = nn.Linear(8, 24, bias=False)
        self.proj = nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.Dropout(0.5))
        self.register_buffer("triangle", torch.tril(torch.ones(1, 1, 16, 16)))

    def mix(self, x):
        batch, length, width = x.shape
        q, k, v = (t.view(batch, length, 2, -1).transpose(1, 2) for t in self.qkv(self.norms[0](x)).split(width, 2))
        scores = q @ k.transpose(-2, -1) / math.sqrt(k.shape[-1])
        scores = scores.masked_fill(self.triangle[:, :, :length, :length] == 0, float("-inf"))
        x = x + self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norms[1](x))


@case(GREY, Categorical(4, "B(KC)HW"), encode=as_tokens)
class FusedAttention(Tokens):
    """scaled_dot_product_attention, positions by rotation, root mean square normalization."""

    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(8)
        self.q, self.k, self.v = (nn.Linear(8, 8, bias=False) for _ in range(3))
        angle = torch.arange(16.0)[:, None] * torch.tensor([1.0, 0.1])
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def turned(self, x):
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack((a * self.cos - b * self.sin, a * self.sin + b * self.cos), -1).flatten(-2)

    def mix(self, x):
        y = self.norm(x)
        q, k, v = (layer(y).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(self.turned(q), self.turned(k), v, is_causal=True)
        return x + y.transpose(1, 2).flatten(2)


@case(GREY, Categorical(4, "B(KC)HW"), encode=as_tokens)
class LibraryTransformer(Tokens):
    """torch.nn's own encoder layer, which has a fused path in eval mode."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)

    def mix(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.layer(x, src_mask=mask, is_causal=True)


@case(GREY, Categorical(4, "B(KC)HW"), encode=as_tokens)
class LinearAttention(Tokens):
    """A running sum of keys times values."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def mix(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        summed = torch.einsum("btk,btv->btkv", k, v).cumsum(1)
        return x + torch.einsum("btk,btkv->btv", q, summed) / (q * k.cumsum(1)).sum(-1, keepdim=True)


@case((1, 5, 4), Categorical(4, "B(KC)HW"))
class AttentionOverTheImage(nn.Module):
    """Keys are strictly before the query; the first pixel, which has none, gets zeros."""

    def __init__(self):
        super().__init__()
        self.first = DataMask(1, 6, 3, True)
        self.query, self.key_value = nn.Conv2d(6, 4, 1), nn.Conv2d(7, 10, 1)
        self.out = nn.Conv2d(12, 4, 1)
        self.register_buffer("before", torch.ones(20, 20).tril(-1).bool())

    def forward(self, x):
        features = F.elu(self.first(x))
        q = self.query(features).flatten(2).transpose(1, 2)
        k, v = self.key_value(torch.cat((features, x), 1)).flatten(2).split((4, 6), 1)
        weights = torch.where(self.before, q @ k / 2, -math.inf).softmax(-1).masked_fill(~self.before, 0.0)
        seen = (weights @ v.transpose(1, 2)).transpose(1, 2).view_as(features)
        return self.out(torch.cat((features, seen), 1))


@case((1, 4, 5), Categorical(4, "B(KC)HW"), encode=as_float)
class AxialAttention(nn.Module):
    """Along the columns over the rows above, then along the row over what is to the left, with a bias by distance."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(1, 6)
        self.down, self.along = nn.Linear(6, 18), nn.Linear(12, 18)
        self.distance = nn.Parameter(torch.empty(1, 5))
        self.out = nn.Linear(6, 4)

    @staticmethod
    def attend(qkv, bias):
        q, k, v = qkv.chunk(3, -1)
        return torch.baddbmm(bias.expand(q.shape[0], -1, -1), q, k.mT, alpha=0.4).softmax(-1).bmm(v)

    def forward(self, x):
        batch, _, height, width = x.shape
        features = self.embed(x.permute(0, 2, 3, 1))
        columns = self.down(features).transpose(1, 2).flatten(0, 1)
        hidden = torch.full((height, height), -1e9).triu(1)
        above = self.attend(columns, hidden).view(batch, width, height, 6).transpose(1, 2)
        above = torch.cat((torch.zeros_like(above[:, :1]), above[:, :-1]), 1)
        left = torch.cat((features.new_zeros(batch, height, 1, 6), features[:, :, :-1]), 2)
        rows = self.along(torch.cat((above, left), -1)).reshape(-1, width, 18)
        apart = torch.arange(width)[:, None] - torch.arange(width)
        bias = self.distance[0][apart.clamp(min=0)].masked_fill(apart < 0, -1e9)
        return self.out(self.attend(rows, bias)).view(batch, height, width, 4).movedim(-1, 1)


@case((1, 4, 5), Bernoulli())
class DiagonalRecurrence(nn.Module):
    """Rows skewed by slices, a cell that walks over the columns of the skewed image, and back."""

    def __init__(self):
        super().__init__()
        self.first = DataMask(1, 5, 3, True)
        self.to_state = nn.Conv2d(5, 20, 1)
        self.between = nn.Conv1d(5, 20, 2)
        self.out = nn.Conv2d(5, 1, 1)

    def forward(self, x):
        batch, _, height, width = x.shape
        gates = self.to_state(self.first(x))
        skewed = gates.new_zeros(batch, 20, height, width + height - 1)
        for i in range(height):
            skewed[:, :, i, i : i + width] = gates[:, :, i]
        hidden = cell = skewed.new_zeros(batch, 5, height)
        columns = []
        for column in skewed.unbind(-1):
            o, f, i, g = (column + self.between(F.pad(hidden, (1, 0)))).chunk(4, 1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            hidden = o.sigmoid() * cell.tanh()
            columns.append(hidden)
        states = torch.stack(columns, -1)
        return self.out(torch.stack([states[:, :, i, i : i + width] for i in range(height)], 2))


@case((1, 5, 4), Categorical(3, "B(KC)HW"))
class RowRecurrence(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_state = DataMask(1, 20, 3, True)
        self.between = nn.Conv1d(5, 20, 3, padding=1)
        self.out = nn.Conv2d(5, 3, 1)

    def forward(self, x):
        gates = self.to_state(x)
        hidden = cell = torch.zeros(x.shape[0], 5, x.shape[3])
        rows = []
        for i in range(x.shape[2]):
            o, f, g, c = torch.split(gates[:, :, i] + self.between(hidden), 5, 1)
            cell = torch.sigmoid(f) * cell + torch.sigmoid(g) * torch.tanh(c)
            hidden = torch.sigmoid(o) * torch.tanh(cell)
            rows.append(hidden.unsqueeze(2))
        return self.out(torch.cat(rows, 2))


@case((1, 3, 4), Categorical(4, "B(KC)HW"), encode=as_tokens)
class CellOverPixels(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Embedding(5, 6)
        self.cells = nn.ModuleList([nn.LSTMCell(6, 6), nn.GRUCell(6, 6)])
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        tokens = F.pad(x.flatten(1), (1, -1), value=4)
        state, memory, logits = None, None, []
        for t in range(tokens.shape[1]):
            state = self.cells[0](self.token(tokens[:, t]), state)
            memory = self.cells[1](state[0], memory)
            logits.append(self.head(memory))
        return torch.stack(logits, 2).unflatten(2, x.shape[1:])


@case((1, 4, 5), Bernoulli())
class MaskedLinears(nn.Module):
    """MADE: a degree for every unit."""

    def __init__(self):
        super().__init__()
        degrees = [torch.arange(20), torch.arange(30) % 19, torch.arange(30) % 19, torch.arange(20)]
        self.layers = nn.ModuleList(nn.Linear(len(a), len(b)) for a, b in itertools.pairwise(degrees))
        for index, (a, b) in enumerate(itertools.pairwise(degrees)):
            self.register_buffer(f"mask{index}", (b[:, None] > a if index == 2 else b[:, None] >= a).float())

    def forward(self, x):
        y = x.flatten(1)
        for index, layer in enumerate(self.layers):
            y = F.linear(y, layer.weight * getattr(self, f"mask{index}"), layer.bias)
            y = y.relu() if index < 2 else y
        return y.view_as(x)


@case((3, 2, 3), Categorical(3, "BKCHW"))
class OneLinearAnElement(nn.Module):
    """Every element has a linear model of all before it; colours are innermost."""

    def __init__(self):
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(max(1, t), 3) for t in range(18))

    def forward(self, x):
        sequence = x.permute(0, 2, 3, 1).flatten(1)
        before = [torch.zeros_like(sequence[:, :1])] + [sequence[:, :t] for t in range(1, 18)]
        logits = torch.stack([linear(b) for linear, b in zip(self.linears, before, strict=True)], -1)
        return logits.unflatten(-1, (2, 3, 3)).permute(0, 1, 4, 2, 3)


@case((1, 3, 4), Bernoulli(), encode=as_float)
class GrowingSum(nn.Module):
    """NADE: the hidden layer's input grows by one pixel at a time, in place."""

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Parameter(torch.empty(12, 8)), nn.Parameter(torch.empty(12, 8))
        self.bias = nn.Parameter(torch.zeros(12))

    def forward(self, x):
        flat = x.flatten(1)
        total = torch.zeros(x.shape[0], 8)
        logits = torch.empty_like(flat)
        for t in range(12):
            logits[:, t] = torch.relu(total) @ self.out[t] + self.bias[t]
            total += flat[:, t : t + 1] * self.into[t]
        return logits.view_as(x)


@case((1, 1, 14), Categorical(4, "B(KC)HW"), encode=as_tokens)
class DilatedSequence(nn.Module):
    """WaveNet: gated causal convolutions in one dimension, their skips summed."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv1d(4, 6, 1)
        self.layers = nn.ModuleList(nn.Conv1d(6, 12, 2, dilation=2**i) for i in range(3))
        self.skips = nn.ModuleList(nn.Conv1d(6, 6, 1) for _ in range(3))
        self.out = nn.Conv1d(6, 4, 1)

    def forward(self, x):
        y = self.first(F.one_hot(x.flatten(1), 4).transpose(1, 2).float())
        y = torch.nn.functional.pad(y, (1, 0))[:, :, :-1]
        total = 0
        for layer, skip in zip(self.layers, self.skips, strict=True):
            z = F.glu(layer(F.pad(y, (layer.dilation[0], 0))), 1)
            total = total + skip(z)
            y = y + z
        return self.out(F.relu(total)).unsqueeze(2)


@case((1, 1, 16), Categorical(3, "B(KC)HW"))
class SnakeOrder(nn.Module):
    """Unfolded patches times masks that differ from place to place: every second row from right to left. The
    sequence is in the order of the drawing."""

    def __init__(self):
        super().__init__()
        rank = torch.arange(16).view(4, 4)
        rank[1::2] = rank[1::2].flip(1)
        self.register_buffer("rank", rank.flatten())
        patches = F.unfold(F.pad(rank[None, None] + 1.0, (1, 1, 1, 1)), 3) - 1
        known = (patches >= 0) & (patches < rank.flatten())
        self.register_buffer("masks", torch.stack((known, known | (patches == rank.flatten()))).float())
        self.weights = nn.ParameterList([torch.empty(6, 9), torch.empty(6, 54), torch.empty(3, 54)])

    def forward(self, x):
        x = x.flatten(1)[:, self.rank].view(-1, 1, 4, 4)
        for index, weight in enumerate(self.weights):
            patches = F.unfold(x, 3, padding=1).unflatten(1, (x.shape[1], 9)) * self.masks[int(index > 0)]
            x = (weight @ patches.flatten(1, 2)).view(x.shape[0], -1, 4, 4)
            x = torch.tanh(x) if index < 2 else x
        return x.flatten(2)[:, :, torch.argsort(self.rank)].unsqueeze(2)
