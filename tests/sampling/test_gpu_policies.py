"""Every policy by which the step machine launches, in Triton's interpreter, the last program of each launch first: the
images of the naive loop, without a pass of the model.

Tiles divide nothing, so that each policy has several programs, and parts of tiles at the edges. (Programs that share
images need to run at the same time: `test_gpu_emulated` has them.)
"""

from collections import Counter

import pytest
import torch
from triton.runtime import interpreter

from fastgen import Categorical
from fastgen.kernels.sampler.machine import Tiles
from fastgen.models import PixelCNN
from fastgen.sampling.request import SampleRequest
from fastgen.sampling.run import gpu_player
from fastgen.sampling.run.cpu_player import CPUPlayer
from fastgen.sampling.run.draw_loop import draw_batch
from fastgen.sampling.run.gpu_player import GPUPlayer
from fastgen.sampling.run.graph_player import GraphPlayer
from tests.sampling.exactness import assert_exact, pair
from tests.sampling.test_gpu_player import MODELS, SMALL, Transformer, arguments, lively, played, small

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy

ODD = Tiles(BM=2, BN=16, BK=16, ROWS=2, LEVELS=2)
N = 3  # images


class InOneLaunch(GPUPlayer):
    tiles = ODD


class RowsOverTheWholeGPU(GPUPlayer):
    """All programs but the one of most steps are heavy."""

    tiles = ODD

    def bound(self):
        found = super().bound()
        served = Counter(step.program for step in self.plan.steps)
        self.heavy = set(served) - {served.most_common(1)[0][0]}
        return found


class OverTheWholeGPU(GraphPlayer):
    """An instruction a launch."""

    captures = False
    tiles = ODD


@pytest.fixture
def last_program_first(monkeypatch):
    """The programs of each launch in reverse."""
    builder = interpreter.interpreter_builder
    in_order = builder.set_grid_idx
    monkeypatch.setattr(builder, "set_grid_idx", lambda x, y, z: in_order(builder.grid_dim[0] - 1 - x, y, z))


KINDS = {
    **MODELS,
    "plain, colours": SMALL["plain, colours"][0],
    "rows that move": lambda: PixelCNN((1, 4, 2), 4, channels=4, layers=2),
    "attention": lambda: Transformer(4, 6),
}


@pytest.mark.parametrize("name", KINDS)
def test_no_pass_of_the_model_is_needed(name, last_program_first):
    model = lively(KINDS[name]())
    given = {"distribution": Categorical(4, "B(KC)HW")} if name == "attention" else arguments(model, N)
    fast, naive = pair(model, getattr(model, "shape", (1, 2, 3)), "persistent", "auto", **given)
    engine = fast._backends.made[-1].backend
    assert_exact(fast, naive, N, seed=9)  # the pass that measures the margin
    assert 0 < engine.margin.error < 1e-5
    images = []
    for seed, policy in enumerate((InOneLaunch, RowsOverTheWholeGPU, OverTheWholeGPU)):
        engine._way = engine._way._replace(player=policy)
        engine._players.clear()
        images.append(assert_exact(fast, naive, N, passes=0, seed=seed))
        (player,) = engine._players.values()
        assert type(player) is policy
        assert name != "rows that move" or sum(map(len, player.memory.moves.values()))
    assert len(torch.stack(images).unique()) > 1 and not torch.equal(*images[:2])


@pytest.mark.parametrize("precision", ["ieee", "tf32x3"])  # the interpreter knows the first alone
def test_tiles_of_images_in_any_order_draw_the_same(precision, monkeypatch, last_program_first):
    monkeypatch.setattr(gpu_player, "precision_on", lambda *_: precision)
    plan, distribution = small("gated")
    request = SampleRequest(5, (1, 3, 3), torch.rand(5, 1, 3, 3), distribution)
    found, expected = played(InOneLaunch, plan, request), played(CPUPlayer, plan, request)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], atol=1e-5, rtol=1e-5)


def test_a_missing_program_is_an_error_and_no_hang(monkeypatch):
    """The interpreter plays programs one after the other: the first waits for a second one in vain."""
    monkeypatch.setattr(gpu_player, "processors_of", lambda device: 2)
    plan, distribution = small("gated")
    request = SampleRequest(1, (1, 3, 3), torch.rand(1, 1, 3, 3), distribution)

    class Together(GPUPlayer):
        together, patience = 2, 3

    player = Together(plan, 1, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="of 2 programs that share images one was missing"):
        draw_batch(player, request)
    monkeypatch.setattr(gpu_player, "processors_of", lambda device: 1)  # where they would not run at the same time
    assert not draw_batch(Together(plan, 1, torch.device("cpu")), request)


@pytest.mark.parametrize("name", [*SMALL, "recurrent"])
def test_steps_over_the_whole_gpu_in_any_order_draw_the_same(name, last_program_first):
    plan, distribution = small(name)
    shape = tuple(plan.levels.shape[1:])
    noise = torch.rand(distribution.noise_shape(5, shape))
    known, mask = torch.randint(2, (5, *shape)), torch.rand(5, *shape) < 0.2
    request = SampleRequest(5, shape, noise, distribution, known, mask)
    (levels, params), (expected, expected_params) = (played(one, plan, request) for one in (OverTheWholeGPU, CPUPlayer))
    assert torch.equal(levels, expected) and torch.equal(levels[mask], known[mask])
    torch.testing.assert_close(params, expected_params, atol=1e-5, rtol=1e-5)


def test_heavy_programs_are_played_over_the_whole_gpu_between_launches(monkeypatch, last_program_first):
    plan, distribution = small("gated")
    request = SampleRequest(3, (1, 3, 3), torch.rand(3, 1, 3, 3), distribution)
    of_rows = plan.steps[3].program  # after the last draw of one
    assert sum(step.program == of_rows for step in plan.steps) == 2
    monkeypatch.setattr(gpu_player, "heavy_programs", lambda *_: {of_rows})
    player = GPUPlayer(plan, 3, torch.device("cpu"))
    assert not draw_batch(player, request)
    assert torch.equal(player.levels, played(CPUPlayer, plan, request)[0])
    assert player.launches == 1 + 3 + player.steps.launches
    heavy = [k for k, step in enumerate(plan.steps) if step.program == of_rows]
    moves = sum(target.shape[1] > 0 for k in heavy for target, _ in player.memory.moves.get(k, ()))
    assert player.steps.launches == 2 * len(player._fused[of_rows]) + moves
