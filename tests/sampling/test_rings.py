"""Memory for rows that are still to be read: no larger for a higher image, and never missed."""

import pytest
import torch

from fastgen.models import GatedPixelCNN, PixelCNN, PixelCNNPP
from fastgen.sampling.plan.plan import make_plan
from tests.sampling.exactness import assert_exact, pair

BUILDS = {
    "plain": lambda height: PixelCNN((1, height, 5), 3, channels=6, layers=2),
    "plain, colours": lambda height: PixelCNN((3, height, 4), 3, channels=6, layers=2),
    "gated": lambda height: GatedPixelCNN((1, height, 5), 3, channels=6, layers=2),
    "plusplus": lambda height: PixelCNNPP((3, height, 4), channels=6, layers=1, n_mix=2),
}


def lively(name, height):
    torch.manual_seed(0)
    model = BUILDS[name](height).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)
    return model


def both(name, height, backend):
    model = lively(name, height)
    return pair(model, model.shape, backend, distribution=model.distribution)


def plan_of(name, height):
    model = lively(name, height)
    return make_plan(model, model.shape, model.distribution, model.encode, None, model.levels)


@pytest.mark.parametrize("name", BUILDS)
def test_a_higher_image_takes_more_memory_for_its_levels_and_output_alone(name):
    low, high = (plan_of(name, height) for height in (16, 24))
    assert len(low.rings) == len(high.rings) > 3
    assert sorted(ring.numel for ring in low.rings.values()) == sorted(ring.numel for ring in high.rings.values())
    whole = [
        memory.numel * memory.dtype.itemsize
        for memory in high.storage.memories.values()
        if memory.kind == "stored" and memory in high.rings
    ]
    kept = [ring.numel * 4 for ring in high.rings.values()]
    assert sum(kept) < 0.5 * sum(whole)
    assert any(ring.moves for ring in high.rings.values())


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("backend", ["eager", "compiled"])
def test_rows_move_and_nothing_is_missed(name, backend):
    fast, naive = both(name, 12, backend)
    for seed in range(2):  # a second image begins anew
        assert_exact(fast, naive, 2, error=1e-5, seed=seed)


@pytest.mark.parametrize("name", ["plain, colours", "gated"])
@pytest.mark.parametrize("rows", [1, 7])
def test_known_rows_fill_what_is_left_of_them(name, rows):
    fast, naive = both(name, 12, "eager")
    mask = torch.zeros(fast.shape, dtype=torch.bool)
    mask[:, :rows] = True
    mask[:, rows, 1] = True
    arguments = {"seed": 3, "known": torch.randint(3, (2, *fast.shape)), "known_mask": mask}
    assert_exact(fast, naive, 2, error=1e-5, **arguments)
