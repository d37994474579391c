"""Whole images by the step machine of GPUs, in Triton's interpreter: the images of the naive loop."""

import pytest
import torch
from torch import nn

from fastgen import Bernoulli, Categorical, LogisticMixture, accelerate
from fastgen.kernels.sampler import words
from fastgen.kernels.sampler.machine import SIZES, Tiles
from fastgen.models import GatedPixelCNN, PixelCNN, PixelCNNPP, PixelRNN
from fastgen.sampling.machine.cpu.build import machine
from fastgen.sampling.machine.gpu.fusion import Fused
from fastgen.sampling.machine.parts import part_of
from fastgen.sampling.plan.plan import make_plan
from fastgen.sampling.request import SampleRequest
from fastgen.sampling.run import gpu_player, players
from fastgen.sampling.run.cpu_player import CPUPlayer
from fastgen.sampling.run.draw_loop import draw_batch
from fastgen.sampling.run.gpu_player import GPUPlayer
from fastgen.sampling.trace.network import Network
from tests.sampling.exactness import assert_exact, pair
from tests.sampling.test_operations import OPERATIONS, Between

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy


class Transformer(nn.Module):
    """A decoder of one layer over pixels in reading order: (B, 1, H, W) -> (B, K, H, W)."""

    def __init__(self, levels, pixels, width=8):
        super().__init__()
        self.inner, self.places = nn.Linear(1, width), nn.Parameter(torch.randn(pixels, width))
        self.normed, self.again = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow, self.head = nn.Linear(width, 16), nn.Linear(16, width), nn.Linear(width, levels)

    def forward(self, x):
        b, _, h, w = x.shape
        tokens = nn.functional.pad(x.flatten(2)[..., :-1], (1, 0)).transpose(1, 2)
        y = self.inner(tokens) + self.places
        q, k, v = (part.view(b, h * w, 2, -1).transpose(1, 2) for part in self.qkv(self.normed(y)).chunk(3, -1))
        seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = y + self.out(seen.transpose(1, 2).reshape(b, h * w, -1))
        y = y + self.narrow(nn.functional.gelu(self.wide(self.again(y))))
        return self.head(y).transpose(1, 2).unflatten(2, (h, w))


MODELS = {
    "gated, classes": lambda: GatedPixelCNN((1, 3, 4), 5, channels=6, layers=1, n_classes=3),
    "plain, colours": lambda: PixelCNN((3, 3, 2), 3, channels=6, layers=1),
    "diagonal": lambda: PixelRNN((1, 2, 3), 3, hidden_channels=4, layers=1),
    "row": lambda: PixelRNN((1, 3, 2), 3, kind="row_lstm", hidden_channels=4, layers=1),
}


def lively(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)
    return model.eval()


def arguments(model, n=3):
    condition = torch.arange(n) % model.n_classes if getattr(model, "n_classes", None) else None
    return {"distribution": model.distribution, "condition": condition}


def only_launch(sampler):
    (player,) = sampler._backends.made[-1].backend._players.values()
    return player


@pytest.mark.parametrize("name", MODELS)
def test_equals_naive_in_one_launch(name):
    model = lively(MODELS[name]())
    fast, naive = pair(model, model.shape, "persistent", **arguments(model))
    images = [assert_exact(fast, naive, 3, error=1e-5, seed=seed) for seed in range(2)]  # the second begins anew
    assert not torch.equal(*images)
    assert only_launch(fast).launches == 4  # for each batch: what depends on no draw; all draws and steps
    assert fast.stats.backend == "persistent" and fast.stats.launches == 2


@pytest.mark.slow
def test_plusplus_in_one_launch():
    model = lively(PixelCNNPP((3, 4, 4), channels=4, layers=1, n_mix=2))
    assert_exact(*pair(model, model.shape, "persistent", **arguments(model)), 2, error=1e-5, seed=0)


def test_a_transformer_in_one_launch():
    model = lively(Transformer(4, 9))
    fast, naive = pair(model, (1, 3, 3), "persistent", distribution=Categorical(4, "B(KC)HW"))
    assert_exact(fast, naive, 3, error=1e-5, seed=0)
    assert only_launch(fast).launches == 2


