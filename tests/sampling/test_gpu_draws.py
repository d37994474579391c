"""Draws of the step machine in float32, in Triton's interpreter, for chips that are slow in float64."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastgen import Categorical
from fastgen.kernels.sampler import machine
from fastgen.kernels.sampler.machine import Tiles
from fastgen.models import GatedPixelCNN
from fastgen.sampling.draws import unsure_images
from fastgen.sampling.machine.gpu.draws import error_of_float32_draws
from fastgen.sampling.plan.plan import make_plan
from fastgen.sampling.request import SampleRequest
from fastgen.sampling.run.cpu_player import CPUPlayer
from fastgen.sampling.run.gpu_player import GPUPlayer
from fastgen.sampling.run.margin import Held
from fastgen.sampling.trace.network import Network
from tests.sampling.exactness import assert_exact, pair
from tests.sampling.test_gpu_player import OPTIONS, SMALL, arguments, lively, only_launch, played, small

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy


class InFloat32(GPUPlayer):
    tiles = Tiles(DOUBLE=False)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", SMALL)
def test_draws_in_float32_are_those_in_float64_where_no_rounding_decides(name, options):
    plan, distribution = small(name)
    if options[1:] != (None, None) and not isinstance(distribution, Categorical):
        pytest.skip("top_k and top_p are of levels")
    distribution = distribution.tempered(*options)
    shape = tuple(plan.levels.shape[1:])
    request = SampleRequest(3, shape, torch.rand(distribution.noise_shape(3, shape)), distribution)
    (levels, params), (expected, _) = (played(one, plan, request) for one in (InFloat32, CPUPlayer))
    error = error_of_float32_draws(distribution)
    if not unsure_images(request, params, levels, error, None).any():
        assert torch.equal(levels, expected)


def test_a_level_of_no_probability_is_never_drawn_in_float32():
    """Uniforms next to 1, and probabilities whose float32 sums fall short of theirs; the last levels have none."""

    logits = torch.randn(300, 1, 40) * 3
    logits[250:] = -1e30

    class Given(nn.Module):
        def forward(self, x):
            return logits + 0 * F.pad(x, (1, 0))[..., :-1]

    distribution = Categorical(300, "B(KC)HW")
    plan = make_plan(Network(Given(), (1, 1, 40), lambda x: x / 299.0, None, 300), distribution)
    noise = (1 - 2.0**-24 * torch.arange(1, 5).view(4, 1, 1, 1)).expand(4, 1, 1, 40)
    levels = played(InFloat32, plan, SampleRequest(4, (1, 1, 40), noise, distribution))[0]
    assert 200 < levels.max() < 250


def test_the_margin_says_what_draws_in_float32_add(monkeypatch):
    monkeypatch.setattr(machine, "draws_in_float64", lambda device: False)
    model = lively(GatedPixelCNN((1, 2, 2), 4, channels=4, layers=1))
    fast, naive = pair(model, model.shape, "persistent", "auto", **arguments(model))
    assert_exact(fast, naive, 3, error=1e-5, seed=0)
    assert only_launch(fast).tiles.DOUBLE is False
    assert "and 3.8e-06 of draws in float32" in fast.explain()
    margin = fast._backends.made[-1].backend.margin
    request = SampleRequest(3, (1, 2, 2), torch.full((3, 1, 2, 2), 0.5), model.distribution)
    logits = torch.zeros(3, 4, 1, 2, 2)  # of four levels the second ends next to 0.5
    logits[:, 0] = 4e-6
    margin.error, margin._shifts = 1e-12, Held(1)
    for of_draws in (margin.of_draws, 0.0):
        margin.of_draws = of_draws
        assert margin.unsure(request, logits, torch.ones(3, 1, 2, 2, dtype=torch.long)).any() == (of_draws > 0)
