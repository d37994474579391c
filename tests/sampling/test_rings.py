"""Memory for rows that are still to be read: no larger for a higher image, and never missed."""

import warnings
from dataclasses import replace

import pytest
import torch

from fastgen import accelerate
from fastgen.models import GatedPixelCNN, PixelCNN, PixelCNNPP

BUILDS = {
    "plain": lambda height: PixelCNN((1, height, 5), 3, channels=6, layers=2),
    "plain, colours": lambda height: PixelCNN((3, height, 4), 3, channels=6, layers=2),
    "gated": lambda height: GatedPixelCNN((1, height, 5), 3, channels=6, layers=2),
    "plusplus": lambda height: PixelCNNPP((3, height, 4), channels=6, layers=1, n_mix=2),
}


def samplers(name, height, *backends):
    torch.manual_seed(0)
    model = BUILDS[name](height).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)
    return [accelerate(model, model.shape, distribution=model.distribution, backend=one) for one in backends]


@pytest.mark.parametrize("name", BUILDS)
def test_a_higher_image_takes_more_memory_for_its_levels_and_output_alone(name):
    low, high = (samplers(name, height, "eager")[0]._engine.plan for height in (16, 24))
    assert len(low.rings) == len(high.rings) > 3
    assert sorted(ring.numel for ring in low.rings.values()) == sorted(ring.numel for ring in high.rings.values())
    whole = [
        memory.numel * memory.dtype.itemsize
        for memory in high.storage.memories.values()
        if memory.kind == "stored" and id(memory) in high.rings
    ]
    kept = [ring.numel * 4 for ring in high.rings.values()]
    assert sum(kept) < 0.5 * sum(whole)
    assert any(ring.moves for ring in high.rings.values())


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("backend", ["eager", "compiled"])
def test_rows_move_and_nothing_is_missed(name, backend):
    fast, naive = samplers(name, 12, backend, "naive")
    assert torch.equal(fast.sample(2, seed=1), naive.sample(2, seed=1))
    assert fast._engine.error < 1e-5
    assert torch.equal(fast.sample(2, seed=2), naive.sample(2, seed=2))  # a second image begins anew


@pytest.mark.parametrize("name", ["plain, colours", "gated"])
@pytest.mark.parametrize("rows", [1, 7])
def test_known_rows_fill_what_is_left_of_them(name, rows):
    fast, naive = samplers(name, 12, "eager", "naive")
    fast.sample(2, seed=1)
    mask = torch.zeros(fast.shape, dtype=torch.bool)
    mask[:, :rows] = True
    mask[:, rows, 1] = True
    arguments = {"seed": 3, "known": torch.randint(3, (2, *fast.shape)), "known_mask": mask}
    assert torch.equal(fast.sample(2, **arguments), naive.sample(2, **arguments))
    assert fast._engine.error < 1e-5


def test_what_a_wrong_draw_changed_is_drawn_again():
    """An engine that is off by a hundredth is put right by the model's own passes."""
    fast, naive = samplers("plain", 12, "eager", "naive")
    engine = fast._engine
    assert engine.plan.rings
    for program in engine.plan.programs:
        for instruction in program.instructions:
            for one in instruction.args:
                if isinstance(one, torch.Tensor) and one.dim() == 2:
                    one += 1e-2 * torch.randn_like(one)
    passes, done = [], []
    run = engine.run
    engine.run = lambda job: passes.append((drawn := run(replace(job, progress=done.append))).passes) or drawn
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(4):
            assert torch.equal(fast.sample(3, seed=seed), naive.sample(3, seed=seed))
    assert max(passes) > 1 and "more than rounding" in str(caught[0].message)
    assert sum(done) == 4 * 12 * 5  # of what is drawn again nothing is counted twice
