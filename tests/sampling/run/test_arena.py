"""The batch that fits a device: its arena takes the share of free memory that it may take, in half precision too."""

import pytest
import torch

from fastgen.models import GatedPixelCNN
from fastgen.sampling.plan.plan import make_plan
from fastgen.sampling.run.arena import SHARE_OF_MEMORY, ArenaMemory, images_that_fit
from fastgen.sampling.trace.network import Network

FREE = 2**21


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_many_images_as_fit(dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (FREE, 2 * FREE))
    model = GatedPixelCNN((1, 6, 5), 4, channels=16, layers=2).to(dtype).eval()
    plan = make_plan(Network(model, model.shape, model.encode, None, model.levels), model.distribution)
    assert images_that_fit(plan, torch.device("cpu")) is None
    images = images_that_fit(plan, torch.device("cuda"))
    arenas = ArenaMemory(plan, images, torch.device("cpu"), ()).arenas
    taken = sum(arena.numel() * arena.itemsize for arena in arenas.values())
    assert 0.8 * SHARE_OF_MEMORY * FREE < taken < 1.1 * SHARE_OF_MEMORY * FREE
