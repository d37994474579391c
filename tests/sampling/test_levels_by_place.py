"""Numbers of levels that depend on the channel or the place: columns of a table, codebooks of different sizes."""

import itertools

import pytest
import torch
from causal_models import Stranger
from torch import nn

from fastgen import Categorical, accelerate
from tests.sampling.exactness import assert_exact, pair

BACKENDS = ("naive", "fixed_point", "eager", "compiled")
SIZES = [2, 7, 1, 5]
K = max(SIZES)


class Table(nn.Module):
    """Columns of a table, each embedded by itself, with logits for its own levels (the others are `fill`)."""

    def __init__(self, fill=float("-inf"), images=False):
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(size, 8) for size in SIZES)
        self.heads = nn.ModuleList(nn.Linear(8, size) for size in SIZES)
        self.fill, self.images = fill, images

    def forward(self, x):
        hidden, found = torch.zeros(len(x), 8), []
        for j, size in enumerate(SIZES):
            found.append(nn.functional.pad(4 * self.heads[j](hidden), (0, K - size), value=self.fill))
            hidden = torch.tanh(hidden + self.embeddings[j](x[:, 0, 0, j] if self.images else x[:, j]))
        return torch.stack(found, 2).unsqueeze(2) if self.images else torch.stack(found, 1)


@torch.no_grad()
def drawn(logits_of, counts, noise, steps):
    """A plain loop: logits_of(levels) (n, K, C, H, W); of each place the first `counts` are possible."""
    levels = torch.zeros(noise.shape, dtype=torch.long)
    for c, i, j in steps:
        logits = logits_of(levels)[:, : int(counts[c, i, j]), c, i, j].double()
        u = noise[:, c, i, j, None].double()
        levels[:, c, i, j] = torch.searchsorted(logits.softmax(1).cumsum(1), u, right=True).squeeze(1)
    return levels


