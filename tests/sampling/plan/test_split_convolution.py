"""Convolutions in two parts: rows at once where they can."""

import pytest
import torch
from torch import nn

from fastgen.sampling.plan import plan as plans
from fastgen.sampling.rules.convolution import Convolution
from fastgen.sampling.run.cpu_player import CPUPlayer
from fastgen.sampling.run.draw_loop import draw_batch
from fastgen.sampling.run.torch_player import TorchPlayer
from fastgen.sampling.whole_pass import whole_pass
from tests.sampling.models import distribution_of, encode_of, planned, request

SHAPE = (1, 6, 5)


def masked(rows):
    """A causal stack, kernels with live taps in so many rows."""
    mask = torch.zeros(3, 3)
    mask[2 - rows : 1] = 1
    mask[1, 0] = 1
    first, second = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
    with torch.no_grad():
        first.weight *= mask
        mask[1, 1] = 1
        second.weight *= mask
    return nn.Sequential(first, nn.ReLU(), second, nn.Tanh(), nn.Conv2d(6, 4, 1))


def convolutions(plan):
    return [value for value in plan.timed.computed if isinstance(plan.timed.rules[value], Convolution)]


@pytest.mark.parametrize("player", [TorchPlayer, CPUPlayer])
def test_what_earlier_rows_give_is_computed_for_a_row_at_once(player, monkeypatch):
    model = masked(2)
    plan = planned(model, SHAPE)
    assert len(convolutions(plan)) == 5  # two are in two parts
    whole_rows = {value for value, boxes, k in plan.schedule.tasks([10])[10] if boxes.sizes[-1, k] == 5}
    parts = [value for value in convolutions(plan) if value in whole_rows]
    assert len(parts) == 2
    for value in parts:  # and at no other steps than those
        assert (plan.schedule.boxes[value].sizes[-1] == 5).all()
    assert plan.work_ratio == 1
    monkeypatch.setattr(plans, "split_rows", lambda *_: None)
    unsplit = planned(model, SHAPE)
    assert len(convolutions(unsplit)) == 3
    drawn = []
    for one in (plan, unsplit):
        made = player(one, 4, torch.device("cpu"))
        draw_batch(made, request(distribution_of(model), SHAPE, 4))
        assert (made.params() - whole_pass(model, encode_of(model), made.levels, None)).abs().max() < 1e-6
        drawn.append(made.levels)
    assert torch.equal(*drawn)


def test_a_kernel_with_one_live_row_stays_whole():
    assert len(convolutions(planned(masked(1), SHAPE))) == 3


def test_known_rows_fill_both_parts_of_a_convolution():
    model = masked(2)
    known = torch.randint(4, (3, *SHAPE))
    mask = torch.zeros(3, *SHAPE, dtype=torch.bool)
    mask[:, :, :3] = True
    player = TorchPlayer(planned(model, SHAPE), 3, torch.device("cpu"))
    given = {"known": known.masked_fill(~mask, 0), "known_mask": mask}
    draw_batch(player, request(distribution_of(model), SHAPE, 3, 1, **given))
    assert torch.equal(player.levels[mask], known[mask])
    truth = whole_pass(model, encode_of(model), player.levels, None)
    assert (player.params() - truth).abs().max() < 1e-6
