"""Whole passes make sure of the images: when, what they find, and that only what they find wrong is drawn again."""

import re
import warnings

import pytest
import torch
from causal_models import Stranger
from torch import nn

from fastgen import Categorical, accelerate
from fastgen.models import PixelCNN
from fastgen.sampling.run import engine, passes
from fastgen.sampling.run.draw_loop import draw_batch
from tests.sampling.exactness import assert_exact, pair

SHAPE, DISTRIBUTION = (1, 6, 5), Categorical(5, "B(KC)HW")


class OffLater(nn.Module):
    """What its own passes give is off from what was analysed, by up to `OffLater.by`."""

    by = 0.0

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        params = self.inner(x)
        pattern = torch.arange(params[0].numel(), dtype=params.dtype).mul(0.7).sin().view(params.shape[1:])
        return params + OffLater.by * pattern


@pytest.fixture
def off(monkeypatch):
    def make(inner, shape, distribution, backend="eager", **options):
        fast, naive = pair(OffLater(inner).eval(), shape, backend, distribution=distribution, **options)
        monkeypatch.setattr(OffLater, "by", 0.02)
        return fast, naive

    return make


@pytest.fixture
def batches(monkeypatch):
    """The requests that were drawn."""
    found = []
    monkeypatch.setattr(engine, "draw_batch", lambda player, one: (found.append(one), draw_batch(player, one))[1])
    return found


CASES = {
    "grey": (lambda: Stranger(1, 5), SHAPE, DISTRIBUTION),
    "colours": (lambda: PixelCNN((3, 6, 4), 3, channels=9, layers=2), (3, 6, 4), Categorical(3)),
}


@pytest.mark.filterwarnings("ignore:the engine's output differs")
@pytest.mark.parametrize(
    ("name", "verify", "backend", "patience"),
    [
        ("grey", "auto", "eager", 100),
        ("grey", "auto", "compiled", 0),
        ("grey", "always", "compiled", 0),
        ("colours", "auto", "compiled", 100),
        ("colours", "auto", "eager", 0),
        ("colours", "always", "eager", 0),
    ],
)
def test_only_images_that_differ_are_drawn_on_from_their_first_wrong_place(
    name, verify, backend, patience, off, batches, monkeypatch
):
    monkeypatch.setattr(passes, "PATIENCE", patience)
    make, shape, distribution = CASES[name]
    fast, naive = off(make(), shape, distribution, backend, verify=verify)
    known = torch.randint(3, shape)
    mask = torch.rand(12, *shape) < 0.2
    redrawn, done = 0, []
    for seed in range(3):
        for given in ({}, {"known": known, "known_mask": mask}):
            batches.clear()
            expected, nats = naive.sample(12, seed=seed, return_log_prob=True, **given)
            images, found = fast.sample(12, seed=seed, return_log_prob=True, **given)
            assert torch.equal(images, expected)
            torch.testing.assert_close(found, nats, atol=1, rtol=1e-2)  # as far off as the parameters are
            redrawn += fast.stats.redrawn
            trials = 2 if verify == "auto" and patience == 0 else 0  # of a quarter and of a half of the images
            assert 1 <= fast.stats.passes <= len(batches) + trials
            whole, *again = batches
            assert whole.n == 12 and (fast.stats.redrawn > 0) == bool(again)
            for one in again:  # few images, of each something is known, and what is known is right
                assert one.n < 12 and one.n.bit_count() == 1 and one.known_mask.flatten(1).any(1).all()
                assert one.progress is None
                rows = [(expected == levels).flatten(1).sum(1).argmax() for levels in one.known]
                assert all(
                    (expected[k] == levels)[seen].all()
                    for k, levels, seen in zip(rows, one.known, one.known_mask, strict=True)
                )
            done.append(fast.stats.error)
    assert redrawn > 3
    assert all(0.01 < error < 0.03 for error in done)


@pytest.mark.filterwarnings("ignore:the engine's output differs")
def test_images_that_stay_wrong_are_drawn_by_whole_passes(off, monkeypatch):
    monkeypatch.setattr(engine, "MOST_CORRECTIONS", 1)
    fast, naive = off(Stranger(1, 5), SHAPE, DISTRIBUTION)
    expected, nats = naive.sample(12, seed=0, return_log_prob=True)
    images, found = fast.sample(12, seed=0, return_log_prob=True)
    assert torch.equal(images, expected)
    torch.testing.assert_close(found, nats)
    assert fast.stats.passes > 2


def counted(model):
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    return passes


