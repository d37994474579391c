"""When things are computed: rows at once where they can, memory shared where it can, batches as they run best."""

import re
from itertools import pairwise

import pytest
import torch
from torch import nn

from fastgen import Bernoulli, Categorical
from fastgen.models import GatedPixelCNN, PixelCNN
from fastgen.sampling.machine.language import views_of
from fastgen.sampling.plan import plan as plans
from fastgen.sampling.plan.plan import make_plan
from fastgen.sampling.plan.temporaries import share_scratch
from fastgen.sampling.request import SampleRequest
from fastgen.sampling.rules.convolution import Convolution
from fastgen.sampling.run import engine as engines
from fastgen.sampling.run.cpu_player import images_at_once
from fastgen.sampling.run.draw_loop import draw_batch
from fastgen.sampling.run.margin import Margin
from tests.sampling.exactness import assert_exact, pair

DISTRIBUTION = Categorical(4, layout="B(KC)HW")


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


def plan_of(model, shape=(1, 6, 5)):
    distribution = getattr(model, "distribution", DISTRIBUTION)
    return make_plan(model.eval(), shape, distribution, lambda x: x.float() / 3 * 2 - 1, None, 4)


def convolutions(plan):
    return [value for value in plan.timed.computed if isinstance(plan.timed.rules[value.index], Convolution)]


@pytest.mark.parametrize("backend", ["eager", "compiled"])
def test_what_earlier_rows_give_is_computed_for_a_row_at_once(backend, monkeypatch):
    torch.manual_seed(0)
    model = masked(2)
    plan = plan_of(model)
    assert len(convolutions(plan)) == 5  # two are in two parts
    whole_rows = {value.index for value, box in plan.schedule.steps[10] if box.sizes[-1] == 5}
    parts = [value for value in convolutions(plan) if value.index in whole_rows]
    assert len(parts) == 2
    for tasks in plan.schedule.steps:  # and at no other steps than those
        assert all(box.sizes[-1] == 5 for value, box in tasks if value in parts)
    assert plan.work_ratio == 1
    assert_exact(*pair(model, (1, 6, 5), backend, distribution=DISTRIBUTION), 4, error=1e-6, seed=0)
    monkeypatch.setattr(plans, "split_rows", lambda *_: False)
    assert len(convolutions(plan_of(model))) == 3
    assert_exact(*pair(model, (1, 6, 5), backend, distribution=DISTRIBUTION), 4, error=1e-6, seed=0)


def test_a_kernel_with_one_live_row_stays_whole():
    assert len(convolutions(plan_of(masked(1)))) == 3


def test_known_rows_fill_both_parts_of_a_convolution():
    torch.manual_seed(0)
    fast, naive = pair(masked(2).eval(), (1, 6, 5), distribution=DISTRIBUTION)
    mask = torch.zeros(1, 6, 5, dtype=torch.bool)
    mask[:, :3] = True
    assert_exact(fast, naive, 3, error=1e-6, seed=1, known=torch.randint(4, (3, 1, 6, 5)), known_mask=mask)


def test_scratch_memory_serves_again_and_never_two_at_once():
    plan = plan_of(PixelCNN((1, 4, 4), 4, channels=8, layers=6), (1, 4, 4))
    for program in plan.programs:
        found = share_scratch([program])
        uses = {}
        for k, instruction in enumerate(program.instructions):
            for view in views_of(instruction):
                if view.memory.kind == "scratch":
                    uses.setdefault(view.memory, []).append(k)
                    assert view.memory.numel <= found.sizes[found.block_of[0][view.memory]]
                    assert view.memory.dtype == found.dtypes[found.block_of[0][view.memory]]
        spans = sorted((found.block_of[0][key], ks[0], ks[-1]) for key, ks in uses.items())
        for (block, _, end), (other, begin, _) in pairwise(spans):
            assert block != other or end < begin
        assert len(found.sizes) <= 8 or len(uses) < 16


def test_large_batches_run_in_parts_that_fit_a_cache(monkeypatch):
    torch.manual_seed(0)
    model = masked(2).eval()
    assert images_at_once(plan_of(model)) > 1000
    assert images_at_once(plan_of(PixelCNN((1, 4, 4), 4, channels=256, layers=15), (1, 4, 4))) == 16
    whole, _ = pair(model, (1, 6, 5), "compiled", distribution=DISTRIBUTION)
    monkeypatch.setattr(engines, "images_at_once", lambda plan: 8)
    sizes = []
    monkeypatch.setattr(
        engines, "draw_batch", lambda player, request: (sizes.append(player.n), draw_batch(player, request))[1]
    )
    parts, _ = pair(model, (1, 6, 5), "compiled", distribution=DISTRIBUTION)
    assert torch.equal(parts.sample(23, seed=0), whole.sample(23, seed=0))
    assert sizes == [8, 8, 7, 23]
    assert parts.stats.passes == 3


def test_shifts_of_cumulative_probabilities_decide_whether_a_pass_is_needed():
    """Errors of many logits cancel: steps move by much less than the greatest error of a logit allows."""
    torch.manual_seed(0)
    model = GatedPixelCNN((1, 8, 8), 64, channels=32, layers=2).eval()
    fast, naive = pair(model, model.shape, verify="auto", distribution=model.distribution)
    assert "margin: not measured yet" in fast.explain()
    assert_exact(fast, naive, 16, seed=0)
    found = re.search(r"margin: (\S+) in a parameter, (\S+) in a cumulative probability", fast.explain())
    assert 0 < float(found[2]) < 0.2 * float(found[1])
    for seed in range(1, 6):
        assert_exact(fast, naive, 16, passes=0, seed=seed)
    fast.sample(16, seed=9, temperature=0.5)  # other steps, whose shift is not known
    fast.sample(16, seed=9, top_k=3)  # no steps
    margin = Margin()
    request = SampleRequest(2, (1, 1, 1), torch.tensor([[[[0.3]]], [[[0.49999]]]]), Bernoulli())
    assert margin.could_change(request, torch.zeros(2, 1, 1, 1), torch.zeros(2, 1, 1, 1).long())
    margin.measure(request, torch.zeros(2, 1, 1, 1), torch.full((2, 1, 1, 1), 1e-4), half=True)
    assert margin.could_change(request, torch.zeros(2, 1, 1, 1), torch.zeros(2, 1, 1, 1).long())
    far = request.of(slice(0, 1))
    assert not margin.could_change(far, torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1).long())
