"""Models of every kind: the same images as by whole passes, without one; leaks are found and named."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastgen
from fastgen import Bernoulli, Categorical, LogisticMixture, accelerate
from fastgen.sampling.machine.parts import unknown_in
from tests.sampling.exactness import assert_exact, pair
from tests.sampling.zoo import CASES, built
from tests.sampling.zoo_case import DataMask, PerPixelNorm, contiguous, interleaved

N = 3
RGB = (3, 4, 3)
HALF = ("half_precision", "wide_half_precision")
ERRORS = {"SelectiveScan": 2e-3}  # its parameters reach 700
BY_TORCH = ("double_precision", "ComplexRotations")  # what the machines know not


def encoded(model, levels, distribution, encode):
    if encode is not None:
        return encode(levels)
    dtype = next(model.parameters()).dtype
    if isinstance(distribution, Bernoulli):
        return levels.to(dtype)
    count = 256 if isinstance(distribution, LogisticMixture) else distribution.levels
    return levels.to(dtype) / (count - 1) * 2 - 1


def by_channel(params, distribution):
    """(n, ..., C, H, W); the parameters of a mixture belong to all channels."""
    if isinstance(distribution, Categorical):
        return distribution.logits(params)
    return params.unsqueeze(1) if isinstance(distribution, Bernoulli) else params.unsqueeze(2)


def raster_rank(channels, height, width):
    pixels = torch.arange(height * width).view(1, height, width)
    return pixels * channels + torch.arange(channels).view(channels, 1, 1)


@pytest.mark.parametrize("name", CASES)
def test_the_zoo_is_causal_and_sees(name):
    """By changing every level: nothing that is drawn before it moves, and for all but the last pixel something does."""
    model, shape, arguments = built(name, 1)
    distribution, channels = arguments["distribution"], shape[0]
    count = math.prod(shape)
    levels = 2 if isinstance(distribution, Bernoulli) else getattr(distribution, "levels", 256)
    images = torch.randint(levels, (1, *shape)).repeat(count + 1, 1, 1, 1)
    changed = images[1:].view(count, count).diagonal()
    changed.copy_((changed + levels // 2) % levels)
    condition = [] if arguments["condition"] is None else [arguments["condition"].repeat_interleave(count + 1, 0)]
    with torch.no_grad():
        params = model(encoded(model, images, distribution, arguments["encode"]), *condition).double()
    params = by_channel(params, distribution)
    moved = ((params[1:] - params[:1]).abs() > 1e-5 * params.abs().max()).flatten(1, -4).any(1)  # (inputs, C, H, W)
    rank = raster_rank(*shape)
    needed = rank[:1] if isinstance(distribution, LogisticMixture) else rank
    assert not (moved & (needed <= rank.flatten()[:, None, None, None])).any()
    assert moved.flatten(1).any(1).float().mean() > (0.7 if channels == 1 else 0.9)


@pytest.mark.parametrize("name", HALF)
def test_half_precision_is_drawn_without_passes_or_by_them(name):
    model, shape, arguments = built(name, N)
    auto, naive = pair(model, shape, verify="auto", **arguments)
    auto.sample(N, seed=0)
    assert auto.stats.passes == 0 and "half precision" in auto.explain()
    always, _ = pair(model, shape, **arguments)
    for seed in range(2):
        assert torch.equal(always.sample(N, seed=seed), naive.sample(N, seed=seed))
        assert always.stats.passes >= 1


@pytest.mark.parametrize("name", [name for name in CASES if name not in HALF])
def test_equals_naive_almost_without_whole_passes(name):
    model, shape, arguments = built(name, N)
    fast, naive = pair(model, shape, verify="auto", **arguments)
    plan = fast._backends.made[-1].backend.plan
    assert any(unknown_in(program) for program in plan.programs) == (name in BY_TORCH)
    passes = 0
    for batch in range(2):
        images = assert_exact(fast, naive, N, error=ERRORS.get(name, 1e-4), passes=None, seed=batch)
        assert not torch.equal(images[0], images[1])
        passes += fast.stats.passes
        # The first batch measures by one pass how far rounding goes; then one where that could decide a draw.
        assert 1 <= passes <= batch + 1
    assert 0 < fast.work_ratio <= (1.05 if CASES[name].convolutional else 2)


@pytest.mark.parametrize("name", ["InterleavedColours", "Plusplus", "TriangularTransformer", "DiagonalRecurrence"])
def test_known_pixels_and_options(name):
    model, shape, arguments = built(name, N)
    fast, naive = pair(model, shape, **arguments)
    levels = getattr(arguments["distribution"], "levels", 2)
    options = {
        "noise": torch.rand(fast.noise_shape(N)),
        "temperature": 0.8,
        "known": torch.randint(levels, shape),
        "known_mask": torch.rand(N, *shape) < 0.4,
        "return_log_prob": True,
    }
    assert_exact(fast, naive, N, error=1e-4, **options)


@pytest.mark.parametrize("name", ["data_mask_batch_norm", "Plusplus", "FusedAttention"])
def test_changed_parameters_are_noticed(name):
    model, shape, arguments = built(name, N)
    sampler = accelerate(model, shape, backend="eager", **arguments)
    noise = torch.rand(sampler.noise_shape(N))
    before = sampler.sample(N, noise=noise)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    expected = accelerate(model, shape, backend="naive", **arguments).sample(N, noise=noise)
    assert not torch.equal(before, expected)
    assert torch.equal(sampler.sample(N, noise=noise), expected)


def test_a_weight_that_is_zero_for_now():
    """A layer that starts at zero, as the last of a residual block often does, may not stay dead after training."""
    torch.manual_seed(1)
    block = nn.Sequential(nn.ReLU(), nn.Conv2d(6, 6, 1))
    nn.init.zeros_(block[1].weight)

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.block, self.out = DataMask(1, 6, 3, True), block, nn.Conv2d(6, 3, 1)

        def forward(self, x):
            x = 3 * self.first(x)
            return self.out(x + self.block(x))

    model, shape, distribution = Residual().eval(), (1, 4, 4), Categorical(3, "B(KC)HW")
    sampler = accelerate(model, shape, distribution=distribution, backend="eager")
    noise = torch.rand(sampler.noise_shape(N))
    plain = accelerate(model, shape, distribution=distribution, backend="naive")
    assert torch.equal(sampler.sample(N, noise=noise), plain.sample(N, noise=noise))
    with torch.no_grad():
        block[1].weight.normal_()
    assert torch.equal(sampler.sample(N, noise=noise), plain.sample(N, noise=noise))


def test_zeros_without_a_mask_make_a_model_causal_while_they_last():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ELU(), nn.Conv2d(6, 3, 1)).eval()
    with torch.no_grad():
        model[0].weight[:, :, 1, 1:] = 0
        model[0].weight[:, :, 2] = 0
    sampler = accelerate(model, (1, 4, 4), distribution=Categorical(3, "B(KC)HW"), backend="eager")
    assert "zero" in sampler.explain()
    sampler.sample(N, seed=0)
    with torch.no_grad():
        model[0].weight[0, 0, 2, 2] = 1.0
    with pytest.raises(fastgen.NotCausalError):
        sampler.sample(N, seed=0)


class Cancelled(nn.Module):
    """Reads the whole image, but the outputs do not change with it."""

    def __init__(self):
        super().__init__()
        self.masked, self.out = DataMask(1, 4, 3, True), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        return self.out(3 * self.masked(x) + (x.mean((2, 3), keepdim=True) > 9).float())


def test_what_only_seems_to_leak_is_drawn_by_a_slower_method_that_is_exact():
    torch.manual_seed(0)
    model, shape, distribution = Cancelled().eval(), (1, 4, 4), Categorical(3, "B(KC)HW")
    with pytest.warns(UserWarning, match="falls back"):
        sampler = accelerate(model, shape, distribution=distribution)
    noise = torch.rand(sampler.noise_shape(N))
    plain = accelerate(model, shape, distribution=distribution, backend="naive")
    assert torch.equal(sampler.sample(N, noise=noise), plain.sample(N, noise=noise))
    assert fastgen.check_causality(model, shape).ok


class Attention(nn.Module):
    """The first pixel may attend to nothing, so that its softmax is an average over everything."""

    def forward(self, qkv):
        q, k, v = qkv.flatten(2).chunk(3, 1)
        before = torch.ones(q.shape[-1], q.shape[-1]).tril(-1)
        q = torch.cat((torch.zeros_like(q[..., :1]), q[..., :-1]), -1)
        weights = (q.mT @ k).masked_fill(before == 0, -1e9).softmax(-1)
        return (v @ weights.mT).unflatten(-1, qkv.shape[-2:])


class FullyMaskedRow(nn.Module):
    """Features of rows above, shifted by a padding, and the attention."""

    def __init__(self):
        super().__init__()
        self.first, self.out = nn.Conv2d(1, 4, 1), nn.Conv2d(8, 3, 1)
        self.project, self.attend = nn.Conv2d(4, 12, 1), Attention()

    def forward(self, x):
        above = self.first(F.pad(x, (0, 0, 1, 0)))[:, :, :-1]
        return self.out(torch.cat((above, self.attend(self.project(above))), 1))


class Centred(nn.Module):
    def forward(self, x):
        return x - x.median()


class GatedHalves(nn.Module):
    """Colours interleaved over the channels, and a gate that pairs channel c with c + 4: not of the same colour."""

    def __init__(self, width):
        super().__init__()
        self.first = DataMask(3, 2 * width, 3, True, interleaved)
        self.out = DataMask(width, 12, 1, False, interleaved)

    def forward(self, x):
        signal, valve = self.first(x).chunk(2, 1)
        return self.out(signal * valve.sigmoid()).unflatten(1, (4, 3))


class Rolled(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Conv2d(1, 3, 1)

    def forward(self, x):
        return self.out(x.roll(1, -1))


def plain(*middle, channels=1, colour=None, outputs=3):
    width = 6 if channels == 1 else 9
    return nn.Sequential(
        DataMask(channels, width, 3, True, colour), *middle, DataMask(width, outputs, 1, False, colour)
    )


LEAKS = {
    "the centre is seen": (lambda: nn.Sequential(DataMask(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 3, 1)), (1, 4, 4), "0"),
    "no mask at all": (lambda: plain(nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1)), (1, 4, 4), "2"),
    "statistics of the batch": (lambda: plain(nn.BatchNorm2d(6)).train(), (1, 4, 4), "1"),
    "statistics of the image": (lambda: plain(nn.GroupNorm(2, 6)), (1, 4, 4), "1"),
    "an average over the image": (lambda: plain(nn.AdaptiveAvgPool2d(1), nn.Upsample((4, 4))), (1, 4, 4), "1"),
    "a median of the image": (lambda: plain(Centred()), (1, 4, 4), "1"),
    "a row that is fully masked": (FullyMaskedRow, (1, 4, 4), "attend"),
    "around the edge": (Rolled, (1, 3, 4), None),
    "normalized over the colours": (
        lambda: plain(PerPixelNorm(9, 1), channels=3, colour=contiguous, outputs=12),
        RGB,
        "1",
    ),
    "gates across colours": (lambda: GatedHalves(4), RGB, None),
}


def moves(model, shape, leak):
    """Whether changing that input alone changes the output at that place."""
    x = torch.rand(1, *shape) * 2 - 1
    other = x.clone()
    other[(0, *leak.input)] += 0.7
    with torch.no_grad():
        return bool(((model(x) - model(other))[..., leak.output[1], leak.output[2]].abs() > 1e-6).any())


@pytest.mark.parametrize("name", LEAKS)
def test_leaks_are_found_and_named(name):
    torch.manual_seed(0)
    make, shape, module = LEAKS[name]
    model = make()
    if name != "statistics of the batch":
        model.eval()
    ordered = shape[0] == 3
    report = fastgen.check_causality(model, shape, channels_ordered=ordered)
    assert not report.ok and report.leaks
    for leak in report.leaks:
        rank = raster_rank(*shape)
        assert rank[leak.input] >= rank[(leak.output[0] if ordered else 0, *leak.output[1:])]
    assert any(moves(copy.deepcopy(model), shape, leak) for leak in report.leaks)
    assert report.leaks[0].node
    assert module is None or report.leaks[0].module == module
    layout = ("BKCHW" if name == "gates across colours" else "B(CK)HW") if ordered else "B(KC)HW"
    backend = ("auto", "eager")[list(LEAKS).index(name) % 2]
    with pytest.raises(fastgen.NotCausalError) as caught:
        accelerate(model, shape, distribution=Categorical(4 if ordered else 3, layout), backend=backend)
    assert isinstance(caught.value, ValueError) and caught.value.report.leaks
    assert ("eval()" in str(caught.value)) == (name == "statistics of the batch")


def test_colour_groups_that_divide_do_not_leak():
    torch.manual_seed(0)
    model = GatedHalves(6).eval()
    assert fastgen.check_causality(model, RGB, channels_ordered=True).ok
    assert not fastgen.check_causality(model, RGB).ok


def test_eval_mode_heals_a_batch_normalization():
    model = plain(nn.BatchNorm2d(6))
    assert not fastgen.check_causality(model.train(), (1, 4, 4)).ok
    assert fastgen.check_causality(model.eval(), (1, 4, 4)).ok