def test_never_makes_no_pass_and_always_one_a_batch():
    model = Stranger(1, 5).eval()
    never, naive = pair(model, SHAPE, verify="never", distribution=DISTRIBUTION)
    always, _ = pair(model, SHAPE, distribution=DISTRIBUTION)
    auto, _ = pair(model, SHAPE, verify="auto", distribution=DISTRIBUTION)
    passes = counted(model)
    never.sample(4, seed=0)
    assert never.stats.passes == len(passes) == 0 and never.stats.error is None
    assert "verify never: no whole pass" in never.explain() and "not measured" in never.explain()
    always.sample(6, seed=0, batch_size=2)
    assert always.stats.passes == len(passes) == 3
    assert "guaranteed" in always.explain()
    passes.clear()
    auto.sample(4, seed=0)
    assert auto.stats.passes == len(passes) == 1
    assert "measured" in auto.explain() and "not measured yet" not in auto.explain()
    for one in (never, always, auto):
        assert torch.equal(one.sample(4, seed=1), naive.sample(4, seed=1))


def test_auto_asks_for_a_pass_where_a_draw_is_near_a_step():
    model = Stranger(1, 5).eval()
    fast, naive = pair(model, SHAPE, verify="auto", distribution=DISTRIBUTION)
    assert_exact(fast, naive, 4, seed=0)
    with torch.no_grad():
        share = model(torch.zeros(2, *SHAPE))[0, :, 0, 0].double().softmax(0).cumsum(0)
    noise = torch.full((2, *SHAPE), 0.5)
    noise[1, 0, 0, 0] = share[2].float()
    assert_exact(fast, naive, 2, passes=1, seed=1)  # the first of two images
    assert_exact(fast, naive, 2, passes=1, noise=noise)
    noise[1, 0, 0, 0] += 1e-3
    assert_exact(fast, naive, 2, passes=0, noise=noise)


class OfSize(nn.Module):
    """Another model for batches of some sizes."""

    def __init__(self, inner, sizes):
        super().__init__()
        self.inner, self.sizes = inner, sizes

    def forward(self, x):
        return self.inner(x) * (-1 if len(x) in self.sizes else 1)


@pytest.mark.parametrize("sizes", [(1,), (5, 6, 7, 8)])
def test_the_first_batch_of_each_size_is_looked_at(sizes):
    model = OfSize(Stranger(1, 5), sizes).eval()
    auto, naive = (accelerate(model, SHAPE, distribution=DISTRIBUTION, backend=one) for one in ("eager", "naive"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the engine is far off
        for n in (3, 1, 4, 5, 3):
            assert torch.equal(auto.sample(n, seed=0), naive.sample(n, seed=0))
    assert auto.stats.backend == "eager"


def test_half_precision_is_drawn_without_a_pass_and_says_how_far_off_it_is():
    model = Stranger(1, 5).eval().bfloat16()
    fast = accelerate(model, SHAPE, distribution=DISTRIBUTION, backend="eager")
    passes = counted(model)
    fast.sample(4, seed=0)
    assert fast.stats.passes == len(passes) == 0
    text = fast.explain()
    assert len(passes) == 1 and "half precision" in text
    margin = float(re.search(r"margin: (\S+) in a parameter", text)[1])
    assert 1e-3 < margin < 0.5
    assert fast.explain() == text and len(passes) == 1
    always, naive = pair(model, SHAPE, distribution=DISTRIBUTION)
    assert torch.equal(always.sample(4, seed=0), naive.sample(4, seed=0))
    assert always.stats.passes >= 1


def test_stats_are_those_of_the_latest_call():
    model = Stranger(1, 5).eval()
    fast, naive = pair(model, SHAPE, "compiled", distribution=DISTRIBUTION)
    assert fast.stats is None
    fast.sample(5, seed=0, batch_size=3)
    first = fast.stats
    assert (first.backend, first.passes, first.redrawn, first.launches) == ("compiled", 2, 0, None)
    assert 0 < first.error < 1e-5 and first.seconds > 0
    fast.sample(1, seed=0)
    assert fast.stats is not first and fast.stats.passes == 1 and first.passes == 2
    naive.sample(2, seed=0)
    assert (naive.stats.backend, naive.stats.passes, naive.stats.error) == ("naive", 30, None)
    fixed = accelerate(model, SHAPE, distribution=DISTRIBUTION, backend="fixed_point")
    fixed.sample(2, seed=0)
    assert fixed.stats.backend == "fixed_point" and 2 <= fixed.stats.passes < 30
    fixed.sample(0)
    assert fixed.stats.passes == 0
