"""When a model is analysed, and again; what is refused, and what falls back."""

import math
import types
import warnings

import pytest
import torch
from causal_models import Stranger, small
from torch import nn
from torch.nn import functional as F

from fastgen import Bernoulli, Categorical, NotCausalError, accelerate, shift_right
from fastgen.models import GatedPixelCNN
from fastgen.sampling import Sampler
from fastgen.sampling.backends import MOST_KINDS
from fastgen.sampling.trace.graph import Unsupported
from fastgen.sampling.whole_pass import FixedPoint


@pytest.fixture
def engines(monkeypatch):
    """A stand-in for the engine, which counts what is built and refuses for the reason `refused`."""
    state = types.SimpleNamespace(built=[], refused=None)

    def build_engine(network, distribution, backend, verify):
        if state.refused is not None:
            raise Unsupported(state.refused)
        state.built.append(network.condition)
        return FixedPoint(network.model, network.shape, network.encode)

    monkeypatch.setattr("fastgen.sampling.backends.build_engine", build_engine)
    return state


def test_a_changed_model_is_analysed_again(engines):
    model, shape, distribution = small("grey")
    model.register_buffer("counter", torch.zeros(3))
    sampler = accelerate(model, shape, distribution=distribution)
    assert len(engines.built) == 1
    sampler.sample(1)
    sampler.sample(3, temperature=0.5)
    assert len(engines.built) == 1

    def step():
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        model(torch.rand(2, 1, 5, 4)).sum().backward()
        optimizer.step()

    def swap_two_weights():
        model.head.weight.data[[0, 1]] = model.head.weight.data[[1, 0]]

    changes = {
        "optimizer": step,
        "state_dict": lambda: model.load_state_dict(model.state_dict() | {"head.bias": torch.ones(5)}),
        "data": swap_two_weights,
        "buffer": lambda: model.counter.add_(1),
        "dtype": model.double,
        "mode": model.train,
        "module": lambda: setattr(model, "first", nn.Sequential(model.first)),
        "nan": lambda: model.counter.fill_(math.nan),
    }
    for count, (name, change) in enumerate(changes.items(), 2):
        change()
        sampler.sample(1)
        sampler.sample(1)
        assert len(engines.built) == count, name


def test_engines_are_built_with_the_condition_of_two_images(engines):
    model = Stranger(1, 5, classes=3).eval()
    options = {"distribution": Categorical(5, "B(KC)HW")}
    for condition in (2, torch.tensor([2]), torch.tensor([2, 1, 0]), torch.tensor([[2]])[0]):
        engines.built.clear()
        sampler = accelerate(model, (1, 3, 3), condition=condition, **options)
        sampler.sample(1, condition=1)
        sampler.sample(4, condition=torch.tensor([0, 1, 2, 0]))
        assert len(engines.built) == 1
        assert engines.built[0].shape == (2,) and engines.built[0][0] == 2
    engines.built.clear()
    late = accelerate(model, (1, 3, 3), **options)
    assert engines.built == []
    late.sample(5, condition=1)
    assert len(engines.built) == 1


def test_another_kind_of_condition_is_analysed_again(engines):
    class Optional(Stranger):
        def forward(self, x, bias=None):
            return super().forward(x) + (0 if bias is None else bias[:, :1, None, None])

    sampler = accelerate(Optional(1, 1).eval(), (1, 3, 3), distribution=Bernoulli())
    sampler.sample(2)
    assert len(engines.built) == 1
    sampler.sample(2, condition=torch.zeros(2, 1))
    sampler.sample(3, condition=torch.ones(3, 1))
    assert len(engines.built) == 2
    sampler.sample(2, condition=torch.zeros(2, 4))
    assert len(engines.built) == 3
    sampler.sample(2)
    sampler.sample(2, condition=torch.ones(1, 1))
    assert len(engines.built) == 3  # those made before still serve
    for width in range(5, 5 + MOST_KINDS):
        sampler.sample(2, condition=torch.zeros(2, width))
    sampler.sample(2)
    assert len(engines.built) == 3 + MOST_KINDS + 1  # a few of them, the oldest gone


