"""Scratch memory serves again, and never two at once."""

from itertools import pairwise

from fastgen.models import PixelCNN
from fastgen.sampling.machine.language import views_of
from fastgen.sampling.plan.temporaries import share_scratch
from tests.sampling.models import planned


def test_scratch_memory_serves_again_and_never_two_at_once():
    model = PixelCNN((1, 4, 4), 4, channels=8, layers=6)
    plan = planned(model, model.shape)
    assert max(len(blocks) for blocks in plan.scratch.block_of) > 4
    for shared in (plan.scratch, None):
        for number, program in enumerate(plan.programs):
            found = shared or share_scratch([program.views])
            block_of = found.block_of[number if shared else 0]
            uses = {}
            for k, instruction in enumerate(program.instructions):
                for view in views_of(instruction):
                    if view.memory.kind == "scratch":
                        uses.setdefault(view.memory, []).append(k)
                        assert view.memory.numel <= found.sizes[block_of[view.memory]]
                        assert view.memory.dtype == found.dtypes[block_of[view.memory]]
            spans = sorted((block_of[memory], ks[0], ks[-1]) for memory, ks in uses.items())
            for (block, _, end), (other, begin, _) in pairwise(spans):
                assert block != other or end < begin
            assert len(found.sizes) <= 8 or len(uses) < 16
