"""The engine: images at once, and passes of the model where rounding could have changed a draw."""

import warnings
from dataclasses import replace

import torch
from torch import nn

from fastgen import Categorical, accelerate
from fastgen.models import GatedPixelCNN, PixelCNN
from fastgen.sampling.machine.language import Product
from fastgen.sampling.run.cpu_player import images_at_once


def masked(rows):
    """A causal stack with residual connections, kernels with live taps in so many rows."""
    mask = torch.zeros(3, 3)
    mask[2 - rows : 1] = 1
    mask[1, 0] = 1
    first, second = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
    with torch.no_grad():
        first.weight *= mask
        mask[1, 1] = 1
        second.weight *= mask
    return nn.Sequential(first, nn.ReLU(), second, nn.Tanh(), nn.Conv2d(6, 4, 1))


def made(model, shape=(1, 6, 5), backend="eager"):
    distribution = getattr(model, "distribution", Categorical(4, layout="B(KC)HW"))
    sampler = accelerate(model.eval(), shape, distribution=distribution, backend=backend)
    return sampler, sampler._engine.plan


def test_large_batches_run_in_parts_that_fit_a_cache(monkeypatch):
    torch.manual_seed(0)
    sampler, plan = made(masked(2), backend="compiled")
    whole = sampler.sample(23, seed=0)
    assert sampler._engine.most == images_at_once(plan) > 1000
    monkeypatch.setattr(sampler._engine, "most", 8)
    sizes = []
    run = sampler._engine.run
    monkeypatch.setattr(sampler._engine, "run", lambda job: (sizes.append(job.n), run(job))[1])
    assert torch.equal(sampler.sample(23, seed=0), whole)
    assert sizes == [8, 8, 7]
    assert set(sampler._engine._players) == {23, 8, 7}
    wide, _ = made(PixelCNN((1, 4, 4), 4, channels=256, layers=15), (1, 4, 4), backend="compiled")
    assert wide._engine.most == 16


def test_shifts_of_cumulative_probabilities_decide_whether_a_pass_is_needed():
    """Errors of many logits cancel: steps move by much less than the greatest error of a logit allows."""
    torch.manual_seed(0)
    model = GatedPixelCNN((1, 8, 8), 64, channels=32, layers=2).eval()
    sampler, naive = (
        accelerate(model, model.shape, distribution=model.distribution, backend=backend)
        for backend in ("eager", "naive")
    )
    engine = sampler._engine
    sampler.sample(16, seed=0)
    (shift,) = engine._shifts.values()
    assert 0 < shift < 0.1 * engine.error
    passes = []
    run = engine.run
    engine.run = lambda job: passes.append((drawn := run(job)).passes) or drawn
    for seed in range(1, 6):
        assert torch.equal(sampler.sample(16, seed=seed), naive.sample(16, seed=seed))
    assert sum(passes) == 0
    sampler.sample(16, seed=9, temperature=0.5)  # other steps, whose shift is not known
    sampler.sample(16, seed=9, top_k=3)  # no steps
    assert len(engine._shifts) <= 2
    engine._shifts = dict.fromkeys(engine._shifts, 1e-3)  # as if the engine were that far off
    sampler.sample(16, seed=1)
    assert passes[-1] == 1


def test_what_a_wrong_draw_changed_is_drawn_again():
    """An engine that is off by a hundredth is put right by the model's own passes."""
    model = PixelCNN((1, 12, 5), 3, channels=6, layers=2).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)
    fast, naive = (
        accelerate(model, model.shape, distribution=model.distribution, backend=one) for one in ("eager", "naive")
    )
    engine = fast._engine
    assert engine.plan.rings
    for program in engine.plan.programs:
        for instruction in program.instructions:
            if isinstance(instruction, Product):
                weight = instruction.weight.memory.data
                weight += 1e-2 * torch.randn_like(weight)
    passes, done = [], []
    run = engine.run
    engine.run = lambda job: passes.append((drawn := run(replace(job, progress=done.append))).passes) or drawn
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(4):
            assert torch.equal(fast.sample(3, seed=seed), naive.sample(3, seed=seed))
    assert max(passes) > 1 and "more than rounding" in str(caught[0].message)
    assert sum(done) == 4 * 12 * 5  # of what is drawn again nothing is counted twice
