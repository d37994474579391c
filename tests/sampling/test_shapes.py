"""Sequences, grids of codes, other layouts and outputs: held to loops in plain PyTorch, with no code of the sampler."""

import types

import pytest
import torch
from causal_models import Stranger, small
from torch import nn

from fastgen import Bernoulli, Categorical, NotCausalError, accelerate
from tests.sampling.exactness import assert_exact, pair

K, T = 5, 7


class Sequence(nn.Module):
    """Tokens (B, T) -> logits of each from those before: a recurrent net, or attention."""

    def __init__(self, layout="BTK", attention=False, embeds="embedding"):
        super().__init__()
        self.embedding, self.out = nn.Embedding(K + 1, 8), nn.Linear(8, K)
        self.mix = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True) if attention else nn.GRU(8, 8)
        self.layout, self.embeds = layout, embeds
        with torch.no_grad():
            self.out.weight.mul_(4)

    def forward(self, tokens):
        if self.embeds == "cast":
            tokens = tokens.long()
        start = torch.full_like(tokens[:, :1], K)
        x = self.embedding(torch.cat((start, tokens[:, :-1]), 1))
        if isinstance(self.mix, nn.GRU):
            hidden = torch.zeros(len(x), 8)
            states = []
            for t in range(x.shape[1]):
                hidden = torch.tanh(x[:, t] + hidden @ self.mix.weight_hh_l0[:8].T)
                states.append(hidden)
            x = torch.stack(states, 1)
        else:
            x = self.mix(x, src_mask=nn.Transformer.generate_square_subsequent_mask(T), is_causal=True)
        logits = self.out(x)
        return logits.mT if self.layout == "BKT" else logits


@torch.no_grad()
def plain_loop(logits_of, shape, noise):
    """logits_of(levels (n, *shape)) -> (n, *shape, K); draws in raster order by the inverse CDF."""
    levels = torch.zeros(len(noise), *shape, dtype=torch.long)
    for place in range(levels[0].numel()):
        cumulative = logits_of(levels).flatten(1, -2)[:, place].double().softmax(-1).cumsum(-1)
        u = noise.reshape(len(noise), -1)[:, place : place + 1].double()
        levels.view(len(noise), -1)[:, place] = torch.searchsorted(cumulative, u, right=True).squeeze(1)
    return levels


