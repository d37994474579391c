"""Samplers in company: threads, models that keep something of a pass, changes in between, copies."""

import copy
import pickle
import threading

import pytest
import torch
from causal_models import MaskedConv, Stranger, small
from torch import nn

from fastgen import Bernoulli, Categorical, accelerate
from fastgen.models import GatedPixelCNN

SHAPE, DISTRIBUTION = (1, 4, 4), Categorical(4, "B(KC)HW")
BACKENDS = ("naive", "fixed_point", "eager", "compiled")


def in_threads(calls, rounds=4):
    """Results of each call, made again and again in a thread of its own."""
    found, errors = [[] for _ in calls], []

    def work(number):
        try:
            found[number] += [calls[number]() for _ in range(rounds)]
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    return found


@pytest.mark.parametrize("shared", ["the sampler", "the model"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_take_turns(backend, shared):
    model = GatedPixelCNN((1, 5, 5), 6, channels=8, layers=2).eval()
    samplers = [accelerate(model, model.shape, distribution=model.distribution, backend=backend) for _ in range(2)]
    if shared == "the sampler":
        samplers[1] = samplers[0]
    expected = [sampler.sample(8, seed=seed) for seed, sampler in enumerate(samplers)]
    calls = [lambda k=k: samplers[k].sample(8, seed=k) for k in range(2)]
    for images, right in zip(in_threads(calls), expected, strict=True):
        assert all(torch.equal(one, right) for one in images)


def test_threads_may_mix_what_they_ask_for():
    model, shape, distribution = small("grey")
    sampler = accelerate(model, shape, distribution=distribution)
    images = torch.randint(5, (3, *shape))
    expected = sampler.sample(4, seed=0), sampler.params(images), model.second.weight.clone()
    sample, params, text = in_threads(
        [lambda: sampler.sample(4, seed=0), lambda: sampler.params(images), lambda: sampler.explain()]
    )
    assert all(torch.equal(one, expected[0]) for one in sample)
    assert all(torch.equal(one, expected[1]) for one in params)
    assert torch.equal(model.second.weight, expected[2]) and len(set(text)) == 1


class Keeps(nn.Module):
    """Keeps of its first batch: a plane of ones, a buffer, an entry of a dict and of a list; counts its passes."""

    fails = False

    def __init__(self):
        super().__init__()
        self.first, self.out = MaskedConv(1, 8, 3, True), nn.Conv2d(9, 4, 1)
        self.ones, self.seen, self.sizes, self.passes = None, {}, [], 0
        self.register_buffer("plane", None)
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x):
        self.passes += 1
        self.total += 1
        if self.ones is None:
            self.ones = torch.ones_like(x)
            self.plane = torch.ones_like(x)
        self.seen.setdefault("ones", torch.ones_like(x))
        self.sizes.append(len(x))
        if Keeps.fails:
            raise ArithmeticError("in the model")
        return self.out(torch.cat((self.first(x), self.ones * self.seen["ones"] * self.plane), 1))


def as_found(model, state):
    plain = (model.ones, model.seen, model.sizes, model.passes, model.plane) == (None, {}, [], 0, None)
    now = model.state_dict()
    return plain and now.keys() == state.keys() and all(torch.equal(now[name], state[name]) for name in state)


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_the_model_is_left_as_it_was_found(backend, monkeypatch):
    model = Keeps().eval()  # its weights are not masked yet, which its first own pass would do
    state = copy.deepcopy(model.state_dict())
    assert bool((model.first.weight[:, :, 1:, 1:] != 0).any())
    graph = model.out(model.first.weight.sum() * torch.ones(1, 9, 1, 1)).sum()  # waits for its backward pass
    sampler = accelerate(model, SHAPE, distribution=DISTRIBUTION, backend=backend, verify="always")
    assert as_found(model, state)
    images = []
    for n in (4, 4, 8, 1):
        images.append(sampler.sample(n, seed=0))
        assert as_found(model, state)
    sampler.sample(5, seed=0, batch_size=3)
    sampler.params(images[0])
    assert as_found(model, state)
    accelerate(model, SHAPE, distribution=DISTRIBUTION, backend=backend)
    if backend in ("naive", "fixed_point", "eager"):
        monkeypatch.setattr(Keeps, "fails", True)
        with pytest.raises(ArithmeticError, match="in the model"):
            sampler.sample(4, seed=0)
        assert as_found(model, state)
        monkeypatch.setattr(Keeps, "fails", False)
    assert torch.equal(sampler.sample(4, seed=0), images[0])
    graph.backward()
    model(torch.zeros(2, *SHAPE))
    assert model.passes == 1  # it keeps what it likes when others call it
    left = model.ones, model.seen["ones"], model.plane
    assert torch.equal(sampler.sample(4, seed=0), images[0])  # which what is kept of two images does not fit
    assert all(a is b for a, b in zip(left, (model.ones, model.seen["ones"], model.plane), strict=True))
    assert (model.passes, model.sizes) == (1, [2])


def test_its_own_masking_is_no_change(monkeypatch):
    """Weights that a pass masks count as the same before and after: nothing is analysed again."""
    from fastgen.sampling import backends

    built = []
    build = backends.build_engine
    monkeypatch.setattr(backends, "build_engine", lambda *given: (built.append(1), build(*given))[1])
    model = Keeps().eval()
    sampler = accelerate(model, SHAPE, distribution=DISTRIBUTION)
    sampler.sample(2, seed=0)
    model.first.weight.data *= model.first.mask
    sampler.sample(2, seed=0)
    assert len(built) == 1
    model.first.weight.data[0, 0, 0, 0] += 1
    sampler.sample(2, seed=0)
    assert len(built) == 2


def test_new_values_make_no_new_plan(monkeypatch):
    """Unless zeros came or went."""
    from fastgen.sampling import backends

    built = []
    build = backends.build_engine
    monkeypatch.setattr(backends, "build_engine", lambda *given: (built.append(1), build(*given))[1])
    model = Stranger(1, 4).eval()
    model(torch.zeros(1, *SHAPE))
    sampler = accelerate(model, SHAPE, distribution=DISTRIBUTION, backend="eager")
    sampler.sample(2, seed=0)
    for change in (lambda: model.head.weight.data.mul_(1.1), lambda: model.first.bias.data.add_(0.1)):
        change()
        naive = accelerate(model, SHAPE, distribution=DISTRIBUTION, backend="naive")
        assert torch.equal(sampler.sample(2, seed=0), naive.sample(2, seed=0))
        assert sampler.stats.passes == 1 and sampler.stats.error < 1e-5  # measured anew
    assert len(built) == 1
    model.head.weight.data[0, 0] = 0
    sampler.sample(2, seed=0)
    assert len(built) == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_of_others_changes_nothing(dtype):
    """Some packages set it when they are imported."""
    model, shape, distribution = small("grey")
    samplers = [accelerate(model, shape, distribution=distribution, backend=one) for one in ("auto", "eager")]
    expected = samplers[0].sample(3, seed=0)
    try:
        torch.set_default_dtype(dtype)
        for sampler in (*samplers, accelerate(model, shape, distribution=distribution)):
            assert torch.equal(sampler.sample(3, seed=0), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_autocast_around_a_call_is_another_model():
    model = Stranger(1, 4).eval()
    sampler, naive = (accelerate(model, SHAPE, distribution=DISTRIBUTION, backend=one) for one in ("eager", "naive"))
    before = sampler.sample(4, seed=0)
    with torch.autocast("cpu", torch.bfloat16):
        sampler.sample(4, seed=0)
        assert sampler.stats.passes == 0 and "half precision" in sampler.explain()
    assert torch.equal(sampler.sample(4, seed=0), before) and "half precision" not in sampler.explain()
    assert torch.equal(before, naive.sample(4, seed=0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_inference_mode_leaves_nothing_behind(backend):
    model = Stranger(1, 4).eval()
    sampler = accelerate(model, SHAPE, distribution=DISTRIBUTION, backend=backend)
    with torch.inference_mode():
        images = sampler.sample(3, seed=0)
    assert torch.equal(sampler.sample(3, seed=0), images)
    images += 1  # a tensor like any other


def test_pickles_leave_out_the_memory():
    model, shape, distribution = small("grey")
    sampler = accelerate(model, shape, distribution=distribution)
    fresh = len(pickle.dumps(sampler))
    expected = sampler.sample(64, seed=0)
    assert len(pickle.dumps(sampler)) < 1.2 * fresh
    twin = pickle.loads(pickle.dumps(sampler))
    assert "not analysed" in twin.explain()
    assert torch.equal(twin.sample(64, seed=0), expected)


def test_real_numbers_are_not_cut_to_levels():
    class Normal:
        def noise_shape(self, n, shape):
            return (n, *shape)

        def draw(self, params, noise, channel, previous):
            return params[:, 0] + torch.special.ndtri(noise[:, channel].clamp(1e-6, 1 - 1e-6))

        def log_prob(self, params, levels):
            return torch.zeros(len(levels))

    with pytest.raises(TypeError, match=r"draw must return integer levels, got torch.float32 from Normal"):
        accelerate(Stranger(1, 1).eval(), SHAPE, distribution=Normal(), encode=lambda x: x.float())


def test_bernoulli_models_share_a_model_with_others():
    """Two samplers of other distributions over one model, in turns."""
    model = Stranger(1, 1).eval()
    first = accelerate(model, SHAPE, distribution=Bernoulli())
    second = accelerate(model, SHAPE, distribution=Bernoulli(), encode=lambda x: 2 * x.float())
    expected = first.sample(3, seed=0), second.sample(3, seed=0)
    for _ in range(2):
        assert torch.equal(first.sample(3, seed=0), expected[0])
        assert torch.equal(second.sample(3, seed=0), expected[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_pass_of_the_users_gave_stays_the_users(backend):
    """Though the model keeps it, too; and what the user sets beside what passes write counts."""

    class KeepsOutput(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.out, self.config = inner, None, {"sign": 1, "batch": 0}

        def forward(self, x):
            self.config["batch"] = len(x)
            self.out = self.config["sign"] * self.inner(x)
            return self.out

    model = KeepsOutput(Stranger(1, 4)).eval()
    with torch.no_grad():
        model(torch.zeros(2, *SHAPE))
        sampler = accelerate(model, SHAPE, distribution=DISTRIBUTION, backend=backend, verify="always")
        mine = model(torch.ones(2, *SHAPE))
        before = mine.clone()
        sampler.sample(4, seed=0)
        assert torch.equal(mine, before) and model.out is mine
        model.config["sign"] = -1
        images = sampler.sample(4, seed=0)
    fresh = accelerate(model, SHAPE, distribution=DISTRIBUTION, backend="naive")
    assert torch.equal(images, fresh.sample(4, seed=0))


def test_what_the_user_has_left_in_a_cache_stays_there():
    """A buffer written in place and how much of it is filled, as caches of rotary embeddings have them."""

    class Rotary(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.filled = inner, 0
            self.register_buffer("cache", torch.zeros(16))

        def forward(self, x):
            if not self.filled:
                self.cache[:4] = torch.arange(1.0, 5.0)
                self.filled = 4
            return self.inner(x * self.cache[:4])

    for backend in BACKENDS:
        model = Rotary(Stranger(1, 4)).eval()
        sampler = accelerate(model, SHAPE, distribution=DISTRIBUTION, backend=backend, verify="always")
        x = torch.randn(2, *SHAPE)
        output = model(x)
        images = sampler.sample(4, seed=0)
        assert torch.equal(model(x), output) and model.filled == 4
        assert torch.equal(sampler.sample(4, seed=0), images)