@pytest.mark.parametrize("fill", [float("-inf"), 3.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_tables(backend, fill):
    model = Table(fill).eval()
    sampler = accelerate(model, (4,), distribution=Categorical(SIZES, "BTK"), backend=backend, verify="always")
    noise = torch.rand(200, 4)
    counts, steps = torch.tensor(SIZES).view(1, 1, 4), [(0, 0, j) for j in range(4)]
    expected = drawn(
        lambda x: model(x[:, 0, 0]).permute(0, 2, 1)[:, :, None, None], counts, noise[:, None, None], steps
    )
    rows, nats = sampler.sample(200, noise=noise, return_log_prob=True)
    assert torch.equal(rows, expected[:, 0, 0]) and rows.amax(0).tolist() == [size - 1 for size in SIZES]
    if backend in ("eager", "compiled"):
        assert sampler.stats.redrawn == 0 and sampler.stats.error < 1e-5

    every = torch.tensor(list(itertools.product(*map(range, SIZES))))
    params = sampler.params(every)
    of_model = model(every).detach()
    for j, size in enumerate(SIZES):
        torch.testing.assert_close(params[:, j, :size], of_model[:, j, :size])
        assert (params[:, j, size:] == float("-inf")).all()
    log_prob = sampler.distribution.log_prob(params, every)
    assert log_prob.exp().sum().item() == pytest.approx(1, abs=1e-6)  # of every possible row
    first = (rows.unsqueeze(1) == every).all(2).int().argmax(1)
    torch.testing.assert_close(nats, log_prob[first], atol=1e-5, rtol=1e-5)
    assert torch.equal(sampler.decode(lambda _, place: rows[:, place[2]], 200), rows)


def test_the_same_table_as_an_image():
    options = {"distribution": Categorical(SIZES, "B(KC)HW"), "encode": lambda levels: levels}
    fast, naive = pair(Table(images=True).eval(), (1, 1, 4), **options)
    assert assert_exact(fast, naive, 200, seed=0).amax((0, 1, 2)).tolist() == [size - 1 for size in SIZES]


def counts_of(*shape):
    return torch.randint(1, 6, shape, generator=torch.Generator().manual_seed(1)).index_fill(-1, torch.tensor(0), 5)


COUNTS = {"channels": torch.tensor([3, 5, 2]).view(3, 1, 1), "places": counts_of(2, 4), "both": counts_of(3, 2, 4)}


class Laid(nn.Module):
    """Logits of three channels in a layout."""

    def __init__(self, layout, colours):
        super().__init__()
        self.inner, self.layout = Stranger(3, 15, colours), layout

    def forward(self, x):
        logits = self.inner(x).unflatten(1, (3, 5))  # colours are contiguous
        logits = logits if self.layout in ("BCKHW", "B(CK)HW") else logits.transpose(1, 2)
        return logits if len(self.layout) == 5 else logits.flatten(1, 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout, colours", [("BKCHW", 1), ("BCKHW", 3), ("B(KC)HW", 3), ("B(CK)HW", 1)])
@pytest.mark.parametrize("name", COUNTS)
def test_channels_and_places(name, layout, colours, backend):
    model, counts = Laid(layout, colours).eval(), COUNTS[name].expand(3, 2, 4)
    distribution = Categorical(COUNTS[name].tolist(), layout)
    assert distribution.levels == 5
    sampler = accelerate(model, (3, 2, 4), distribution=distribution, backend=backend, verify="always")
    noise = torch.rand(5, 3, 2, 4)

    def logits_of(levels):
        params = model(levels.float() / (counts - 1).clamp(min=1) * 2 - 1)
        return Categorical(5, layout).logits(params)

    steps = [(c, i, j) for i in range(2) for j in range(4) for c in range(3)]
    images = sampler.sample(5, noise=noise)
    assert torch.equal(images, drawn(logits_of, counts, noise, steps))
    assert (images < counts).all()
    if backend in ("eager", "compiled"):
        assert sampler.stats.redrawn == 0 and sampler.stats.error < 2e-5
    assert (sampler.sample(5, noise=noise, temperature=2.0, top_k=3) < counts).all()


@pytest.mark.parametrize("as_tensor", [False, True])
def test_grids_of_codes(as_tensor):
    class Codes(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Stranger(1, 5)

        def forward(self, x):
            return self.inner(x.unsqueeze(1)).movedim(1, -1)

    counts = COUNTS["places"] if as_tensor else COUNTS["places"].tolist()
    fast, naive = pair(Codes().eval(), (2, 4), distribution=Categorical(counts, "BHWK"))
    assert (assert_exact(fast, naive, 20, seed=0) < COUNTS["places"]).all()


class Own:
    """Levels from 0 to one less than those of the place, by a cosine of the parameter."""

    def __init__(self, levels):
        self.levels = levels

    def noise_shape(self, n, shape):
        return (n, *shape)

    def draw(self, params, noise, channel, previous):
        return ((params[:, channel].cos().abs() + noise[:, channel]) > 1).long()

    def log_prob(self, params, levels):
        return torch.zeros(len(params))


def test_own_distributions_with_levels_by_place():
    class Embeds(nn.Module):
        """Fails at levels that a channel does not have, where it is tried with them."""

        def __init__(self):
            super().__init__()
            self.few, self.many, self.inner = nn.Embedding(2, 3), nn.Embedding(7, 3), Stranger(6, 2)

        def forward(self, x):
            embedded = torch.cat((self.few(x[:, 0]), self.many(x[:, 1])), -1)
            return self.inner(embedded.movedim(-1, 1))

    model, options = Embeds().eval(), {"encode": lambda levels: levels}
    fast, naive = pair(model, (2, 3, 3), distribution=Own([[[2]], [[7]]]), **options)
    assert_exact(fast, naive, 5, seed=0, passes=None)


def test_bad_levels_are_named():
    model = Table().eval()
    for levels in ([], [1, 1], [2, 0], [2.5, 3], "ab", [[2], [3, 4]], None, [True, False]):
        with pytest.raises(ValueError, match="levels must be an int >= 2, or ints >= 1"):
            Categorical(levels)
    with pytest.raises(ValueError, match=r"levels must be broadcastable to \(4,\), got the shape \(3,\)"):
        accelerate(model, (4,), distribution=Categorical([2, 7, 5], "BTK"))
    with pytest.raises(ValueError, match="expected K = 9 logits"):
        accelerate(model, (4,), distribution=Categorical([2, 9, 1, 5], "BTK"))
    sampler = accelerate(model, (4,), distribution=Categorical(SIZES, "BTK"))
    row = torch.tensor([[1, 3, 1, 4]])
    for call in (
        lambda: sampler.params(row),
        lambda: sampler.decode(lambda _, place: row[:, place[2]], 1),
        lambda: sampler.sample(1, known=row, known_mask=torch.ones(4, dtype=torch.bool)),
    ):
        with pytest.raises(ValueError, match=r"must be levels in 0..0 at a place that has so many, got 1"):
            call()
    assert torch.equal(sampler.params(row - torch.tensor([0, 0, 1, 0])).argmax(-1)[:, 2], torch.tensor([0]))
