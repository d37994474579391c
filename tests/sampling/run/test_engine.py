"""The engine: batches in parts."""

import torch

from fastgen.models import PixelCNN
from fastgen.sampling.run import engine, players
from fastgen.sampling.run.draw_loop import draw_batch
from tests.sampling.exactness import assert_exact, pair


def test_large_batches_run_in_parts_that_fit_a_cache(monkeypatch):
    torch.manual_seed(0)
    model = PixelCNN((1, 6, 5), 4, channels=8, layers=2).eval()
    whole, _ = pair(model, model.shape, "compiled", distribution=model.distribution)
    monkeypatch.setattr(players, "images_at_once", lambda plan: 8)
    sizes = []
    monkeypatch.setattr(
        engine, "draw_batch", lambda player, request: (sizes.append(player.n), draw_batch(player, request))[1]
    )
    parts, _ = pair(model, model.shape, "compiled", distribution=model.distribution)
    assert torch.equal(parts.sample(23, seed=0), whole.sample(23, seed=0))
    assert sizes == [8, 8, 7, 23]
    assert parts.stats.passes == 3


def test_batches_of_all_sizes_share_weights_and_memory():
    torch.manual_seed(0)
    model = PixelCNN((1, 6, 5), 4, channels=8, layers=2).eval()
    fast, naive = pair(model, model.shape, "compiled", distribution=model.distribution)
    for n in (4, 7, 2, 4, 7):  # each batch begins with what the one before has left
        assert_exact(fast, naive, n, seed=n)
    memories = [player.memory for player in fast._backends.made[-1].backend._players.values()]
    assert [one.n for one in memories] == [2, 4, 7]
    for one in memories[1:]:
        assert one.levels.data_ptr() == memories[0].levels.data_ptr()
        assert one.images.data_ptr() == memories[0].images.data_ptr()
