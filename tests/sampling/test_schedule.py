"""When things are computed: rows at once where they can, memory shared where it can, batches as they run best."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from fastgen import Categorical, accelerate
from fastgen.models import GatedPixelCNN, PixelCNN
from fastgen.sampling.plan import plan as plans
from fastgen.sampling.plan.temporaries import share_scratch
from fastgen.sampling.rules.convolution import Convolution
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


def convolutions(plan):
    return [value for value in plan.timed.computed if isinstance(plan.timed.rules[value.index], Convolution)]


@pytest.mark.parametrize("backend", ["eager", "compiled"])
def test_what_earlier_rows_give_is_computed_for_a_row_at_once(backend, monkeypatch):
    torch.manual_seed(0)
    model = masked(2)
    sampler, plan = made(model, backend=backend)
    assert len(convolutions(plan)) == 5  # two are in two parts
    whole_rows = {value.index for value, box in plan.schedule.steps[10] if box.sizes[-1] == 5}
    parts = [value for value in convolutions(plan) if value.index in whole_rows]
    assert len(parts) == 2
    for tasks in plan.schedule.steps:  # and at no other steps than those
        assert all(box.sizes[-1] == 5 for value, box in tasks if value in parts)
    assert plan.work_ratio == 1
    monkeypatch.setattr(plans, "split_rows", lambda *_: False)
    other, unsplit = made(model, backend=backend)
    assert len(convolutions(unsplit)) == 3
    assert torch.equal(sampler.sample(4, seed=0), other.sample(4, seed=0))
    assert sampler._engine.error < 1e-6


def test_a_kernel_with_one_live_row_stays_whole():
    _, plan = made(masked(1))
    assert len(convolutions(plan)) == 3


def test_known_rows_fill_both_parts_of_a_convolution():
    torch.manual_seed(0)
    sampler, _ = made(masked(2))
    known = torch.randint(4, (3, 1, 6, 5))
    mask = torch.zeros(1, 6, 5, dtype=torch.bool)
    mask[:, :3] = True
    naive = accelerate(sampler.model, (1, 6, 5), distribution=sampler.distribution, backend="naive")
    arguments = {"seed": 1, "known": known, "known_mask": mask}
    assert torch.equal(sampler.sample(3, **arguments), naive.sample(3, **arguments))


def test_scratch_memory_serves_again_and_never_two_at_once():
    _, plan = made(PixelCNN((1, 4, 4), 4, channels=8, layers=6), (1, 4, 4))
    for program in plan.programs:
        found = share_scratch([program])
        uses = {}
        for k, instruction in enumerate(program.instructions):
            for view in instruction.views():
                if view.memory.kind == "scratch":
                    uses.setdefault(id(view.memory), []).append(k)
                    assert view.memory.numel <= found.sizes[found.block_of[id(view.memory)]]
                    assert view.memory.dtype == found.dtypes[found.block_of[id(view.memory)]]
        spans = sorted((found.block_of[key], ks[0], ks[-1]) for key, ks in uses.items())
        for (block, _, end), (other, begin, _) in pairwise(spans):
            assert block != other or end < begin
        assert len(found.sizes) <= 8 or len(uses) < 16


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
    assert set(sampler._engine._runs) == {8, 7}
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
