"""Whole images by the step machine of GPUs, in Triton's interpreter: the images of the naive loop."""

import pytest
import torch
from torch import nn

from fastgen import Categorical, accelerate
from fastgen.kernels.sampler import words
from fastgen.kernels.sampler.machine import Tiles
from fastgen.models import GatedPixelCNN, PixelCNN, PixelCNNPP, PixelRNN
from fastgen.sampling.machine.cpu.build import machine
from fastgen.sampling.plan.plan import make_plan
from fastgen.sampling.request import SampleRequest
from fastgen.sampling.run.cpu_player import CPUPlayer
from fastgen.sampling.run.draw_loop import draw_batch
from fastgen.sampling.run.gpu_player import GPUPlayer
from tests.sampling.exactness import assert_exact, pair

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


def played(player_class, plan, model, request):
    player = player_class(plan, request.n, torch.device("cpu"))
    assert not draw_batch(player, request)
    return player.levels.clone(), player.params().clone()


def test_tiles_of_images_in_any_order_and_the_machine_of_the_cpu_draw_the_same(monkeypatch):
    model = lively(GatedPixelCNN((1, 3, 3), 4, channels=6, layers=1))
    plan = make_plan(model, model.shape, model.distribution, model.encode, None, model.levels)
    request = SampleRequest(5, model.shape, torch.rand(5, *model.shape), model.distribution)

    class InReverse(GPUPlayer):
        """Tiles of two images, the last one first; products in tiles that nothing is a multiple of."""

        tiles = Tiles(BM=2, BN=16, BK=16, BR=2, BP=16, ROWS=1, LEVELS=2)

        def _launch(self, draws, first, last, until):
            for begin in reversed(range(0, self.n, 2)):
                self._launch_part(draws, first, last, until, (begin, min(begin + 2, self.n)))

    levels, params = played(GPUPlayer, plan, model, request)
    for other in (InReverse, CPUPlayer):
        found = played(other, plan, model, request)
        assert torch.equal(found[0], levels)
        torch.testing.assert_close(found[1], params, atol=1e-5, rtol=1e-5)


def test_known_levels_are_kept():
    model = lively(GatedPixelCNN((1, 3, 3), 4, channels=6, layers=1))
    fast, naive = pair(model, model.shape, "persistent", **arguments(model))
    known = torch.randint(4, (3, *model.shape))
    mask = torch.rand(3, *model.shape) < 0.4
    images = assert_exact(fast, naive, 3, error=1e-5, seed=1, known=known, known_mask=mask)
    assert torch.equal(images[mask], known[mask])


def test_progress_is_told_row_by_row():
    model = lively(GatedPixelCNN((1, 2, 3), 4, channels=4, layers=1))
    sampler, _ = pair(model, model.shape, "persistent", **arguments(model))
    sampler.sample(2, seed=0, progress=True)
    assert sampler.stats.launches == 3


def test_a_parameter_that_is_nan_is_an_error():
    model = lively(GatedPixelCNN((1, 2, 2), 3, channels=4, layers=1))
    sampler = accelerate(model, model.shape, distribution=model.distribution, backend="persistent")
    with torch.no_grad():
        [*model.parameters()][-1].fill_(float("nan"))
    with pytest.raises(Exception, match="NaN"):
        sampler.sample(2, seed=0)


def test_what_it_does_not_know_is_named():
    model = lively(PixelRNN((1, 3, 3), 4, hidden_channels=4, layers=1))
    with pytest.warns(UserWarning, match="from the persistent .* the kernel does not know .*, which .* steps need"):
        sampler = accelerate(model, model.shape, distribution=model.distribution, backend="persistent")
    assert "instead of persistent" in sampler.explain()
    half = lively(GatedPixelCNN((1, 2, 2), 3, channels=4, layers=1)).to(torch.bfloat16)
    with pytest.warns(UserWarning, match="the kernel computes in float32 and the model in torch.bfloat16"):
        accelerate(half, half.shape, distribution=half.distribution, backend="persistent")


def test_the_machines_know_the_same():
    assert set(machine().ops) == set(words.OPS)