def test_what_the_engine_cannot_take_falls_back_with_a_warning(engines):
    model, shape, distribution = small("grey")
    engines.refused = "aten::fft is not known"
    with pytest.warns(UserWarning, match="fixed_point backend: aten::fft is not known") as caught:
        sampler = accelerate(model, shape, distribution=distribution, backend="eager")
    assert caught[0].filename == __file__
    assert isinstance(sampler, Sampler) and "because aten::fft is not known" in sampler.explain()
    expected = accelerate(model, shape, distribution=distribution, backend="naive").sample(3, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(sampler.sample(3, seed=0), expected)
    engines.refused = None
    model.head.bias.data += 1
    sampler.sample(1)
    assert "fallback" not in sampler.explain()


def test_only_a_missing_condition_puts_the_analysis_off():
    class Fails(nn.Module):
        def __init__(self, fail):
            super().__init__()
            self.fail = fail

        def forward(self, x, label=None):
            return self.fail(x, label)

    waiting = (lambda x, label: F.embedding(label, x), lambda x, label: x * label[0], lambda x, label: label.foo)
    for fail in waiting:
        assert "fails without" in accelerate(Fails(fail), (1, 2, 2), distribution=Bernoulli()).explain()
    model = GatedPixelCNN((1, 4, 4), 4, channels=8, layers=1, n_classes=2).eval()
    assert "fails without" in accelerate(model, (1, 4, 4), distribution=model.distribution).explain()
    with pytest.raises(RuntimeError, match="size of tensor"):
        accelerate(Fails(lambda x, label: x + x[..., :1].expand(2, 1, 2, 3)), (1, 2, 2), distribution=Bernoulli())
    with pytest.raises(ValueError, match=r"x must have the shape \(B, 1, 4, 4\)"):
        accelerate(GatedPixelCNN((1, 4, 4), 4, channels=8, layers=1).eval(), (1, 5, 4), distribution=Categorical(4))


@pytest.mark.parametrize("backend", ["auto", "naive", "eager", "fixed_point"])
def test_a_leak_is_an_error_for_every_backend(backend):
    class Sees(nn.Module):
        def forward(self, x):
            return x.roll(-1, -1)

    with pytest.raises(NotCausalError, match="not causal") as caught:
        accelerate(Sees(), (1, 3, 3), distribution=Bernoulli(), backend=backend)
    assert not caught.value.report.ok and caught.value.report.leaks


@pytest.mark.parametrize("backend", ["naive", "eager"])
def test_a_normalization_in_training_mode_is_a_leak_and_keeps_its_statistics(backend):
    model = nn.Sequential(Stranger(1, 1), nn.BatchNorm2d(1))
    with pytest.raises(NotCausalError, match="eval"):
        accelerate(model, (1, 3, 3), distribution=Bernoulli(), backend=backend)
    assert model[1].num_batches_tracked == 0 and model[1].running_mean == 0
    accelerate(model.eval(), (1, 3, 3), distribution=Bernoulli(), backend=backend)


def test_an_analysis_runs_the_model_three_times():
    """On two images, and recorded on each of them, which must agree with the first run."""
    model, calls = Stranger(1, 5).eval(), []
    model.register_forward_pre_hook(lambda _, given: calls.append(len(given[0])))
    sampler = accelerate(model, (1, 5, 4), distribution=Categorical(5, "B(KC)HW"), backend="eager")
    assert calls == [2, 1, 1] and "eager:" in sampler.explain()


def packed(dtype):
    """A causal model of 12 tokens whose last layer has its weights packed for this arithmetic."""
    network = nn.Sequential(nn.Embedding(6, 8), nn.Linear(8, 6)).eval()
    return torch.ao.quantization.quantize_dynamic(network, {nn.Linear}, dtype=dtype)


@pytest.mark.filterwarnings("ignore:.*quantiz:DeprecationWarning")
def test_packed_weights_are_compared_by_which_they_are():
    sampling = {"distribution": Categorical(6, "BTK"), "encode": shift_right(0)}
    model = packed(torch.float16)
    with pytest.warns(UserWarning, match="linear_dynamic_fp16"):
        sampler = accelerate(model, (12,), **sampling)
    naive = accelerate(model, (12,), backend="naive", **sampling)
    assert torch.equal(sampler.sample(3, seed=0), naive.sample(3, seed=0))
    with pytest.raises(NotCausalError, match="linear_dynamic"):  # its scale is that of all tokens of all texts
        accelerate(packed(torch.qint8), (12,), **sampling)
