"""Models in half precision: an engine's output is as far from the model's own as rounding takes it, and no further."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastgen import Categorical, accelerate
from fastgen.models import GatedPixelCNN, PixelCNN, PixelCNNPP, PixelRNN
from fastgen.sampling.draws import draw_image
from fastgen.sampling.request import SampleRequest
from tests.sampling.zoo_case import DataMask

MODELS = {
    "gated, classes": lambda: GatedPixelCNN((1, 2, 3), 4, channels=6, layers=1, n_classes=3),
    "plain, colours": lambda: PixelCNN((3, 2, 2), 3, channels=6, layers=1),
    "plusplus": lambda: PixelCNNPP((3, 4, 4), channels=4, layers=1, n_mix=2),
    "diagonal": lambda: PixelRNN((1, 2, 3), 4, hidden_channels=6, layers=1),
    "diagonal, colours": lambda: PixelRNN((3, 3, 2), 3, hidden_channels=6, layers=1),
    "row": lambda: PixelRNN((1, 4, 3), 3, kind="row_lstm", hidden_channels=6, layers=2),
}
N = 3
SOME = ("gated, classes", "diagonal", "plain, colours")  # in Triton's interpreter, which takes long


def made(name, dtype, backend):
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)
    condition = torch.arange(N) % 3 if model.n_classes else None
    sampler = accelerate(model, model.shape, distribution=model.distribution, condition=condition, backend=backend)
    assert f"{backend}:" in sampler.explain()
    return model, condition, sampler


def check_distance(model, condition, sampler, levels):
    """The logits of the same levels are as near as the model's own to those in float64, with the same weights."""
    dtype = next(model.parameters()).dtype
    params = sampler.params(levels)
    assert params.dtype == dtype
    with torch.no_grad():
        own = model(model.encode(levels), condition)
        model = copy.deepcopy(model).double()
        truth = model(model.encode(levels), condition)
    of_engine, of_model = ((one.double() - truth).abs().max() / truth.abs().max() for one in (params, own))
    assert of_model < 8 * torch.finfo(dtype).eps  # else the bound says nothing
    assert of_engine < 1.5 * of_model + torch.finfo(dtype).eps
    return params


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_as_near_to_the_truth_as_the_models_own(name, dtype):
    model, condition, sampler = made(name, dtype, "eager")
    check_distance(model, condition, sampler, torch.randint(getattr(model, "levels", 256), (N, *model.shape)))


@pytest.mark.parametrize(("name", "dtype"), [*((name, torch.bfloat16) for name in SOME), (SOME[0], torch.float16)])
def test_the_step_machine_draws_of_such_logits(name, dtype):
    model, condition, sampler = made(name, dtype, "persistent")
    noise = torch.rand(sampler.noise_shape(N))
    images = sampler.sample(N, noise=noise)
    assert (sampler.stats.passes, sampler.stats.launches) == (0, 2)
    params = check_distance(model, condition, sampler, images)
    request = SampleRequest(N, model.shape, noise, model.distribution)
    assert torch.equal(draw_image(request, params)[0], images) and len(images.unique()) > 1
    eager = made(name, dtype, "eager")[2].params(images)
    assert (params.double() - eager.double()).abs().max() <= 4 * torch.finfo(dtype).eps * eager.double().abs().max()


class WavesAbove(nn.Module):
    """Of the rows above, a function that the step machine does not know, and where it is large."""

    def __init__(self):
        super().__init__()
        self.above, self.near = nn.Conv2d(1, 4, (1, 3), padding=(0, 1)), DataMask(1, 4, 3, True)
        self.out = nn.Conv2d(4, 3, 1)

    def forward(self, x):
        waves = self.above(x).sin()
        waves = F.pad(torch.where(waves > waves.cos(), waves, -0.5), (0, 0, 1, -1))
        return self.out((waves + self.near(x)).tanh())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_torch_plays_the_few_steps_that_the_machine_does_not_know(dtype):
    """In the model's precision, also where memory holds half precision as float32."""
    torch.manual_seed(0)
    model, shape, distribution = WavesAbove().to(dtype).eval(), (1, 2, 12), Categorical(3, "B(KC)HW")
    fast, eager = (
        accelerate(model, shape, distribution=distribution, backend=backend) for backend in ("persistent", "eager")
    )
    assert "persistent: torch plays 1 of 25 steps, between launches, for cos, sin" in fast.explain()
    images = fast.sample(N, seed=0)
    assert fast.stats.backend == "persistent" and fast.stats.launches == 3 and len(images.unique()) > 1
    found, expected = fast.params(images).double(), eager.params(images).double()
    assert (found - expected).abs().max() <= 2 * torch.finfo(dtype).eps * expected.abs().max()
