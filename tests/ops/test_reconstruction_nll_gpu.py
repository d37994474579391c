"""What only a GPU can show of the likelihoods: offsets beyond 2^31 elements, and the same bits again and again."""

import pytest
import torch

from fastgen.ops import reconstruction_nll

pytestmark = pytest.mark.gpu
# Parameters of two images, more than 2^31 elements together, and the images.
LARGE = {
    "bernoulli": ((2, 1, 2**15, 2**15 + 8), (2, 1, 2**15, 2**15 + 8)),
    "gaussian": ((2, 2, 2**15, 2**14 + 8), (2, 1, 2**15, 2**14 + 8)),
    "categorical": ((2, 256, 1, 2048, 2056), (2, 1, 2048, 2056)),
    "logistic_mixture": ((2, 30, 6000, 6000), (2, 1, 6000, 6000)),
}


def problem(likelihood, parameters, image, dtype):
    params = torch.empty(parameters, device="cuda", dtype=dtype).normal_()
    target = torch.randint(2 if likelihood == "bernoulli" else 256, image, device="cuda", dtype=torch.uint8)
    return params, (target.to(dtype) / 127.5 - 1 if likelihood == "gaussian" else target)


def value_and_gradient(params, target, likelihood):
    params = params.requires_grad_()
    nll = reconstruction_nll(params, target, likelihood, impl="triton")
    return nll.detach(), *torch.autograd.grad(nll.sum(), params)


@pytest.mark.parametrize("likelihood", LARGE)
def test_offsets_beyond_32_bits(likelihood):
    """The last of the images equals itself alone."""
    params, target = problem(likelihood, *LARGE[likelihood], torch.bfloat16)
    assert params.numel() > 2**31
    alone = value_and_gradient(params[-1:].clone(), target[-1:].clone(), likelihood)
    nll, grad = value_and_gradient(params, target, likelihood)
    assert torch.equal(nll[-1:], alone[0]) and torch.equal(grad[-1:], alone[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("likelihood", LARGE)
def test_repetition_gives_the_same_bits(likelihood, dtype):
    channels = {"bernoulli": (), "gaussian": (), "categorical": (256,), "logistic_mixture": ()}[likelihood]
    planes = {"bernoulli": 1, "gaussian": 2, "categorical": 1, "logistic_mixture": 30}[likelihood]
    params, target = problem(likelihood, (33, *channels, planes, 61, 67), (33, 1, 61, 67), dtype)
    first = value_and_gradient(params, target, likelihood)
    for _ in range(50):
        assert all(map(torch.equal, value_and_gradient(params, target, likelihood), first))