def test_choices_in_one_launch():
    distribution = Categorical(4, "B(KC)HW")
    fast, naive = pair(
        Between(OPERATIONS["strongest and weakest"]).eval(), (1, 2, 3), "persistent", distribution=distribution
    )
    assert_exact(fast, naive, 3, error=1e-5, seed=0)
    assert only_launch(fast).launches == 2


def played(player_class, plan, request):
    player = player_class(plan, request.n, torch.device("cpu"))
    assert not draw_batch(player, request)
    return player.levels.clone(), player.params().clone()


SMALL = {
    "gated": (lambda: GatedPixelCNN((1, 3, 3), 4, channels=6, layers=1), None),
    "plain, colours": (lambda: PixelCNN((3, 2, 2), 3, channels=6, layers=1), None),
    "black and white": (lambda: GatedPixelCNN((1, 3, 3), 2, channels=4, layers=1), Bernoulli()),
    "mixture of logistics": (lambda: PixelCNN((1, 2, 3), 6, channels=4, layers=1), LogisticMixture(2)),
}


class OneOfTwo(nn.Module):
    """A logit for level 1 from the logits of both."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        logits = self.model(x)[:, :, 0]
        return (logits[:, 1:] - logits[:, :1]) * 1.5


class Flat(nn.Module):
    """The logits of one channel as the parameters of a pixel."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)[:, :, 0]


class Waves(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).sin()


def small(name):
    if name == "recurrent":
        model = lively(PixelRNN((1, 2, 3), 3, hidden_channels=4, layers=1))
        network = Network(model, model.shape, model.encode, None, model.levels)
        return make_plan(network, model.distribution), model.distribution
    model = lively(SMALL[name][0]())
    distribution = SMALL[name][1] or model.distribution
    wrap = {Bernoulli: OneOfTwo, LogisticMixture: Flat}.get(type(distribution), lambda model: model)
    encode = (lambda x: x / 127.5 - 1) if isinstance(distribution, LogisticMixture) else model.encode
    levels = 256 if isinstance(distribution, LogisticMixture) else model.levels
    return make_plan(Network(wrap(model).eval(), model.shape, encode, None, levels), distribution), distribution


OPTIONS = [(1.0, None, None), (0.6, None, None), (0.0, None, None), (1.0, 2, None), (0.7, None, 0.8), (1.5, 3, 0.6)]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", SMALL)
def test_the_machine_of_the_cpu_draws_the_same(name, options):
    plan, distribution = small(name)
    if options[1:] != (None, None) and not isinstance(distribution, Categorical):
        pytest.skip("top_k and top_p are of levels")
    distribution = distribution.tempered(*options)
    shape = tuple(plan.levels.shape[1:])
    noise = torch.rand(distribution.noise_shape(3, shape))
    known, mask = torch.randint(2, (3, *shape)), torch.rand(3, *shape) < 0.2
    request = SampleRequest(3, shape, noise, distribution, known, mask)
    (levels, params), (expected, expected_params) = (played(one, plan, request) for one in (GPUPlayer, CPUPlayer))
    assert torch.equal(levels, expected) and torch.equal(levels[mask], known[mask])
    torch.testing.assert_close(params, expected_params, atol=1e-5, rtol=1e-5)


def test_heavy_programs_are_those_of_rows_while_images_are_few(monkeypatch):
    model = GatedPixelCNN((1, 8, 8), 4, channels=16, layers=2).eval()
    plan = make_plan(Network(model, model.shape, model.encode, None, model.levels), model.distribution)
    of_rows = {step.program for step in plan.steps[8:-1:8]}
    monkeypatch.setattr(gpu_player, "WORTH_A_LAUNCH", 2**12)
    batches = {1: SIZES[0], 16: SIZES[0], 132 * 64: SIZES[2]}
    found = {n: gpu_player.heavy_programs(plan, n, tiles, 132) for n, tiles in batches.items()}
    assert found == {1: of_rows, 16: of_rows, 132 * 64: set()}


def test_how_it_plays_is_explained(monkeypatch):
    model = GatedPixelCNN((1, 3, 3), 4, channels=6, layers=1).eval()

    def explained():
        return accelerate(model, model.shape, distribution=model.distribution, backend="persistent").explain()

    told = explained()
    assert "products of float32 in IEEE arithmetic" in told and "heavy" not in told
    monkeypatch.setattr(gpu_player, "precision_on", lambda device: "tf32x3")
    monkeypatch.setattr(gpu_player, "WORTH_A_LAUNCH", 2**9)
    told = explained()
    assert "products of float32 by TF32 three times, each wrong by 7.2e-07 of it at most" in told
    assert "persistent: heavy programs, 1 of 3, are played over the whole GPU" in told


