"""The noise that the kernel draws: its distribution, its independence, and that the backward draws it again."""

import math

import numpy as np
import pytest
import torch

from fastgen.ops import reparameterize_kl
from tests.ops.reparameterize_kl_truth import inputs

pytest.importorskip("triton")


def drawn(shape, device, seed=1, dtype=torch.float32):
    """The noise itself: mean 0, log-variance 0."""
    generator = torch.Generator(device).manual_seed(seed)
    zeros = torch.zeros(shape, device=device, dtype=dtype)
    return reparameterize_kl(zeros, zeros, generator=generator, impl="triton")[0]


def ks_distance(sample):
    ordered = sample.double().flatten().sort().values
    step = torch.arange(1, len(ordered) + 1, device=sample.device).double() / len(ordered)
    return (torch.special.ndtr(ordered) - step).abs().max().item()


def philox(key, counters, rounds=7):
    """Four words of 32 bits of each counter below 2^32 (Salmon et al. 2011, section 3.3)."""
    keys = [key & 0xFFFFFFFF, key >> 32]
    words = [counters.astype(np.uint64), *[np.zeros(len(counters), np.uint64)] * 3]
    for _ in range(rounds):
        low, high = words[0] * np.uint64(0xD2511F53), words[2] * np.uint64(0xCD9E8D57)
        words = [
            high >> 32 ^ words[1] ^ np.uint64(keys[0]), high & 0xFFFFFFFF,
            low >> 32 ^ words[3] ^ np.uint64(keys[1]), low & 0xFFFFFFFF,
        ]  # fmt: skip
        keys = [(keys[0] + 0x9E3779B9) % 2**32, (keys[1] + 0xBB67AE85) % 2**32]
    return words


@pytest.mark.parametrize("size", [(3, 20), (2, 37), (2, 1024)])
def test_noise_is_that_of_box_and_muller(size, device):
    """Of two words of a Philox counter, to what the polynomials allow: 8e-7 of a radius of at most 6.8."""
    zeros = torch.zeros(size, device=device)
    key = 0x123456789ABCDEF
    z, _ = torch.ops.fastgen.reparameterize_kl(zeros, zeros, None, torch.tensor([key], device=device), 0.0)
    words = philox(key, np.arange(-(-zeros.numel() // 4)))
    normals = []
    for radius, turn in (words[:2], words[2:]):
        angle = math.pi * turn.astype(np.uint32).view(np.int32) / 2**31
        normals += [np.sqrt(-2 * np.log((radius + 0.5) / 2**32)) * f(angle) for f in (np.cos, np.sin)]
    expected = torch.tensor(np.stack(normals, 1).ravel()[: zeros.numel()]).view(size)
    torch.testing.assert_close(z.double().cpu(), expected, rtol=2e-6, atol=6e-6)


def test_noise_is_standard_normal(device):
    noise = drawn((51, 999), device)
    n = noise.numel()
    assert abs(noise.mean()) < 4 / math.sqrt(n)
    assert abs(noise.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs(noise.pow(4).mean() - 3) < 4 * math.sqrt(96 / n)
    assert ks_distance(noise) < 1.63 / math.sqrt(n)  # 1 % level
    assert 3.9 < noise.abs().max() < 6.9


def test_noise_is_independent_between_elements_rows_and_seeds(device):
    noise, other = drawn((51, 999), device).double(), drawn((51, 999), device, seed=2).double()
    bound = 4.5 / math.sqrt(noise.numel())
    for lag in range(1, 9):  # all lanes of a Philox counter and the next counter's
        assert abs((noise[:, lag:] * noise[:, :-lag]).mean()) < bound
        assert abs((noise[:, lag:].square() - 1).mul(noise[:, :-lag].square() - 1).mean() / 2) < bound
    assert abs((noise[1:] * noise[:-1]).mean()) < bound
    assert abs((noise * other).mean()) < bound
    assert noise.flatten().unique().numel() > 0.99 * noise.numel()


def test_noise_is_independent_between_launches(device):
    zeros = torch.zeros(51, 999, device=device)
    first, second = (reparameterize_kl(zeros, zeros, impl="triton")[0].double() for _ in range(2))
    bound = 4.5 / math.sqrt(first.numel())
    assert abs((first * second).mean()) < bound
    assert abs(((first.square() - 1) * (second.square() - 1)).mean() / 2) < bound
    assert abs((first[:, 1:] * second[:, :-1]).mean()) < bound and abs((first[1:] * second[:-1]).mean()) < bound


def test_each_launch_draws_anew_and_a_seed_repeats(device):
    mu = torch.zeros(4, 9, device=device)
    torch.manual_seed(3)
    first, second = (reparameterize_kl(mu, mu, impl="triton")[0] for _ in range(2))
    torch.manual_seed(3)
    again = reparameterize_kl(mu, mu, impl="triton")[0]
    assert torch.equal(first, again) and not (first == second).any()


def test_noise_does_not_depend_on_batch_tile_or_dtype(device, monkeypatch):
    assert torch.equal(drawn((70, 37), device)[:3], drawn((3, 37), device))
    assert torch.equal(drawn((72, 37), device)[:3], drawn((3, 37), device))  # read by sectors, and one by one
    split = drawn((2, 4100), device)
    monkeypatch.setattr("fastgen.kernels.vae.layout.PROGRAMS", 4)
    assert torch.equal(split, drawn((2, 4100), device))  # now two and three tiles a program
    assert torch.equal(drawn((3, 37), device).half(), drawn((3, 37), device, dtype=torch.half))
    assert torch.equal(drawn((30, 40), device).half(), drawn((30, 40), device, dtype=torch.half))  # packed, and padded
    assert torch.equal(drawn((2, 3, 4), device), drawn((2, 12), device).view(2, 3, 4))


@pytest.mark.parametrize("shape", [(3, 37), (2, 2500)])
def test_backward_draws_the_same_noise(shape, device):
    mu, logvar, _ = inputs(shape, device=device)
    z, _ = reparameterize_kl(mu, logvar, impl="triton")
    (grad,) = torch.autograd.grad(z.sum(), logvar)
    torch.testing.assert_close(grad, 0.5 * (z - mu).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_a_captured_graph_draws_new_noise_at_each_replay():
    mu = torch.zeros(8, 64, device="cuda", requires_grad=True)
    logvar = torch.zeros(8, 64, device="cuda", requires_grad=True)

    def step():
        z, kl = reparameterize_kl(mu, logvar, impl="triton")
        return z, *torch.autograd.grad(z.sum() + kl.sum(), (mu, logvar))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z, _, grad = step()
    replays = []
    for _ in range(2):
        graph.replay()
        replays.append(z.clone())
        torch.testing.assert_close(grad, 0.5 * z, rtol=1e-5, atol=1e-6)
    assert not torch.equal(*replays)
