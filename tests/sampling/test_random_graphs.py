"""Random causal graphs: kernels, dilations, strides, shifts, pools, joins, colour groups, attention, drawn by chance.

Every channel of a node has a rank: how many colours of its own pixel it has seen. Pixels before may be read freely, the
own pixel only from channels of no higher rank; the parameters of colour c come from channels of rank c at most.
"""

import math
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fastgen import Bernoulli, Categorical, NotCausalError, accelerate, check_causality

LEVELS = 3
SETTINGS = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


def fresh(data, *size):
    """Normal weights; the generator is the example's own, so that a failure is found again."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    return torch.randn(size, generator=generator) * (1.5 / math.prod(size[1:]) ** 0.5)


class Conv(nn.Module):
    """Any kernel, dilation and padding to all four sides; what it may not see is masked, in one of three ways."""

    def __init__(self, data, ranks):
        super().__init__()
        height, width, self.dilation = (data.draw(st.integers(1, 3)) for _ in range(3))
        self.groups = data.draw(st.sampled_from([g for g in (1, 1, 2, len(ranks)) if len(ranks) % g == 0]))
        outputs = self.groups * data.draw(st.integers(1, 3))
        self.ranks = [data.draw(st.integers(0, max(ranks))) for _ in range(outputs)]
        reach_down, reach_right = (height - 1) * self.dilation, (width - 1) * self.dilation
        top, left = data.draw(st.integers(0, reach_down)), data.draw(st.integers(0, reach_right))
        self.pads = (left, reach_right - left, top, reach_down - top)
        down = (torch.arange(height) * self.dilation - top)[:, None]
        right = (torch.arange(width) * self.dilation - left)[None]
        inputs = (
            torch.tensor(ranks).view(self.groups, -1).repeat_interleave(outputs // self.groups, 0)[:, :, None, None]
        )
        own = (down == 0) & (right == 0) & (inputs <= torch.tensor(self.ranks)[:, None, None, None])
        mask = ((down < 0) | ((down == 0) & (right < 0)) | own).float()
        self.register_buffer("mask", mask)
        self.weight = nn.Parameter(fresh(data, *mask.shape))
        self.bias = nn.Parameter(fresh(data, outputs)) if data.draw(st.booleans()) else None
        self.style = data.draw(st.sampled_from(["times", "data", "once"]))
        if self.style == "once":
            self.weight.data *= mask

    def forward(self, x):
        if self.style == "data":
            self.weight.data *= self.mask
        weight = self.weight * self.mask if self.style == "times" else self.weight
        return F.conv2d(F.pad(x, self.pads), weight, self.bias, dilation=self.dilation, groups=self.groups)


class Shift(nn.Module):
    def __init__(self, data, ranks):
        super().__init__()
        self.rows, self.columns = data.draw(st.sampled_from([(1, 0), (0, 1), (1, -1), (2, 1)]))
        self.ranks = [0 for _ in ranks]

    def forward(self, x):
        height, width = x.shape[-2:]
        left = max(self.columns, 0)
        x = F.pad(x, (left, max(-self.columns, 0), self.rows, 0))
        return x[..., :height, max(-self.columns, 0) :][..., :width]


class DownAndUp(nn.Module):
    """Strided, then transposed or repeated, then cropped. A coarse cell sees up to the first of its own pixels."""

    def __init__(self, data, ranks):
        super().__init__()
        self.stride = data.draw(st.integers(2, 3))
        self.size = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
        outputs = data.draw(st.integers(1, 3))
        self.ranks = [max(ranks) for _ in range(outputs)]
        self.down = nn.Parameter(fresh(data, outputs, len(ranks), *self.size))
        self.up = nn.Parameter(fresh(data, outputs, outputs, self.stride, self.stride))
        self.repeats = data.draw(st.booleans())

    def forward(self, x):
        height, width = x.shape[-2:]
        x = F.conv2d(F.pad(x, (self.size[1] - 1, 0, self.size[0] - 1, 0)), self.down, stride=self.stride)
        if self.repeats:
            x = F.interpolate(x, scale_factor=self.stride)
        else:
            x = F.conv_transpose2d(x, self.up, stride=self.stride)
        return x[..., :height, :width]


class Channels(nn.Module):
    """Some channels, in some order."""

    def __init__(self, data, ranks):
        super().__init__()
        self.chosen = data.draw(st.lists(st.integers(0, len(ranks) - 1), min_size=1, max_size=4))
        self.ranks = [ranks[k] for k in self.chosen]

    def forward(self, x):
        return x[:, self.chosen]


class Pointwise(nn.Module):
    def __init__(self, data, ranks):
        super().__init__()
        self.name = data.draw(st.sampled_from(["elu", "gate", "concat", "norm", "running"]))
        half = len(ranks) // 2
        if self.name == "gate" and half:
            self.ranks = [max(pair) for pair in zip(ranks[:half], ranks[half : 2 * half], strict=True)]
        elif self.name == "concat":
            self.ranks = ranks * 2
        else:
            self.ranks = [max(ranks) for _ in ranks] if self.name == "norm" else list(ranks)

    def forward(self, x):
        half = x.shape[1] // 2
        if self.name == "gate" and half:
            return torch.tanh(x[:, :half]) * torch.sigmoid(x[:, half : 2 * half])
        if self.name == "concat":
            return F.elu(torch.cat((x, -x), 1))
        if self.name == "norm":
            return F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2]).permute(0, 3, 1, 2)
        if self.name == "running":
            return x.cumsum(-1) / 4 + x.cumsum(-2) / 4
        return F.elu(x)


class Attention(nn.Module):
    """Over all pixels before, over those of the row, or over those of the column."""

    def __init__(self, data, ranks):
        super().__init__()
        self.own = data.draw(st.booleans())
        self.over = data.draw(st.sampled_from(["pixels", "row", "column"]))
        outputs = data.draw(st.integers(1, 2))
        self.ranks = [max(ranks) for _ in range(outputs)]  # the query sees its own pixel
        self.project = nn.ParameterList(fresh(data, outputs, len(ranks)) for _ in range(3))

    def forward(self, x):
        batch, _, height, width = x.shape
        q, k, v = (torch.einsum("oc,bchw->bhwo", weight, x) for weight in self.project)
        if self.over == "pixels":
            q, k, v = (y.flatten(1, 2) for y in (q, k, v))
        elif self.over == "row":
            q, k, v = (y.flatten(0, 1) for y in (q, k, v))
        else:
            q, k, v = (y.transpose(1, 2).flatten(0, 1) for y in (q, k, v))
        hidden = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(int(self.own))
        weights = (q @ k.mT).masked_fill(hidden, -math.inf).softmax(-1)
        mixed = weights.masked_fill(hidden, 0.0) @ v
        if self.over == "column":
            mixed = mixed.unflatten(0, (batch, width)).transpose(1, 2)
        return mixed.reshape(batch, height, width, -1).permute(0, 3, 1, 2)


class Pool(nn.Module):
    """Of what is before a pixel; or with zeros all around, moved down and to the right until it is."""

    def __init__(self, data, ranks):
        super().__init__()
        self.around = data.draw(st.booleans())
        sizes = st.sampled_from([1, 3]) if self.around else st.integers(1, 3)
        self.size = data.draw(sizes), data.draw(sizes)
        self.counted = data.draw(st.booleans())
        self.greatest = data.draw(st.booleans())
        self.ranks = list(ranks)

    def pool(self, x, padding):
        if self.greatest:
            return F.max_pool2d(x, self.size, 1, padding)
        return F.avg_pool2d(x, self.size, 1, padding, count_include_pad=self.counted)

    def forward(self, x):
        down, right = (size // 2 if self.around else size - 1 for size in self.size)
        if not self.around:
            return self.pool(F.pad(x, (right, 0, down, 0)), 0)
        return F.pad(self.pool(x, (down, right)), (right, -right, down, -down))


class Coarse(nn.Module):
    """Four rows further down, from half the size."""

    def __init__(self, data, ranks):
        super().__init__()
        self.mode = data.draw(st.sampled_from(["nearest", "bilinear"]))
        self.greatest = data.draw(st.booleans())
        self.ranks = [0 for _ in ranks]

    def forward(self, x):
        pool = F.max_pool2d if self.greatest else F.avg_pool2d
        found = F.interpolate(pool(x, 2, 2, ceil_mode=True), size=x.shape[-2:], mode=self.mode)
        return F.pad(found, (0, 0, 4, 0))[:, :, : x.shape[2]]


class AlongChannels(nn.Module):
    def __init__(self, data, ranks):
        super().__init__()
        self.name = data.draw(st.sampled_from(["sort", "largest", "running", "codes", "Fourier"]))
        self.ranks = [max(ranks) for _ in ranks]

    def forward(self, x):
        if self.name == "sort":
            return x.sort(1).values
        if self.name == "largest":
            return x.scatter(1, x.argmax(1, keepdim=True), 2.0)
        if self.name == "running":
            return x.cummax(1).values
        if self.name == "codes":
            codes = torch.linspace(-1, 1, 5 * x.shape[1], dtype=x.dtype).view(5, -1)
            return (torch.softmax(-torch.cdist(x.flatten(2).mT, codes), -1) @ codes).mT.reshape(x.shape)
        return torch.fft.fft(x, dim=1).real


LAYERS = [Conv, Conv, Conv, Shift, DownAndUp, Channels, Pointwise, Attention, Pool, Coarse, AlongChannels]


class Graph(nn.Module):
    """Nodes one after the other, each made of one earlier node or of two (joined, or added where they have as many
    channels); a head for every colour."""

    def __init__(self, data, colours, outputs):
        super().__init__()
        ranks = [[c + 1 for c in range(colours)]]
        self.layers, self.sources = nn.ModuleList(), []
        for number in range(data.draw(st.integers(1, 6))):
            source = data.draw(st.integers(max(0, number - 2), number))
            layer = data.draw(st.sampled_from(LAYERS))(data, ranks[source])
            other = data.draw(st.one_of(st.none(), st.integers(0, number)))
            self.layers.append(layer)
            self.sources.append((source, other))
            made = layer.ranks
            if other is not None and len(ranks[other]) == len(made):
                made = [max(pair) for pair in zip(ranks[other], made, strict=True)]
            elif other is not None:
                made = ranks[other] + made
            ranks.append(made)
        last = torch.tensor(ranks[-1] + ranks[-2])
        mask = (last <= torch.arange(colours)[:, None]).repeat(outputs, 1).float()
        self.register_buffer("mask", mask[:, :, None, None])
        self.head = nn.Parameter(fresh(data, *self.mask.shape))

    def forward(self, x):
        nodes = [x]
        for layer, (source, other) in zip(self.layers, self.sources, strict=True):
            y = layer(nodes[source])
            if other is not None:
                both = nodes[other], y
                y = both[0] + both[1] if both[0].shape == y.shape else torch.cat(both, 1)
            nodes.append(y)
        return F.conv2d(torch.cat(nodes[:-3:-1], 1), self.head * self.mask * 2)


@given(st.data())
@settings(max_examples=60, **SETTINGS)
def test_any_causal_graph_gives_the_images_of_whole_passes(data):
    colours = data.draw(st.sampled_from([1, 1, 3]))
    shape = (colours, data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5)))
    binary = data.draw(st.booleans())
    distribution = Bernoulli() if binary else Categorical(LEVELS, "B(KC)HW")
    model = Graph(data, colours, 1 if binary else LEVELS).eval()
    plain = accelerate(model, shape, distribution=distribution, backend="naive")
    known = {}
    if data.draw(st.booleans()):
        rows = torch.arange(shape[1]).view(-1, 1) < data.draw(st.integers(0, shape[1]))
        known = {"known": torch.randint(2, shape), "known_mask": rows | (torch.rand(3, *shape) < 0.2)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no fallback, no more than rounding
        sampler = accelerate(model, shape, distribution=distribution, backend="eager")
        for seed in range(2):
            passes = []
            expected, nats = plain.sample(3, seed=seed, return_log_prob=True, **known)
            handle = model.register_forward_hook(lambda *_, passes=passes: passes.append(1))
            images, found = sampler.sample(3, seed=seed, return_log_prob=True, **known)
            handle.remove()
            assert torch.equal(images, expected)
            torch.testing.assert_close(found, nats, rtol=1e-4, atol=1e-4)
            assert len(passes) <= 1


def really_leaks(model, shape):
    """By changing every element of three images: whether something moves that is drawn before it, or at once."""
    colours, height, width = shape
    count = math.prod(shape)
    rank = torch.arange(height * width).view(1, height, width) * colours + torch.arange(colours).view(-1, 1, 1)
    for _ in range(3):
        x = torch.rand(1, *shape, dtype=torch.float64).repeat(count + 1, 1, 1, 1)
        x[1:].view(count, count).diagonal().add_(0.9)
        with torch.no_grad():
            y = model(x).view(count + 1, -1, *shape)
        moved = (y[1:] - y[:1]).abs().amax(1) > 1e-9
        if (moved & (rank <= rank.reshape(-1, 1, 1, 1))).any():
            return True
    return False


@given(st.data())
@settings(max_examples=40, **SETTINGS)
def test_an_opened_weight_is_found_where_it_leaks(data):
    colours = data.draw(st.sampled_from([1, 3]))
    shape = (colours, data.draw(st.integers(2, 4)), data.draw(st.integers(2, 4)))
    model = Graph(data, colours, LEVELS).eval()
    hidden = [
        (layer, tuple(tap)) for layer in model.layers if isinstance(layer, Conv) for tap in (layer.mask == 0).nonzero()
    ]
    if hidden:
        layer, tap = data.draw(st.sampled_from(hidden))
        layer.mask[tap] = 1
        layer.weight.data[tap] = 2.0
    model = model.double()
    report = check_causality(model, shape, channels_ordered=colours > 1)
    assert report.ok == (not really_leaks(model, shape)) and report.proven
    distribution = Categorical(LEVELS, "B(KC)HW")
    if report.ok or "another order" in report.remark:
        accelerate(model, shape, distribution=distribution, backend="naive")
    else:
        with pytest.raises(NotCausalError):
            accelerate(model, shape, distribution=distribution, backend="naive")
