"""Memory for rows that are still to be read: no larger for a higher image, and never missed."""

import numpy as np
import pytest
import torch

from fastgen.models import GatedPixelCNN, PixelCNN, PixelCNNPP
from fastgen.sampling.machine.language import AffineOffset, Memory, Pointwise, Program, View
from fastgen.sampling.plan.layout import Layout
from fastgen.sampling.plan.plan import Step
from fastgen.sampling.plan.sliding_rows import Candidate, make_rings
from fastgen.sampling.run.draw_loop import draw_batch
from fastgen.sampling.run.torch_player import TorchPlayer
from fastgen.sampling.whole_pass import whole_pass
from tests.sampling.models import distribution_of, encode_of, planned, request

BUILDS = {
    "plain": lambda height: PixelCNN((1, height, 5), 3, channels=6, layers=2),
    "plain, colours": lambda height: PixelCNN((3, height, 4), 3, channels=6, layers=2),
    "gated": lambda height: GatedPixelCNN((1, height, 5), 3, channels=6, layers=2),
    "plusplus": lambda height: PixelCNNPP((3, height, 4), channels=6, layers=1, n_mix=2),
}


def built(name, height):
    model = BUILDS[name](height).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)
    return model, planned(model, model.shape)


@pytest.mark.parametrize("name", BUILDS)
def test_a_higher_image_takes_more_memory_for_its_levels_and_output_alone(name):
    low, high = (built(name, height)[1] for height in (16, 24))
    assert len(low.rings) == len(high.rings) > 3
    assert sorted(ring.numel for ring in low.rings.values()) == sorted(ring.numel for ring in high.rings.values())
    whole = [memory.numel * memory.dtype.itemsize for memory in high.rings]
    kept = [ring.numel * 4 for ring in high.rings.values()]
    assert sum(kept) < 0.5 * sum(whole)
    assert any(ring.moves for ring in high.rings.values())


def test_plusplus_keeps_no_features_of_the_whole_image():
    _, plan = built("plusplus", 16)
    memories = plan.storage.memories.items()
    maps = [one for one, memory in memories if memory.kind == "stored" and memory not in plan.rings]
    names = {one.name for one in maps if one not in plan.output.values}
    assert names == {"levels", "cat"}  # an image and a channel of 1


@pytest.mark.parametrize("name", BUILDS)
def test_rows_move_and_nothing_is_missed(name):
    """The output that an image was drawn of is that of a whole pass; a second image begins anew."""
    model, plan = built(name, 12)
    player = TorchPlayer(plan, 2, torch.device("cpu"))
    for seed in range(2):
        assert not draw_batch(player, request(distribution_of(model), model.shape, 2, seed))
        truth = whole_pass(model, encode_of(model), player.levels, None)
        assert (player.params() - truth).abs().max() < 1e-6 * max(10, truth.abs().max())


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("name", ["plain, colours", "gated"])
def test_known_rows_fill_what_is_left_of_them(name, rows):
    model, plan = built(name, 12)
    player = TorchPlayer(plan, 2, torch.device("cpu"))
    distribution, shape = distribution_of(model), model.shape
    draw_batch(player, request(distribution, shape, 2, 1))
    mask = torch.zeros(2, *shape, dtype=torch.bool)
    mask[:, :, :rows] = True
    mask[:, :, rows, 1] = True
    known = torch.randint(3, (2, *shape)).masked_fill(~mask, 0)
    draw_batch(player, request(distribution, shape, 2, 3, known=known, known_mask=mask))
    assert torch.equal(player.levels[mask], known[mask])
    truth = whole_pass(model, encode_of(model), player.levels, None)
    assert (player.params() - truth).abs().max() < 1e-6 * max(10, truth.abs().max())


CANDIDATE = Memory("stored", 0, 40, torch.float32)
LAYOUT = Layout((8, 5), (0, 1), (0, 0), (0, 0))


@pytest.mark.parametrize(
    ("begun", "written", "fits"), [(0, {}, True), (2, {}, True), (8, {}, False), (0, {3: 3}, True), (0, {3: 4}, False)]
)
def test_rows_that_begin_as_constants_are_in_the_ring_or_written_before_they_are_read(begun, written, fits):
    """Step k writes row k of eight; where something of that row is a constant, a step must have written it by then."""
    view = View(CANDIDATE, (5,), (1,), AffineOffset(0, (5,)), 0)
    program = Program([Pointwise("copy", view, (1.0,))])
    steps = [Step(0, np.array([5 * row])) for row in range(8)]
    rings = make_rings([Candidate(CANDIDATE, LAYOUT, begun, written)], [program], steps)
    assert (CANDIDATE in rings) == fits
    if fits:
        assert rings[CANDIDATE].rows == 2 * max(1, begun)
