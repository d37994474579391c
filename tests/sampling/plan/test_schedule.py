"""Every element is computed once, when it is ready, in boxes that hold it and nothing that counts beside it."""

import pytest
import torch

from fastgen.models import GatedPixelCNN, PixelCNN, PixelCNNPP
from fastgen.sampling.plan.schedule import _cover, at_row_end, row_ends
from fastgen.sampling.trace.graph import CONSTANT, NEVER, READY
from tests.sampling.models import Attention, planned

MODELS = {
    "plain, colours": lambda: (PixelCNN((3, 4, 5), 3, channels=6, layers=2), (3, 4, 5)),
    "gated": lambda: (GatedPixelCNN((1, 4, 5), 3, channels=6, layers=2), (1, 4, 5)),
    "plusplus": lambda: (PixelCNNPP((1, 4, 4), channels=6, layers=1, n_mix=2), (1, 4, 4)),
    "attention": lambda: (Attention(4, 3), (1, 3, 3)),
}


def places_of(box):
    ranges = [
        first + step * torch.arange(size) for first, size, step in zip(box.start, box.sizes, box.steps, strict=True)
    ]
    return torch.cartesian_prod(*ranges).reshape(-1, len(ranges)) if ranges else torch.zeros(1, 0, dtype=torch.long)


@pytest.mark.parametrize("name", MODELS)
def test_each_element_is_computed_once_and_not_before_it_is_ready(name):
    plan = planned(*MODELS[name]())
    counted = {value.index: torch.zeros(value.shape, dtype=torch.long) for value in plan.timed.computed}
    for step in range(-1, len(plan.order)):
        for value, boxes, k in plan.schedule.tasks(step + 1):
            index = tuple(places_of(boxes[k]).T)
            times = plan.schedule.times.of(value)[index]
            free = (times == CONSTANT) | (times == NEVER)
            assert (free | (times == step)).all()
            counted[value.index][index] += (~free).long()
    for value in plan.timed.computed:
        times = plan.schedule.times.of(value)
        real = (times != CONSTANT) & (times != NEVER)
        assert (counted[value.index] == real).all()
        ready = plan.timed.analysis.ready_of(value)
        assert ((times >= ready) | ~real | (ready == READY)).all()


def test_a_row_ends_where_the_drawing_order_leaves_its_line():
    raster = [(c, i, j) for i in range(2) for j in range(3) for c in range(2)]
    assert row_ends(raster).tolist() == [-1, 5, 11]
    columns = [(0, i, j) for j in range(2) for i in range(3)]
    assert row_ends(columns).tolist() == [-1, 2, 5]
    assert row_ends([(0, 0, 0)]).tolist() == [-1, 0]


def test_what_can_wait_waits_for_the_end_of_a_row():
    ends = torch.tensor([-1, 2, 5, 8], dtype=torch.int32)
    ready = torch.tensor([0, 0, 3, 6, READY, CONSTANT, 0], dtype=torch.int32)
    latest = torch.tensor([1, 4, 8, 6, 0, 7, NEVER], dtype=torch.int32)
    assert at_row_end(ends, ready, latest).tolist() == [0, 2, 8, 6, READY, CONSTANT, NEVER]


def test_boxes_hold_any_pattern_of_places_once():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        pattern = torch.rand((4, 5, 3), generator=generator) < torch.rand((), generator=generator)
        if pattern.any():
            counted = torch.zeros_like(pattern, dtype=torch.long)
            for box in _cover(torch.nonzero(pattern)):
                counted[tuple(places_of(box).T)] += 1
            assert (counted == pattern).all()
    comb = torch.zeros(6, 9, dtype=torch.bool)
    comb[1::2, ::4] = True
    assert len(_cover(torch.nonzero(comb))) == 1
