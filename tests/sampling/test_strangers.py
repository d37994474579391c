"""What strangers' modules do besides computing: state of their own, values read, branches, other people's wrappers."""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastgen
from fastgen import Categorical, accelerate
from tests.sampling.zoo_case import DataMask, Function

SHAPE, DISTRIBUTION, N = (1, 4, 4), Categorical(3, "B(KC)HW"), 4


class Model(nn.Module):
    """Two masked layers with something of a stranger's in between."""

    def __init__(self, between):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.out = DataMask(1, 6, 3, True), DataMask(6, 6, 3), nn.Conv2d(6, 3, 1)
        self.between = between

    def forward(self, x):
        return self.out(F.elu(self.second(F.elu(self.between(3 * self.first(x))))))


def drawn(model, n=N, seed=0, backend="naive", sampler=None):
    sampler = sampler or accelerate(model, SHAPE, distribution=DISTRIBUTION, backend=backend)
    return sampler.sample(n, noise=torch.rand(sampler.noise_shape(n), generator=torch.Generator().manual_seed(seed)))


class CachesTheFirstBatch(nn.Module):
    """Keeps a map as large as the first batch that it sees."""

    ones = None

    def forward(self, x):
        if self.ones is None:
            self.ones = torch.ones_like(x)
        return x + self.ones


class CountsCalls(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.total += 1
        return x


FAITHFUL = {
    "numpy's constants": lambda: Function(lambda x: x * torch.from_numpy(np.linspace(0, 1, 4, dtype=np.float32))),
    "asserts on values": lambda: Function(lambda x: x if torch.isfinite(x).all() else None),
    "detached data": lambda: Function(lambda x: x.data * 2),
    "vmap": lambda: Function(torch.vmap(torch.sin)),
    "autocast": lambda: Function(lambda x: _autocast(x)),
    "a checkpointed part": lambda: Function(
        lambda x: torch.utils.checkpoint.checkpoint(torch.tanh, x, use_reentrant=False)
    ),
    "spectral normalization": lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(6, 6, 1)),
    "a traced part": lambda: torch.jit.trace(nn.Conv2d(6, 6, 1), torch.rand(1, 6, 4, 4)),
    "a count of its calls": CountsCalls,
    "a permutation by a seed": lambda: Function(_permuted),
    "inference mode": lambda: Function(_normalized),
    "never a batch of one": lambda: Function(lambda x: x * (1 if x.shape[0] > 1 else None)),
}


def _permuted(x):
    return x[:, torch.randperm(6, generator=torch.Generator().manual_seed(1))]


@torch.inference_mode()
def _normalized(x):
    return (F.layer_norm(x.movedim(1, -1), (6,)) @ torch.eye(6)).movedim(-1, 1)


def _autocast(x):
    with torch.autocast("cpu", torch.bfloat16):
        return F.conv2d(x, torch.eye(6)[:, :, None, None]).float()


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("name", FAITHFUL)
def test_accelerated_as_it_is(name):
    model = Model(FAITHFUL[name]()).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler = accelerate(model, SHAPE, distribution=DISTRIBUTION, backend="eager")
        for seed in range(2):
            assert torch.equal(drawn(model, seed=seed, sampler=sampler), drawn(model, seed=seed))


SLOWER = {
    "numpy's functions": lambda x: torch.from_numpy(np.tanh(x.detach().numpy())),
    "a list of values": lambda x: torch.tensor(x.tolist()),
    "the mean of the batch": lambda x: x - x.mean(0, keepdim=True),
    "the first of the batch": lambda x: x - x[:1],
    "the size of the batch": lambda x: x * x.shape[0],
    "the size of a batch that is never one": lambda x: x * (x.shape[0] if x.shape[0] > 1 else None),
}


@pytest.mark.parametrize("name", SLOWER)
def test_what_cannot_be_followed_is_drawn_by_whole_passes(name):
    """Values that leave PyTorch, and images that know of each other: never taken for constants."""
    model = Model(Function(SLOWER[name])).eval()
    with pytest.warns(UserWarning, match="falls back"):
        sampler = accelerate(model, SHAPE, distribution=DISTRIBUTION, backend="eager")
    assert torch.equal(drawn(model, sampler=sampler), drawn(model))


def test_the_model_is_left_as_it_was():
    model = Model(CachesTheFirstBatch()).eval()
    model.first(torch.rand(1, *SHAPE))  # masks its weight
    before = copy.deepcopy(model.state_dict())
    accelerate(model, SHAPE, distribution=DISTRIBUTION, backend="eager")
    fastgen.check_causality(model, SHAPE)
    assert model.between.ones is None
    assert model(torch.rand(5, *SHAPE)).shape[0] == 5  # and may be used with a batch of its own
    for key, value in model.state_dict().items():
        if key != "second.weight":  # its mask is applied in forward
            assert torch.equal(value, before[key])


CHANGES = {
    "a plain attribute": lambda model: setattr(model.between, "negative_slope", 2.0),
    "a plain tensor": lambda model: model.scale.mul_(torch.tensor([3.0, 0.3, 1.0]).view(3, 1, 1)),
    "a module": lambda model: setattr(model, "out", nn.Conv2d(6, 3, 1)),
    "a mask": lambda model: model.second.mask[:, :, 0].zero_(),
    "the dtype": lambda model: model.double(),
}


class Scaled(Model):
    def __init__(self):
        super().__init__(nn.LeakyReLU(0.1))
        self.scale = torch.ones(3, 1, 1)

    def forward(self, x):
        return super().forward(x) * self.scale


@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_noticed(name):
    model = Scaled().eval()
    sampler = accelerate(model, SHAPE, distribution=DISTRIBUTION, backend="eager")
    before = drawn(model, n=16, sampler=sampler)
    CHANGES[name](model)
    after = drawn(model, n=16, sampler=sampler)
    assert torch.equal(after, drawn(model, n=16))
    assert name == "the dtype" or not torch.equal(after, before)


def test_statistics_of_the_batch_leak_whenever_they_come():
    model = nn.Sequential(DataMask(1, 6, 3, True), nn.BatchNorm2d(6), nn.Conv2d(6, 3, 1)).eval()
    sampler = accelerate(model, SHAPE, distribution=DISTRIBUTION, backend="eager")
    sampler.sample(2, seed=0)
    model.train()
    with pytest.raises(fastgen.NotCausalError, match=r"eval\(\)"):
        sampler.sample(2, seed=0)
    model.eval()
    model[1] = nn.BatchNorm2d(6, track_running_stats=False).eval()
    with pytest.raises(fastgen.NotCausalError):
        sampler.sample(2, seed=0)
