"""The engine: batches in parts, and of several sizes."""

import torch

from fastgen.models import PixelCNN
from fastgen.sampling.run import engine, players
from fastgen.sampling.run.cpu_player import CPUPlayer
from fastgen.sampling.run.draw_loop import draw_batch
from tests.sampling.exactness import assert_exact, pair
from tests.sampling.models import planned


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


def test_batches_of_other_sizes_begin_with_what_the_last_one_left():
    torch.manual_seed(0)
    model = PixelCNN((1, 6, 5), 4, channels=8, layers=2).eval()
    fast, naive = pair(model, model.shape, "compiled", distribution=model.distribution)
    for n in (4, 7, 2, 4, 7):  # each batch begins with what the one before has left
        assert_exact(fast, naive, n, seed=n)


def test_a_smaller_batch_takes_the_memory_of_a_larger_one():
    model = PixelCNN((1, 4, 4), 4, channels=8, layers=2)
    large = CPUPlayer(planned(model, model.shape), 4, torch.device("cpu"))
    small = large.another(2)
    assert small.levels.shape[0] == 2 and small.levels.data_ptr() == large.levels.data_ptr()
    larger = small.another(5)
    assert larger.levels.shape[0] == 5 and larger.levels.data_ptr() != large.levels.data_ptr()
    assert larger.another(3).levels.data_ptr() == larger.levels.data_ptr()
    lines = large.levels.stride(0) * large.levels.element_size() / 64
    assert lines % 2 == 1  # so that images do not compete for the same lines of a cache
