"""Programs of a plan: few, and the same numbers however they are played."""

import pytest
import torch
from torch import nn

from fastgen.models import PixelCNN, PixelCNNPP
from fastgen.sampling.machine.language import Call, views_of
from fastgen.sampling.run.cpu_player import CPUPlayer, images_at_once, sections
from fastgen.sampling.run.draw_loop import draw_batch
from fastgen.sampling.run.torch_player import TorchPlayer
from fastgen.sampling.whole_pass import whole_pass
from tests.sampling.models import Attention, distribution_of, encode_of, planned, request

CPU = torch.device("cpu")


class Odd(nn.Module):
    """With an operator in its middle that the machine has not."""

    def __init__(self):
        super().__init__()
        self.first, self.last = PixelCNN((1, 4, 5), 4, channels=8, layers=1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.last(torch.atan(self.first(x)[:, :, 0]))


class Diagonal(nn.Module):
    """A row of a matrix at each step, of which one element, at another place each time, is read by itself."""

    def __init__(self):
        super().__init__()
        self.first, self.last = PixelCNN((1, 3, 4), 4, channels=8, layers=1), nn.Conv2d(2, 4, 1)
        self.register_buffer("scales", torch.linspace(-2, 2, 12))

    def forward(self, x):
        matrix = self.first(x)[:, 0, 0].flatten(1).unsqueeze(2) * self.scales
        both = torch.stack((matrix.diagonal(dim1=1, dim2=2).tanh(), matrix.exp().sum(2)), 1)
        return self.last(both.view(len(x), 2, 3, 4))


MODELS = {
    "plain": lambda: (PixelCNN((1, 5, 4), 4, channels=8, layers=2), (1, 5, 4)),
    "colours": lambda: (PixelCNN((3, 3, 4), 4, channels=9, layers=1), (3, 3, 4)),
    "plusplus": lambda: (PixelCNNPP((3, 4, 3), channels=4, layers=1, n_mix=2), (3, 4, 3)),
    "attention": lambda: (Attention(4, 4), (1, 4, 4)),
    "one head": lambda: (Attention(4, 3, heads=1), (1, 3, 3)),
    "unknown op": lambda: (Odd(), (1, 4, 5)),
    "diagonal": lambda: (Diagonal(), (1, 3, 4)),
}


def test_a_pixelcnnpp_has_few_programs():
    model = PixelCNNPP((3, 16, 16), channels=8, layers=1, n_mix=2)
    plan = planned(model, model.shape)
    assert len(plan.programs) <= 12 and len(plan.steps) == 257
    assert len({program.key for program in plan.programs}) == len(plan.programs)


def test_a_transformer_has_one_program_for_all_steps_and_one_before():
    plan = planned(Attention(4, 12), (1, 12, 12))
    assert len(plan.programs) <= 2 and len(plan.steps) == 145


@pytest.mark.parametrize("name", MODELS)
def test_offsets_lie_within_memory(name):
    plan = planned(*MODELS[name]())
    for step in plan.steps:
        program = plan.programs[step.program]
        moving = {view: int(at) for view, at in zip(program.moving(), step.offsets, strict=True)}
        for one in program.instructions:
            for view in views_of(one):
                memory = view.memory
                room = plan.rings[memory].numel if memory in plan.rings else memory.numel
                first = moving[view] if view.moves else view.offset.at(())
                assert first >= 0 and first + view.span < room


@pytest.mark.parametrize("player", [TorchPlayer, CPUPlayer])
@pytest.mark.parametrize("name", MODELS)
def test_whole_images_are_those_of_single_steps_bit_for_bit(name, player):
    """`play` of the machine, a row of draws in a call, against a draw and a step at a time; then a whole pass."""
    model, shape = MODELS[name]()
    plan, distribution = planned(model, shape), distribution_of(model)
    at_once, stepwise = player(plan, 3, CPU), player(plan, 3, CPU)
    asked = request(distribution, shape, 3)
    draw_batch(at_once, asked)
    stepwise.play = lambda *_: None
    draw_batch(stepwise, asked)
    assert torch.equal(at_once.levels, stepwise.levels)
    assert torch.equal(at_once.params(), stepwise.params())
    truth = whole_pass(model, encode_of(model), at_once.levels, None)
    torch.testing.assert_close(at_once.params(), truth, atol=2e-5, rtol=2e-5)
    draw_batch(at_once, request(distribution, shape, 3, seed=1))
    draw_batch(at_once, asked)  # what came before leaves nothing behind
    assert torch.equal(at_once.params(), stepwise.params())


def test_what_the_machine_has_not_is_played_by_torch_between_its_sections():
    plan = planned(*MODELS["unknown op"]())
    cut = [sections(program) for program in plan.programs]
    assert max(len(one) for one in cut) >= 3
    for program, found in zip(plan.programs, cut, strict=True):
        calls = [one for one in program.instructions if isinstance(one, Call)]
        assert sum(len(one.instructions) for one in found) >= len(calls)
        assert all(bool(one.parts) != bool(one.instructions) for one in found)


def test_so_many_images_at_once_as_a_cache_holds():
    narrow, wide = (PixelCNN((1, 4, 4), 4, channels=c, layers=n) for c, n in ((8, 2), (256, 15)))
    assert images_at_once(planned(narrow, narrow.shape)) > 1000
    assert images_at_once(planned(wide, wide.shape)) == 16
