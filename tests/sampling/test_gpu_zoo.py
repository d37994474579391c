"""Models of strangers, played by the step machine of GPUs from the tables that the machine of the CPU has.

In Triton's interpreter this would take hours: it runs compiled, on a GPU or emulated (`-p tests.emulated`).
"""

import os
import warnings

import pytest
import torch

from fastgen import accelerate
from fastgen.sampling.machine.gpu.draws import KINDS
from fastgen.sampling.machine.parts import unknown_in
from fastgen.sampling.request import SampleRequest
from fastgen.sampling.run.cpu_player import CPUPlayer
from fastgen.sampling.run.draw_loop import draw_batch
from fastgen.sampling.run.engine import Engine
from tests.sampling.zoo import CASES, built

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="takes hours in the interpreter"),
    pytest.mark.slow,
]
N = 3


@pytest.mark.parametrize("name", CASES)
def test_the_zoo_by_one_table(name):
    from fastgen.sampling.run.gpu_player import GPUPlayer

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, shape, arguments = built(name, N)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sampler = accelerate(model.to(device), shape, backend="eager", **arguments)
        engine = sampler._backends.made[-1].backend
    if not isinstance(engine, Engine) or type(engine.distribution) not in KINDS:
        pytest.skip("has no plan, or draws that the machine does not know")
    known = [not unknown_in(program) for program in engine.plan.programs]
    if not all(known[step.program] for step in engine.plan.steps[1:]):
        pytest.skip("has instructions that the machines do not know")
    noise = torch.rand(engine.distribution.noise_shape(N, shape), device=device)
    request = SampleRequest(N, shape, noise, engine.distribution, condition=arguments["condition"])
    player = GPUPlayer(engine.plan, N, device)
    assert not draw_batch(player, request)
    images = sampler.sample(N, noise=noise).view(player.levels.shape)
    assert torch.equal(player.levels, images) and len(images.unique()) > 1
    assert player.launches <= 2
    if device.type == "cpu":
        other = CPUPlayer(engine.plan, N, device)
        assert not draw_batch(other, request)
        torch.testing.assert_close(player.params(), other.params(), atol=2e-5, rtol=2e-5)
