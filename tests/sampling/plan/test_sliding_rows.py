"""Memory for rows that are still to be read: no larger for a higher image, and never missed."""

import pytest
import torch

from fastgen.models import GatedPixelCNN, PixelCNN, PixelCNNPP
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
