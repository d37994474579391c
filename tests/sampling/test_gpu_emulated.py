"""Whole images by the step machine as compiled code, on a GPU or emulated (`-p tests.emulated`), are those of naive."""

import os

import pytest
import torch

from fastgen import Categorical, accelerate
from fastgen.models import GatedPixelCNN, PixelCNN
from fastgen.sampling.request import SampleRequest
from fastgen.sampling.run.draw_loop import draw_batch

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="is of compiled code"),
    pytest.mark.usefixtures("device"),  # on a GPU it is one of the tests that need one
]
N = 3


def drawn(player_of, model, options=(1.0, None, None)):
    """Images of a player and of the naive loop, and the player."""
    from fastgen.sampling.run.gpu_player import GPUPlayer

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.no_grad():
        for parameter in model.to(device).parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)
    given = {"distribution": model.distribution, "encode": model.encode}
    sampler = accelerate(model.eval(), model.shape, backend="eager", **given)
    plan = sampler._backends.made[-1].backend.plan
    distribution = model.distribution.tempered(*options)
    noise = torch.rand(distribution.noise_shape(N, model.shape), device=device)
    player = player_of(GPUPlayer)(plan, N, device)
    assert not draw_batch(player, SampleRequest(N, model.shape, noise, distribution))
    names = dict(zip(("temperature", "top_k", "top_p"), options, strict=True))
    naive = accelerate(model, model.shape, backend="naive", **given).sample(N, noise=noise, **names)
    return player.levels, naive, player


def tiny():
    return GatedPixelCNN((1, 3, 3), 4, channels=6, layers=1)


def test_a_product_of_two_numbers_is_as_exact_as_stated():
    """Each sum is of one product and of zeros, so that sums round nothing but the three parts of it."""
    from fastgen.sampling.machine.language import Product, constant
    from fastgen.sampling.run.gpu_player import ERROR_OF_TF32X3
    from tests.sampling.machine import gpu_case

    factors, weight, blocks = torch.randn(N, 32), torch.randn(32, 64), gpu_case.Blocks()
    out = blocks.empty(32, 64)
    gpu_case.run(blocks, [Product(out, blocks.view(factors.diag_embed()), constant(weight))], precision="tf32x3")
    truth = factors.double().unsqueeze(-1) * weight.double()
    worst = float(((blocks.read(out) - truth) / truth).abs().max())
    assert worst <= ERROR_OF_TF32X3 + 2 * 2.0**-24
    assert worst > 2.0**-24  # it is no product of float32


def test_one_launch():
    levels, naive, player = drawn(lambda base: base, tiny())
    assert torch.equal(levels, naive) and len(naive.unique()) > 1
    assert player.launches == 2


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_larger_tiles(size):
    """The larger sizes of tiles that ship, with other products on some chips."""
    from fastgen.kernels.sampler.machine import SIZES

    levels, naive, _ = drawn(lambda base: type("Large", (base,), {"tiles": SIZES[size]}), tiny())
    assert torch.equal(levels, naive) and len(naive.unique()) > 1


def test_programs_that_share_images():
    levels, naive, player = drawn(lambda base: type("Together", (base,), {"together": 3}), tiny())
    assert torch.equal(levels, naive) and len(naive.unique()) > 1
    assert player.arrivals % 3 == 0 and player.arrivals > 0


@pytest.mark.slow
def test_an_instruction_a_launch():
    from fastgen.sampling.run.graph_player import GraphPlayer

    levels, naive, _ = drawn(lambda _: type("Uncaptured", (GraphPlayer,), {"captures": False}), tiny())
    assert torch.equal(levels, naive)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(0.7, 2, 0.8), (0.0, None, None)])
def test_options_and_colours(options):
    model = PixelCNN((3, 2, 2), 3, channels=6, layers=1)
    assert isinstance(model.distribution, Categorical)
    levels, naive, _ = drawn(lambda base: base, model, options)
    assert torch.equal(levels, naive)
