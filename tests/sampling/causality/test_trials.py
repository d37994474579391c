"""What changes of the input show: by themselves, and one after the other."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from fastgen.sampling.causality.trials import changes, dependences
from fastgen.sampling.trace.network import Network


def awake(x):
    """The first output is awake only where all levels but its own are 1; the second copies the second level."""
    flat = x.flatten(1).float()
    return torch.stack((torch.relu(flat[:, 1:].sum(1) - (flat.shape[1] - 2)), flat[:, 1]), 1)


def test_a_walk_goes_through_all_images_in_between():
    seen = []

    def run(images):
        seen.extend(images)
        return images.flatten(1)

    start, end, walk = torch.zeros(1, 1, 2, 2).long(), torch.ones(1, 1, 2, 2).long(), torch.tensor([2, 0, 3, 1])
    found = changes(run, start, end, walk)
    assert torch.equal(found, torch.eye(4, dtype=torch.bool))
    steps = [int((a != b).sum()) for a, b in pairwise(seen[4:])]  # the first four are two blank and two full ones
    assert steps == [1, 1, 1, 1] and torch.equal(seen[-1], end[0])


def test_walks_and_stars_see_what_others_hide():
    blank, full = torch.zeros(1, 1, 3, 3).long(), torch.ones(1, 1, 3, 3).long()
    assert not changes(awake, blank, full, None)[:, 0].any()
    assert changes(awake, full, blank, None)[1:, 0].all()
    last_only = changes(awake, blank, full, torch.arange(9))[:, 0]
    assert last_only.nonzero().flatten().tolist() == [8]


def test_many_levels_go_in_several_batches():
    start, end = torch.zeros(1, 1, 10, 15).long(), torch.ones(1, 1, 10, 15).long()
    for walk in (None, torch.randperm(150, generator=torch.Generator().manual_seed(0))):
        seen = []

        def run(x, seen=seen):
            seen.append(x[-1])
            return 2.0 * x.flatten(1)

        assert torch.equal(changes(run, start, end, walk), torch.eye(150, dtype=torch.bool))
        assert int(seen[-1].sum()) == (1 if walk is None else 150)


def test_a_statistic_of_the_batch_is_seen_in_the_image_itself():
    start, end = torch.zeros(1, 1, 2, 2).long(), torch.ones(1, 1, 2, 2).long()
    found = changes(lambda x: x.flatten(1) - x.float().mean(), start, end, None)
    assert found.all()


@pytest.mark.parametrize("levels", [2, 5])
def test_all_dependences_of_a_small_model_are_found(levels):
    class Awake(nn.Module):
        def forward(self, x):
            return torch.cat((awake(x), torch.zeros(len(x), 7)), 1).view_as(x)

    network = Network(Awake(), (1, 3, 3), lambda drawn: drawn.float() / (levels - 1), None, levels)
    moved, trials = dependences(network)
    expected = torch.zeros(9, 9, dtype=torch.bool)
    expected[1:, 0] = expected[1, 1] = True
    assert torch.equal(moved.flatten(1), expected) and trials == 32