def test_joined_or_not_the_numbers_are_the_same(monkeypatch):
    plan, distribution = small("gated")
    request = SampleRequest(3, (1, 3, 3), torch.rand(3, 1, 3, 3), distribution)
    joined = played(GPUPlayer, plan, request)
    monkeypatch.setattr(gpu_player, "fuse", lambda instructions: [Fused(part_of(one)) for one in instructions])
    one_by_one = played(GPUPlayer, plan, request)
    assert all(torch.equal(*both) for both in zip(joined, one_by_one, strict=True))


def test_known_levels_are_kept():
    model = lively(GatedPixelCNN((1, 3, 3), 4, channels=6, layers=1))
    fast, naive = pair(model, model.shape, "persistent", **arguments(model))
    known = torch.randint(4, (3, *model.shape))
    mask = torch.rand(3, *model.shape) < 0.4
    mask[:, :, 0] = True  # a row that is filled in one pass
    images = assert_exact(fast, naive, 3, error=1e-5, seed=1, known=known, known_mask=mask)
    assert torch.equal(images[mask], known[mask])


def test_what_it_does_not_draw_torch_draws(monkeypatch):
    model = lively(GatedPixelCNN((1, 2, 2), 4, channels=4, layers=1))
    fast, naive = pair(model, model.shape, "persistent", **arguments(model))
    assert "top_k or top_p of more than 256 levels, torch draws" in fast.explain()
    assert "programs that own an image: 1 (several, which wait for each other, have not been m" in fast.explain()
    monkeypatch.setattr(GPUPlayer, "tiles", Tiles(LEVELS=2))
    assert_exact(fast, naive, 3, error=1e-5, seed=1, top_k=2, top_p=0.9)
    assert fast.stats.launches == 5  # before the draws, and after each


def test_a_batch_is_drawn_in_parts_that_fit(monkeypatch):
    monkeypatch.setattr(players, "images_that_fit", lambda plan, device: 2)
    model = lively(GatedPixelCNN((1, 2, 2), 4, channels=4, layers=1))
    fast, naive = pair(model, model.shape, "persistent", **arguments(model))
    assert_exact(fast, naive, 3, error=1e-5, passes=2, seed=0)
    engine = fast._backends.made[-1].backend
    assert engine.most == 2 and [*engine._players] == [2, 1]


def test_progress_is_told_row_by_row():
    model = lively(GatedPixelCNN((1, 2, 3), 4, channels=4, layers=1))
    sampler, _ = pair(model, model.shape, "persistent", **arguments(model))
    sampler.sample(2, seed=0, progress=True)
    assert sampler.stats.launches == 3


def test_changed_weights_are_noticed():
    model = lively(GatedPixelCNN((1, 2, 2), 4, channels=4, layers=1))
    fast, naive = pair(model, model.shape, "persistent", **arguments(model))
    before = assert_exact(fast, naive, 3, error=1e-5, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    assert not torch.equal(assert_exact(fast, naive, 3, error=1e-5, seed=0), before)


def test_a_parameter_that_is_nan_is_an_error():
    model = lively(GatedPixelCNN((1, 2, 2), 3, channels=4, layers=1))
    sampler = accelerate(model, model.shape, distribution=model.distribution, backend="persistent")
    with torch.no_grad():
        [*model.parameters()][-1].fill_(float("nan"))
    with pytest.raises(Exception, match="NaN"):
        sampler.sample(2, seed=0)


def test_what_it_does_not_know_is_named():
    model = lively(GatedPixelCNN((1, 2, 2), 3, channels=4, layers=1))
    given = {"distribution": model.distribution, "encode": model.encode}
    with pytest.warns(UserWarning, match="from the persistent .* the kernel does not know sin.*, which .* steps need"):
        sampler = accelerate(Waves(model), model.shape, backend="persistent", **given)
    assert "instead of persistent" in sampler.explain()
    with pytest.warns(UserWarning, match="in half precision, the model in torch.float64"):
        accelerate(model.double(), model.shape, distribution=model.distribution, backend="persistent")


def test_the_machines_know_the_same():
    assert set(machine().ops) == set(words.OPS)