BACKENDS = ("naive", "fixed_point", "eager", "compiled")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("embeds", ["embedding", "cast"])
@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("layout", ["BTK", "BKT"])
def test_sequences_of_tokens(layout, attention, embeds, backend):
    model = Sequence(layout, attention, embeds).eval()
    distribution = Categorical(K, layout)
    sampler = accelerate(model, (T,), distribution=distribution, backend=backend, verify="always")
    assert sampler.noise_shape(3) == (3, T)
    noise = torch.rand(3, T)
    expected = plain_loop(lambda x: model(x).mT if layout == "BKT" else model(x), (T,), noise)
    images, nats = sampler.sample(3, noise=noise, return_log_prob=True)
    assert torch.equal(images, expected) and images.dtype == torch.long
    if backend in ("eager", "compiled"):
        assert (sampler.stats.passes, sampler.stats.redrawn) == (1, 0) and sampler.stats.error < 1e-5
    with torch.no_grad():
        params = model(images)
    torch.testing.assert_close(nats, distribution.log_prob(params, images), rtol=1e-5, atol=1e-5)
    by_hand = (params.mT if layout == "BKT" else params).double().log_softmax(-1)
    torch.testing.assert_close(nats, by_hand.gather(-1, images.unsqueeze(-1)).sum((1, 2)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sampler.params(images), params)
    known = torch.tensor([4, 0, 3, 1, 0, 0, 0])
    mask = torch.arange(T) < 3
    prompted = sampler.sample(3, noise=noise, known=known, known_mask=mask)
    assert torch.equal(prompted[:, :3], known[:3].expand(3, 3)) and not torch.equal(prompted[:, 3:], images[:, 3:])
    places = []
    assert torch.equal(sampler.decode(lambda _, place: (places.append(place), images[:, place[2]])[1], 3), images)
    assert places == [(0, 0, t) for t in range(T)]
    assert sampler.sample(0).shape == (0, T)


class Codes(nn.Module):
    """A grid of codes (B, H, W) through a masked network of images."""

    def __init__(self, takes, gives):
        super().__init__()
        self.embedding, self.inner = nn.Embedding(K, 3), Stranger(3 if takes == "codes" else 1, K)
        self.takes, self.gives = takes, gives

    def forward(self, x):
        x = self.embedding(x).movedim(-1, 1) if self.takes == "codes" else x.unsqueeze(1)
        logits = self.inner(x)
        return logits.movedim(1, -1) if self.gives == "BHWK" else logits


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("takes", ["codes", "floats"])
@pytest.mark.parametrize("gives", ["BHWK", "B(KC)HW"])
def test_grids_of_codes(gives, takes, backend):
    model, shape = Codes(takes, gives).eval(), (3, 4)
    sampler = accelerate(model, shape, distribution=Categorical(K, gives), backend=backend, verify="always")
    noise = torch.rand(sampler.noise_shape(3))
    assert noise.shape == (3, 3, 4)

    def logits(levels):
        found = model(levels if takes == "codes" else levels.float() / (K - 1) * 2 - 1)
        return found if gives == "BHWK" else found.movedim(1, -1)

    images = sampler.sample(3, noise=noise)
    assert torch.equal(images, plain_loop(logits, shape, noise))
    if backend in ("eager", "compiled"):
        assert sampler.stats.redrawn == 0 and sampler.stats.error < 1e-5
    with torch.no_grad():
        given = images if takes == "codes" else images.float() / (K - 1) * 2 - 1
        torch.testing.assert_close(sampler.params(images), model(given))


def test_levels_last_for_images_of_one_channel():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Stranger(1, K)

        def forward(self, x):
            return self.inner(x).movedim(1, -1)

    model = Last().eval()
    fast, naive = pair(model, (1, 3, 4), distribution=Categorical(K, "BHWK"))
    images = assert_exact(fast, naive, 3, seed=0)
    first = accelerate(model.inner, (1, 3, 4), distribution=Categorical(K, "B(KC)HW"))
    assert torch.equal(images, first.sample(3, seed=0))


@pytest.mark.parametrize("shape", [(6,), (2, 3)])
def test_one_logit_a_place(shape):
    class Bits(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Stranger(1, 1)

        def forward(self, x):
            return self.inner(x.view(len(x), 1, -1, x.shape[-1])).view(x.shape)

    model = Bits().eval()
    fast, naive = pair(model, shape, distribution=Bernoulli())
    bits = assert_exact(fast, naive, 4, seed=0)
    assert bits.shape == (4, *shape)
    height = 1 if len(shape) == 1 else shape[0]
    image = accelerate(model.inner, (1, height, shape[-1]), distribution=Bernoulli()).sample(4, seed=0)
    assert torch.equal(bits.flatten(1), image.flatten(1))


OUTPUTS = {
    "a tuple": (lambda y: (y.sum(), y), lambda found: found[1]),
    "a dict": (lambda y: {"logits": y, "loss": None}, lambda found: found["logits"]),
    "an object": (lambda y: types.SimpleNamespace(logits=y), lambda found: found.logits),
    "its logits twice": (lambda y: y / 2, lambda found: found * 2),
}


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_model_returns(name, backend):
    wrap, output = OUTPUTS[name]
    inner, shape, distribution = small("grey")

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return wrap(self.inner(x))

    model = Wrapped().eval()
    sampler = accelerate(model, shape, distribution=distribution, output=output, backend=backend)
    expected = accelerate(inner, shape, distribution=distribution, backend="naive").sample(3, seed=0)
    assert torch.equal(sampler.sample(3, seed=0), expected)
    if name != "its logits twice":
        with pytest.raises(TypeError, match="must return a tensor"):
            accelerate(model, shape, distribution=distribution, backend=backend)


def test_leaks_keep_the_names_of_the_models_own_modules():
    class Leaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.out = nn.Embedding(K, 8), nn.Linear(8, K)

        def forward(self, x):
            return self.out(self.embedding(x))

    with pytest.raises(NotCausalError) as caught:
        accelerate(Leaks().eval(), (T,), distribution=Categorical(K, "BTK"))
    assert caught.value.report.leaks[0].module in ("embedding", "out")


def test_columns_of_different_sizes_may_be_clamped():
    """Position j has sizes[j] codes, its logits are padded with -inf; the embedding takes no others."""
    sizes = torch.tensor([2, 7, 5, 3])

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.embeddings = nn.ModuleList(nn.Embedding(int(size), 8) for size in sizes)
            self.heads = nn.ModuleList(nn.Linear(8, int(size)) for size in sizes)

        def forward(self, x):
            hidden, found = torch.zeros(len(x), 8), []
            for j, size in enumerate(sizes.tolist()):
                logits = self.heads[j](hidden)
                found.append(nn.functional.pad(logits, (0, 7 - size), value=float("-inf")))
                hidden = torch.tanh(hidden + self.embeddings[j](x[:, j]))
            return torch.stack(found, 1)

    options = {"distribution": Categorical(7, "BTK"), "encode": lambda x: torch.minimum(x.view(-1, 4), sizes - 1)}
    fast, naive = pair(Table().eval(), (4,), **options)
    drawn = assert_exact(fast, naive, 200, seed=0)
    assert torch.equal(drawn.amax(0), sizes - 1)


@pytest.mark.parametrize("layout", ["BKCHW", "BCKHW", "B(KC)HW", "B(CK)HW"])
@pytest.mark.parametrize("shape", [(1, 4, 3), (4, 3)])
def test_outputs_of_one_channel_may_leave_its_axis_out(shape, layout):
    torch.manual_seed(0)
    model = Stranger(1, K).eval()

    def encode(levels):
        return levels.view(-1, 1, 4, 3) / 2.0

    fast, naive = pair(model, shape, "compiled", distribution=Categorical(K, layout), encode=encode)
    noise = torch.rand(5, *shape)
    images = assert_exact(fast, naive, 5, noise=noise, return_log_prob=True)
    expected = plain_loop(lambda levels: model(encode(levels)).movedim(1, -1), (4, 3), noise)
    assert torch.equal(images.view(5, 4, 3), expected)
    with pytest.raises(ValueError, match="params has the shape"):
        accelerate(model, shape, distribution=Categorical(K + 1, layout), encode=encode)
