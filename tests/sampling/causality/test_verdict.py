"""The verdict that samplers and `check_causality` share: what is proven, what is tried, what is refused."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastgen
from fastgen import Bernoulli, Categorical, NotCausalError, accelerate, check_causality
from tests.sampling.zoo_case import DataMask, Function

SHAPE = (1, 4, 4)


def floats(levels):
    return levels.float()


GIVEN = {"distribution": Bernoulli(), "encode": floats}


class Made(nn.Module):
    """Masked layers in an order of its own, with units that are rarely awake."""

    def __init__(self, shape, seed, hidden=40):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        count = shape[0] * shape[1] * shape[2]
        rank = torch.randperm(count, generator=generator)
        units = torch.randint(0, count - 1, (hidden,), generator=generator)
        self.masks = [units[:, None] >= rank, units[:, None] >= units, rank[:, None] > units]
        sizes = [(hidden, count), (hidden, hidden), (count, hidden)]
        self.weights = nn.ParameterList(2 * torch.randn(size, generator=generator) for size in sizes)
        self.rank = rank

    def forward(self, x):
        h = x.flatten(1)
        for number, (weight, mask) in enumerate(zip(self.weights, self.masks, strict=True)):
            h = F.linear(h if number == 0 else F.relu(h - 1.5), weight * mask)
        return h.view_as(x)


@pytest.mark.parametrize("shape", [(1, 5, 5), (3, 3, 3)])
@pytest.mark.parametrize("seed", range(3))
def test_a_made_is_drawn_in_the_order_of_its_zeros_by_the_engine(seed, shape):
    model = Made(shape, seed).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler = accelerate(model, shape, backend="eager", **GIVEN)
    noise = torch.rand(sampler.noise_shape(16), generator=torch.Generator().manual_seed(seed))
    images = sampler.sample(16, noise=noise)
    assert torch.equal(images, accelerate(model, shape, backend="naive", **GIVEN).sample(16, noise=noise))
    expected = torch.zeros(16, *shape)  # drawn here in the order of the ranks
    for place in model.rank.argsort().tolist():
        with torch.no_grad():
            drawn = noise.flatten(1)[:, place] >= 1 - model(expected).flatten(1)[:, place].double().sigmoid()
        expected.view(16, -1)[:, place] = drawn.float()
    assert torch.equal(images, expected.long())
    assert "another order than the raster" in sampler.explain()


def last_of_all(x):
    """Pixel 0 is drawn last: it is likely 1 only where all others are 1."""
    flat = x.flatten(1)
    awake = torch.relu(flat @ torch.tensor([0.0] + [1.0] * 8) - 7)
    return torch.cat(((12 * awake - 6).unsqueeze(1), torch.full_like(flat[:, 1:], 2.0)), 1).view_as(x)


def test_no_backend_follows_what_a_few_images_show():
    model = Function(last_of_all)
    images = [accelerate(model, (1, 3, 3), backend=name, **GIVEN).sample(300, seed=0) for name in ("naive", "eager")]
    assert torch.equal(*images)
    full = images[0].flatten(1)[:, 1:].all(1)
    assert full.sum() > 50 and images[0][full][:, 0, 0, 0].float().mean() > 0.9
    report = check_causality(model, (1, 3, 3), encode=floats)
    assert not report.ok and "in another order" in str(report)


def rare(unit):
    """Pixel 0 sees all others through a unit, and every other sees pixel 0."""

    def forward(x):
        flat = x.flatten(1)
        first = unit(flat @ torch.tensor([0.0] + [1.0] * 15))
        return torch.cat((first.unsqueeze(1), 6 * flat[:, :1].expand(-1, 15)), 1).view_as(x)

    return forward


LEAKS = {
    "a relu that wakes once in 32768 images": rare(lambda s: torch.relu(s - 14)),
    "a product of three": rare(lambda s: torch.relu(s - 13) * torch.relu(s - 14) * s),
    "a clamp": rare(lambda s: s.clamp(14.5, 15)),
    "a difference from another": rare(lambda s: torch.relu(s - 14) - 3.0),
    "a normalization": lambda x: F.layer_norm(torch.relu(x - 20), (4,)),
    "a pool": lambda x: F.max_pool2d(F.pad(x - 100 * (torch.arange(4) > 1), (1, 1, 1, 1)), 3, 1),
    "its own level": lambda x: 1e-9 * x,
}


@pytest.mark.parametrize("name", LEAKS)
def test_a_leak_that_hardly_shows_is_refused(name):
    model = Function(LEAKS[name])
    report = check_causality(model, SHAPE, encode=floats)
    assert not report.ok and report.leaks and report.proven
    for backend in ("auto", "naive", "fixed_point"):
        with pytest.raises(NotCausalError):
            accelerate(model, SHAPE, backend=backend, **GIVEN)


def causal(x):
    return 2 * F.pad(x, (1, 0))[..., :-1] - 1


def by_fft(x):
    kernel = torch.tensor([0.0, 2.0, -1.0, 0.5])
    return torch.fft.ifft(torch.fft.fft(x, 32) * torch.fft.fft(kernel, 32), 32).real[:, :16]


def weakly_masked(x):
    before = F.pad(x, (1, 0))[:, :-1]
    scores = before.unsqueeze(2) * before.unsqueeze(1) - 100 * torch.ones(16, 16).triu(1)
    return (scores.softmax(-1) @ before.unsqueeze(-1)).squeeze(-1)


def masked_by_a_negative(x):
    before, mask = F.pad(x, (1, 0))[:, :-1], torch.ones(16, 16).triu(1)
    scores = -(1e9 * mask - before.unsqueeze(2) * before.unsqueeze(1))
    shares = (scores - scores.amax(-1, True)).exp() * (1 - mask)
    return (shares @ before.unsqueeze(-1)).squeeze(-1)


MAY_CANCEL = {
    "a running sum without its last": lambda x: 2 * (x.flatten(1).cumsum(1) - x.flatten(1)).view_as(x) - 3,
    "a running product over its last": lambda x: ((x + 1).flatten(1).cumprod(1) / (x + 1).flatten(1)).view_as(x),
    "a running product by an inverse": lambda x: ((x + 1).flatten(1).cumprod(1) * (1 / (x + 1)).flatten(1)).view_as(x),
    "a convolution by complex transforms": lambda x: by_fft(x.flatten(1)).view_as(x),
    "attention with weak masks": lambda x: weakly_masked(x.flatten(1)).view_as(x),
    "attention with masks inside of a negative": lambda x: masked_by_a_negative(x.flatten(1)).view_as(x),
    "a number in the place of NaN": lambda x: causal(x) + (x.flip(3) * math.nan).nan_to_num(),
    "one and minus one": lambda x: causal(x) + x.flip(3) + -1.0 * x.flip(3),
    "a difference of equals": lambda x: causal(x) + x.roll(1, -1) * 2 - x.roll(1, -1) * 2,
    "one and its negative": lambda x: causal(x) + (x.flip(3) + (-x.flip(3))),
    "a gate that is never open": lambda x: causal(x) + (x.mean() > 9).float() * x.flip(3),
    "a choice that is never made": lambda x: causal(x) + torch.where(x.flip(3) > 9, x.flip(3), 0.0),
    "a rounding of little": lambda x: causal(x) + (x.flip(3) / 4).round(),
    "a computed permutation": lambda x: causal(x) + x.gather(3, x.argsort(3)).clamp(min=9),
}


@pytest.mark.parametrize("name", MAY_CANCEL)
def test_what_may_cancel_is_tried_and_not_called_proven(name):
    model = Function(MAY_CANCEL[name])
    report = check_causality(model, SHAPE, encode=floats)
    assert report.ok and not report.proven and not report.leaks
    assert "not proven" in str(report) and "trials" in report.remark
    with pytest.warns(UserWarning, match="not proven"):
        sampler = accelerate(model, SHAPE, **GIVEN)
    naive = accelerate(model, SHAPE, backend="naive", **GIVEN)
    assert "not proven" in naive.explain()
    assert torch.equal(sampler.sample(8, seed=1), naive.sample(8, seed=1))


SEEN = {
    "a sum less only half": lambda x: (x.flatten(1).cumsum(1) - 0.5 * x.flatten(1)).view_as(x),
    "a gate that opens rarely": lambda x: causal(x) + (x.mean((1, 2, 3), keepdim=True) > 0.99).float() * x.flip(3),
    "a gate that opens in almost blank images": lambda x: causal(x)
    + (x.sum((1, 2, 3), keepdim=True) < 2).float() * x.flip(3),
    "a choice among others": lambda x: x.gather(3, x.argsort(3)),
}


@pytest.mark.parametrize("name", SEEN)
def test_trials_wake_what_random_images_leave_asleep(name):
    model = Function(SEEN[name])
    report = check_causality(model, SHAPE, encode=floats)
    assert not report.ok and report.leaks and "trials" in report.remark
    with pytest.raises(NotCausalError):
        accelerate(model, SHAPE, **GIVEN)


def test_trials_do_not_overrule_what_is_certain():
    """Pixel 0 depends on the last pixel, for certain but rarely; a difference of equals keeps ready times from saying
    in which order to draw."""

    def forward(x):
        flat = x.flatten(1)
        awake = torch.relu(flat @ torch.tensor([0.0] + [1.0] * 15) - 14)
        rest = torch.full_like(flat[:, 1:], 2.0) + (flat.sum(1, keepdim=True) - flat.sum(1, keepdim=True))
        return torch.cat(((12 * awake - 6).unsqueeze(1), rest), 1).view_as(x)

    sampler = accelerate(Function(forward), SHAPE, backend="naive", **GIVEN)
    images = sampler.sample(200, seed=0).flatten(1)
    full = images[:, 1:].all(1)
    assert full.sum() > 10 and images[full, 0].float().mean() > 0.9


def test_a_causal_model_is_proven():
    report = check_causality(nn.Sequential(DataMask(1, 6, 3, True), nn.ReLU(), DataMask(6, 3, 3)).eval(), SHAPE)
    assert report.ok and report.proven and str(report) == "causal"


@pytest.mark.parametrize("backend", ["auto", "naive", "fixed_point"])
def test_random_numbers_are_no_leak(backend):
    model = Function(lambda x: F.dropout(causal(x), 0.3)).eval()
    with pytest.raises(
        ValueError, match=r"another output for the same input.*F.dropout\(x, p, self.training\)"
    ) as caught:
        accelerate(model, SHAPE, backend=backend, **GIVEN)
    assert not isinstance(caught.value, NotCausalError) and "model.eval()" not in str(caught.value)
    with pytest.raises(ValueError, match="bernoulli"):
        check_causality(model, SHAPE)
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        check_causality(nn.Sequential(model, nn.Dropout(0.3)).train(), SHAPE)


def test_random_numbers_without_a_part_in_the_output_do_no_harm():
    model = Function(lambda x: causal(x) + 0 * torch.rand_like(x)).eval()
    assert check_causality(model, SHAPE).ok
    with pytest.warns(UserWarning, match="rand"):
        accelerate(model, SHAPE, **GIVEN)


def test_statistics_of_the_batch_in_eval_mode_are_not_blamed_on_training():
    model = nn.Sequential(DataMask(1, 3, 3, True), nn.BatchNorm2d(3, track_running_stats=False)).eval()
    report = check_causality(model, SHAPE)
    assert not report.ok and "keeps no statistics" in str(report) and "model.eval()" not in str(report)


class Columns(nn.Module):
    """Columns of a table with different numbers of levels; those that a column has not got have probability 0."""

    sizes = (2, 7, 16, 5)

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embeddings = nn.ModuleList(nn.Embedding(size, 8) for size in self.sizes)
        self.heads = nn.ModuleList(nn.Linear(8, size) for size in self.sizes)

    def forward(self, x):
        h, out = torch.zeros(len(x), 8), []
        for j, size in enumerate(self.sizes):
            out.append(F.pad(self.heads[j](h), (0, 16 - size), value=-float("inf")))
            h = torch.tanh(h + self.embeddings[j](x[:, 0, 0, j]))
        return torch.stack(out, 2).unsqueeze(2)


def test_columns_with_different_numbers_of_levels():
    given = {"distribution": Categorical(16, "B(KC)HW"), "encode": lambda levels: levels}
    images = [
        accelerate(Columns(), (1, 1, 4), backend=name, **given).sample(300, seed=0) for name in ("naive", "eager")
    ]
    assert torch.equal(*images)
    assert images[0].flatten(1).amax(0).tolist() == [size - 1 for size in Columns.sizes]


def test_bits_read_as_floats():
    table = torch.linspace(-1, 1, 4).view(torch.int32)
    model = nn.Sequential(DataMask(1, 6, 3, True), nn.ReLU(), DataMask(6, 4, 3)).eval()
    given = {"distribution": Categorical(4, "B(KC)HW"), "encode": lambda levels: table[levels].view(torch.float32)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler = accelerate(model, SHAPE, backend="eager", **given)
    assert torch.equal(sampler.sample(8, seed=0), accelerate(model, SHAPE, backend="naive", **given).sample(8, seed=0))


def test_parameters_are_picked_out_of_what_the_model_returns():
    for function, ok in ((causal, True), (lambda x: x, False)):
        model = Function(lambda x, function=function: {"params": function(x), "loss": x.sum()})
        report = check_causality(model, SHAPE, output=lambda found: found["params"])
        assert report.ok is ok
        with pytest.raises(TypeError, match="got dict: output= picks it out"):
            check_causality(model, SHAPE)


def test_wrong_arguments_are_named():
    model = Function(causal)
    wrong = [
        (TypeError, "model must be a torch.nn.Module, got NoneType", (None, SHAPE), {}),
        (TypeError, "model must be a torch.nn.Module, got function", (causal, SHAPE), {}),
        (ValueError, "shape must be", (model, (1, 4, 0)), {}),
        (ValueError, "shape must be", (model, None), {}),
        (TypeError, "encode must be callable or None, got int", (model, SHAPE), {"encode": 3}),
        (TypeError, "output must be callable or None, got int", (model, SHAPE), {"output": 3}),
        (TypeError, "channels_ordered must be a bool, got 'yes'", (model, SHAPE), {"channels_ordered": "yes"}),
        (ValueError, "levels must be an int >= 1, got 0", (model, SHAPE), {"levels": 0}),
        (TypeError, "levels must be an int, got '2'", (model, SHAPE), {"levels": "2"}),
        (ValueError, "model must return .B, ..., 4, 4., got the shape", (Function(torch.flatten), SHAPE), {}),
    ]
    for kind, message, args, options in wrong:
        with pytest.raises(kind, match=message):
            fastgen.check_causality(*args, **options)


def test_complex_weights_may_hide_what_they_multiply():
    """A causal convolution by a Fourier transform, as S4 has them: tried, not proven."""

    class Filtered(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(3, 2), nn.Linear(2, 3)
            self.kernels = nn.Parameter(torch.randn(2, 2, 6))

        def forward(self, tokens):
            x = torch.fft.rfft(self.embed(tokens).mT, n=12)
            first, second = torch.fft.rfft(self.kernels, n=12)
            y = torch.fft.irfft(x * first + x * second, n=12)[..., :6]
            return self.head(y.mT)

    model = Filtered().eval()
    given = {"distribution": Categorical(3, "BTK"), "encode": fastgen.shift_right(0)}
    with pytest.warns(UserWarning, match="not proven"):
        sampler = accelerate(model, (6,), **given)
    assert torch.equal(sampler.sample(8, seed=0), accelerate(model, (6,), backend="naive", **given).sample(8, seed=0))
