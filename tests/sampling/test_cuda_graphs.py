"""The players of CUDA graphs over a stand-in for these: what is captured when, and that replays draw the images."""

import pytest
import torch

from fastgen import Categorical, accelerate
from fastgen.kernels.sampler.machine import Tiles
from fastgen.models import GatedPixelCNN, PixelCNN, PixelRNN
from fastgen.sampling.plan.plan import make_plan
from fastgen.sampling.request import SampleRequest
from fastgen.sampling.run.engine import Engine
from fastgen.sampling.run.graph_player import GraphPlayer
from fastgen.sampling.trace.network import Network
from tests.sampling.recorded_graphs import stand_in

MODELS = {
    "gated": lambda: GatedPixelCNN((1, 4, 3), 4, channels=6, layers=1),
    "plain, colours": lambda: PixelCNN((3, 3, 2), 3, channels=6, layers=1),
}


class Waves(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).sin()


class Own(Categorical):
    """A distribution that the step machine does not know."""


@pytest.fixture
def captured(monkeypatch):
    return stand_in(monkeypatch)


class Drawn:
    """An engine of CUDA graphs, held to the definition."""

    def __init__(self, name, kind=Own):
        self.model = MODELS[name]().eval()
        self.shape, self.distribution = self.model.shape, kind(self.model.levels)
        network = Network(self.model, self.shape, self.model.encode, None, self.model.levels)
        self.engine = Engine(make_plan(network, self.distribution), self.distribution, "cuda_graph", "always")

    @torch.no_grad()
    def check(self, n, seed, distribution=None, rows=None):
        """A batch has the images of the definition, and its one whole pass found nothing wrong. `rows` are known, and
        the first pixel of the next."""
        distribution = distribution or self.distribution
        naive = accelerate(self.model, self.shape, distribution=distribution, backend="naive")
        noise = torch.rand(naive.noise_shape(n), generator=torch.Generator().manual_seed(seed))
        known = mask = None
        if rows is not None:
            mask = torch.zeros(n, *self.shape, dtype=torch.bool)
            mask[:, :, :rows] = True
            mask[:, :, rows, 0] = True
            known = torch.ones(n, *self.shape, dtype=torch.long).masked_fill(~mask, 0)
        done = []
        result = self.engine.run(SampleRequest(n, self.shape, noise, distribution, known, mask, progress=done.append))
        assert torch.equal(result.levels, naive.sample(n, noise=noise, known=known, known_mask=mask))
        assert (result.passes, result.redrawn) == (1, 0) and result.error < 1e-5
        assert sum(done) == self.shape[0] * self.shape[1] * self.shape[2]


@pytest.mark.parametrize("name", MODELS)
def test_the_second_batch_is_captured_and_later_ones_replay_it(name, captured):
    drawn = Drawn(name)
    assert "a graph a row of draws, because the kernel does not draw of Own" in drawn.engine.explain()
    rows = drawn.shape[1]
    for seed, graphs in enumerate((0, rows, rows, rows)):
        drawn.check(2, seed)
        assert len(captured) == graphs  # one a row
    assert [one.graph.replays for one in captured] == [3] * rows
    assert len({id(one.pool) for one in captured}) == 1
    assert {one.stream for one in captured} == {("a stream of", torch.device("cpu"))}


def test_known_levels_have_graphs_of_their_own(captured):
    drawn = Drawn("gated")
    for seed in range(3):
        drawn.check(2, seed, rows=1)  # filled in one pass, then from the middle of a row
        drawn.check(2, seed)
    assert len(captured) == 2 + 4


def test_graphs_belong_to_the_distribution_that_was_held(captured):
    """Not to what it looks like: a distribution of one's own may look like any other."""
    drawn = Drawn("gated")

    class Sharpened(type(drawn.distribution)):
        def __repr__(self):
            return "a distribution"

    sharp = [Sharpened(4, temperature=temperature) for temperature in (0.3, 0.9, 1.5, 2.5)]
    for seed in range(3):
        drawn.check(2, seed, sharp[0])
        drawn.check(2, seed, sharp[1])
    assert len(captured) == 2 * 4
    for seed in range(2):
        for distribution in sharp:
            drawn.check(2, seed, distribution)
    assert len(captured) == 2 * 4  # so many by turns are not kept from one time to the next


def test_a_smaller_batch_reuses_the_graphs(captured):
    """As the last part of a batch that is drawn in parts: its last image is drawn more than once."""
    drawn = Drawn("gated")
    for seed in range(2):
        drawn.check(5, seed)
    for n in (4, 3):
        drawn.check(n, 2)
    assert len(captured) == 4 and [one.graph.replays for one in captured] == [3] * 4
    drawn.check(2, 3)  # less than half
    assert len(captured) == 4 and captured[0].graph.replays == 3


MACHINE_MODELS = {
    "gated": lambda: GatedPixelCNN((1, 2, 3), 4, channels=4, layers=1),
    "plain, colours": lambda: PixelCNN((3, 2, 2), 3, channels=3, layers=1),
    "diagonal": lambda: PixelRNN((1, 2, 3), 3, hidden_channels=4, layers=1),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy
@pytest.mark.parametrize("name", MACHINE_MODELS)
def test_a_graph_a_program_draws_all_rows(name, captured, monkeypatch):
    """With options and known levels, too: what differs from batch to batch lies at fixed places."""
    monkeypatch.setitem(MODELS, name, MACHINE_MODELS[name])
    drawn = Drawn(name, Categorical)
    plan = drawn.engine.plan
    assert "a graph a program, which serves all its steps" in drawn.engine.explain()
    drawn.check(2, 0)
    (player,) = drawn.engine._players.values()
    assert isinstance(player, GraphPlayer)
    kinds = {(one.program, len(player.memory.moves.get(k, ()))) for k, one in enumerate(plan.steps) if k}
    assert 0 < len(captured) <= len(kinds)  # those of programs that several steps have
    drawn.check(2, 1)
    assert len(captured) <= len(kinds) + 1 < len(plan.steps)  # and of the step before the first draw
    replays, graphs = [one.graph.replays for one in captured], len(captured)
    drawn.check(2, 2, Categorical(drawn.model.levels, temperature=0.5), rows=1)
    assert len(captured) == graphs and sum(one.graph.replays for one in captured) > sum(replays)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy
def test_torch_draws_between_graphs_what_the_kernel_does_not(captured, monkeypatch):
    monkeypatch.setattr(GraphPlayer, "tiles", Tiles(LEVELS=2))
    monkeypatch.setitem(MODELS, "gated", MACHINE_MODELS["gated"])
    drawn = Drawn("gated", Categorical)
    for seed in range(2):
        drawn.check(2, seed, drawn.distribution.tempered(1.0, 3, 0.9))


def test_what_the_machine_does_not_know_torch_plays_and_explain_names(captured):
    model = MODELS["gated"]().eval()

    def explained(outer):
        network = Network(outer, model.shape, model.encode, None, model.levels)
        return Engine(make_plan(network, model.distribution), model.distribution, "cuda_graph", "always").explain()

    because, told = "a graph a row of draws, because the kernel", explained(Waves(model))
    assert f"{because} does not know" in told and "sin, which" in told
    assert f"{because} computes in float32" in explained(model.double())
