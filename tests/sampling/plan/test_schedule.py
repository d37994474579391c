"""Every element is computed once, when it is ready, in boxes that hold it and nothing that counts beside it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastgen.models import GatedPixelCNN, PixelCNN, PixelCNNPP
from fastgen.sampling.plan.schedule import Schedule, _boxes, _cover, at_row_end, row_ends
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
        for value, boxes, k in plan.schedule.tasks([step + 1])[step + 1]:
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


# Of 4x3 elements, a column a step; nobody needs the third row. Each step has two boxes: rows 0 and 1, and row 3.
COLUMNS = torch.tensor([[0, 1, 2], [0, 1, 2], [NEVER] * 3, [0, 1, 2]], dtype=torch.int32)


def test_each_box_of_a_step_lies_where_its_own_elements_do():
    boxes = _boxes(COLUMNS)
    assert boxes.at.tolist() == [1, 1, 2, 2, 3, 3] and boxes.nth.tolist() == [0, 1] * 3
    assert [boxes[k].start for k in (2, 3)] == [(0, 1), (3, 1)]
    assert [boxes[k].sizes for k in (2, 3)] == [(2, 1), (1, 1)]
    assert boxes.places(0, np.array([3, 1])).tolist() == [[0, 2], [0, 0]]
    assert boxes.places(1, np.array([3, 1])).tolist() == [[3, 2], [3, 0]]


def test_steps_are_alike_where_sizes_and_what_is_fixed_are():
    def groups(*fixed):
        rules = {"value": SimpleNamespace(fixed=lambda boxes: fixed)}
        return [steps.tolist() for steps in Schedule(3, {"value": _boxes(COLUMNS)}, None).alike(rules)]

    assert groups() == [[0], [1, 2, 3]]  # step 0 comes before the first draw, and computes nothing
    assert groups(np.array([7, 5, 7, 6, 7, 5])) == [[0], [1, 3], [2]]
    assert groups(np.arange(6)) == [[0], [1], [2], [3]]


def test_boxes_grow_where_all_of_their_sizes_can():
    triangle = torch.where(torch.ones(4, 4).tril() > 0, torch.arange(4).view(4, 1), NEVER).int()
    assert _boxes(triangle).sizes.T.tolist() == [[1, 1]] + [[1, 4]] * 3
    halves = torch.tensor([[0, 0, NEVER, NEVER], [1, 1, 2, 2]], dtype=torch.int32)
    assert _boxes(halves).sizes.T.tolist() == [[1, 2]] * 3  # one could; the others are like it, and cannot
