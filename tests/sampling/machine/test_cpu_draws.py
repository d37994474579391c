"""Draws of the C++ machine against those of `fastgen.distributions`: the same levels, the same word on NaN."""

import ctypes
import math

import numpy as np
import pytest
import torch

from fastgen import Bernoulli, Categorical, LogisticMixture
from fastgen.distributions import LAYOUTS
from fastgen.sampling.draws import draw_pixel
from fastgen.sampling.machine.cpu.build import machine
from fastgen.sampling.machine.cpu.draws import Draws, knows
from fastgen.sampling.request import SampleRequest
from fastgen.sampling.run.cpu_player import MoveCode, PlayCode, ProgramCode, StepCode

LAST = 1 - 2.0**-24  # the greatest of the uniforms


def order_of(shape, whole_pixels):
    channels, height, width = shape
    pixels = [(i, j) for i in range(height) for j in range(width)]
    return [(c, i, j) for i, j in pixels for c in range(1 if whole_pixels else channels)]


def by_machine(request, params, whole_pixels=True, threads=1):
    """All draws of a request in one call, with programs of no instructions between them: levels, and bad."""
    order = order_of(request.shape, whole_pixels)
    levels = torch.full((request.n, *request.shape), -1)
    draws = Draws(request, params, levels, order, whole_pixels)
    nothing = (ctypes.c_int64 * 1)()
    programs = (ProgramCode * 1)(ProgramCode(ctypes.addressof(nothing), 0, threads))
    steps = (StepCode * (len(order) + 1))(*[StepCode(0, None, 0, 0)] * (len(order) + 1))
    play = PlayCode(programs, steps, (MoveCode * 1)(), ctypes.pointer(draws.code), request.n, threads)
    assert machine().play(ctypes.addressof(play), 0, len(order)) == len(order)
    return levels, bool(draws.bad[0])


def by_definition(request, params, whole_pixels=True):
    levels, bad = torch.full((request.n, *request.shape), -1), False
    for first, i, j in order_of(request.shape, whole_pixels):
        for channel in range(request.shape[0]) if whole_pixels else (first,):
            known = (None, None)
            if request.known is not None:
                known = request.known[..., i, j], request.known_mask[..., i, j]
            given = request.distribution, params[..., i, j], request.noise[..., i, j]
            bad |= bool(draw_pixel(*given, channel, levels[..., i, j], *known))
    return levels, bad


def same(distribution, shape, params, noise=None, known=None, mask=None, threads=1):
    """Asserts that both draw the same; returns the levels and whether they were bad."""
    noise = torch.rand(distribution.noise_shape(len(params), shape)) if noise is None else noise
    request = SampleRequest(len(params), shape, noise, distribution, known, mask)
    assert knows(request, params, torch.zeros(1, dtype=torch.int64))
    for whole_pixels in (True, False):
        levels, bad = by_definition(request, params, whole_pixels)
        found, also = by_machine(request, params, whole_pixels, threads)
        assert torch.equal(found, levels)
        assert also == bad
    return levels, bad


def logits_of(layout, n, levels, channels, height, width, scale=3):
    logits = torch.randn(n, levels, channels, height, width) * scale
    if layout == "BCKHW":
        return logits.transpose(1, 2).contiguous()
    if layout == "B(KC)HW":
        return logits.flatten(1, 2)
    return logits.transpose(1, 2).flatten(1, 2) if layout == "B(CK)HW" else logits


OPTIONS = [(0, None, None), (0.5, None, None), (1, None, None), (2, None, None), (1, 3, None), (1, None, 0.8)]
OPTIONS += [(0.7, 4, 0.6), (1, 1, None), (1, 99, None), (1, None, 1e-9), (1, None, 1.0), (1e-3, None, None)]


@pytest.mark.parametrize("layout", LAYOUTS[:4])  # those of images, which all others become
@pytest.mark.parametrize(("temperature", "top_k", "top_p"), OPTIONS)
def test_softmaxes(layout, temperature, top_k, top_p):
    shape = (3, 6, 7)
    params = logits_of(layout, 17, 9, *shape)
    same(Categorical(9, layout, temperature, top_k, top_p), shape, params)


@pytest.mark.parametrize("levels", [2, 255, 256])
@pytest.mark.parametrize("scale", [0.1, 30, 300])
def test_softmaxes_over_many_levels(levels, scale):
    """Differences beyond the range of exp, in float64 too, among them."""
    shape = (1, 8, 8)
    for temperature in (1, 0.3):
        params = logits_of("BKCHW", 40, levels, *shape, scale)
        same(Categorical(levels, temperature=temperature), shape, params)


@pytest.mark.parametrize("temperature", [0, 0.5, 1, 2])
@pytest.mark.parametrize("channels", [1, 3])
def test_bernoulli(channels, temperature):
    shape = (channels, 9, 9)
    same(Bernoulli(temperature), shape, torch.randn(40, *shape) * 3)
    same(Bernoulli(temperature), shape, torch.randn(9, *shape) * 1e3)


@pytest.mark.parametrize("temperature", [0, 0.5, 1, 2])
@pytest.mark.parametrize("channels", [1, 3])
def test_mixtures_of_logistics(channels, temperature):
    shape, mixture = (channels, 9, 9), LogisticMixture(5, temperature)
    params = torch.randn(40, 50 if channels == 3 else 15, 9, 9)
    levels, _ = same(mixture, shape, params)
    if temperature:
        assert levels.unique().numel() > 100
    same(mixture, shape, params * 20)


def test_output_and_noise_may_lie_anyhow():
    """Channels-last output within more channels, noise with the images innermost, as views."""
    shape = (3, 5, 4)
    wide = torch.randn(6, 5, 4, 40)
    params = wide[..., 2:38].permute(0, 3, 1, 2)
    noise = torch.rand(5, 4, 3, 6).permute(3, 2, 0, 1)
    for layout in ("B(KC)HW", "B(CK)HW"):
        same(Categorical(12, layout), shape, params, noise)
    same(LogisticMixture(3), shape, wide[..., 2:32].permute(0, 3, 1, 2), torch.rand(5, 4, 4, 6).permute(3, 2, 0, 1))


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads_share_the_images(threads):
    for n in (1, 2, 5, 16):
        same(Categorical(5), (1, 3, 3), torch.randn(n, 5, 1, 3, 3), threads=threads)
        same(LogisticMixture(2), (3, 2, 2), torch.randn(n, 20, 2, 2), threads=threads)


# --- ties and ends


@pytest.mark.parametrize("levels", [2, 3, 5, 7, 8, 10, 64, 100, 256])
@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (2, None), (None, 0.5), (5, 0.6)])
def test_exact_ties(levels, top_k, top_p):
    """Equal logits, and uniforms at the steps between two levels, one number below and one above."""
    at = torch.arange(levels, dtype=torch.float32) / levels
    noise = torch.cat((at, torch.nextafter(at, at - 1).clamp(min=0), torch.nextafter(at, at + 1), at + 1e-4))
    noise = torch.cat((noise, torch.tensor([0.0, LAST, 0.25, 0.5, 0.75]))).clamp(max=LAST).view(-1, 1, 1, 1)
    for value in (0.0, 1.7, -40.0):
        params = torch.full((len(noise), levels, 1, 1, 1), value)
        levels_drawn, _ = same(Categorical(levels, "BKCHW", 1.0, top_k, top_p), (1, 1, 1), params, noise)
    if top_k is top_p is None and levels & (levels - 1) == 0:  # sums are exact: a step belongs to the level above it
        assert torch.equal(levels_drawn[:levels].flatten(), torch.arange(levels))
        assert torch.equal(levels_drawn[levels + 1 : 2 * levels].flatten(), torch.arange(levels - 1))


@pytest.mark.parametrize("temperature", [0, 0.5, 1])
def test_the_first_of_equal_logits_is_the_mode(temperature):
    params = torch.randint(3, (500, 6, 1, 2, 2)).float()
    levels, _ = same(Categorical(6, temperature=temperature, top_k=None if temperature == 0 else 1), (1, 2, 2), params)
    assert torch.equal(levels, params.argmax(1))
    bernoulli = torch.tensor([0.0, -0.0, 1e-30, -1e-30]).view(4, 1, 1, 1)
    levels, _ = same(Bernoulli(temperature), (1, 1, 1), bernoulli, torch.full((4, 1, 1, 1), 0.5))
    assert levels.flatten().tolist() == ([0, 0, 1, 0] if temperature == 0 else [1, 1, 1, 1])


@pytest.mark.parametrize("u", [0.0, 2.0**-24, 0.5, LAST])
@pytest.mark.parametrize("temperature", [0, 0.5, 1, 2])
def test_the_ends_of_the_noise(u, temperature):
    """No level of probability 0 is drawn, not at 0 and not at the end."""
    logits = torch.randn(200, 8, 1, 3, 3)
    logits[:, [0, 7]] = -math.inf
    logits[:50, 1:7] = -math.inf
    logits[:50, 4] = 2.0  # one level with probability 1
    noise = torch.full((200, 1, 3, 3), u)
    for top_k, top_p in ((None, None), (3, None), (None, 0.9)):
        levels, _ = same(Categorical(8, "BKCHW", temperature, top_k, top_p), (1, 3, 3), logits, noise)
        assert levels.min() > 0 and levels.max() < 7 and (levels[:50] == 4).all()
    same(Bernoulli(temperature), (1, 3, 3), torch.randn(200, 1, 3, 3) * 5, noise)
    for channels, size in ((1, 9), (3, 30)):
        params = torch.randn(200, size, 3, 3) * 3
        same(LogisticMixture(3, temperature), (channels, 3, 3), params, torch.full((200, channels + 1, 3, 3), u))


@pytest.mark.parametrize("below", [600, 700, 707, 709, 720, 740, 744, 746, 800, 1e6])
@pytest.mark.parametrize("u", [0.0, 2.0**-24])
def test_probabilities_at_the_end_of_float64(below, u):
    """What is not 0 in float64 counts, denormal or not: it is drawn where the noise is 0."""
    logits = torch.zeros(3, 4, 1, 1, 1)
    logits[:, :2] = -below
    levels, _ = same(Categorical(4), (1, 1, 1), logits, torch.full((3, 1, 1, 1), u))
    assert (levels == (0 if u == 0 and below < 745 else 2)).all()


@pytest.mark.parametrize("temperature", [0, 0.5, 1])
@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (3, None), (None, 0.5)])
def test_logits_that_are_infinite(temperature, top_k, top_p):
    """Infinity makes every probability NaN, which is no NaN of the parameters."""
    logits = torch.randn(30, 5, 2, 2, 2)
    logits[:10, 1] = math.inf
    logits[10:20, 1:3] = math.inf
    logits[20:] = -math.inf
    _, bad = same(Categorical(5, "BKCHW", temperature, top_k, top_p), (2, 2, 2), logits)
    assert not bad
    same(Bernoulli(temperature), (2, 2, 2), torch.tensor([math.inf, -math.inf]).view(2, 1, 1, 1).expand(2, 2, 2, 2))
    params = torch.randn(60, 30, 2, 2)
    params[torch.arange(60), torch.arange(60) % 30] = math.inf
    params[torch.arange(30), torch.arange(30)] = -math.inf
    same(LogisticMixture(3, temperature), (3, 2, 2), params)


# --- known levels, NaN


@pytest.mark.parametrize(
    ("distribution", "channels", "size"),
    [(Categorical(4, "B(KC)HW"), 3, 12), (Bernoulli(), 2, 2), (LogisticMixture(2), 3, 20), (LogisticMixture(2), 1, 6)],
)
def test_known_levels_stay(distribution, channels, size):
    shape = (channels, 6, 5)
    known = torch.randint(2, (9, *shape))
    mask = torch.rand(9, *shape) < 0.5
    params = torch.randn(9, size, 6, 5)
    levels, _ = same(distribution, shape, params, None, known, mask)
    assert torch.equal(levels[mask], known[mask])
    whole = mask[:1].expand(mask.shape)  # one mask for all images, as `sample` broadcasts it
    levels, _ = same(distribution, shape, params, None, known, whole)
    assert torch.equal(levels[whole], known[whole])
    levels, _ = same(distribution, shape, params, None, known, torch.ones_like(mask))
    assert torch.equal(levels, known)


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize(
    ("name", "channels", "size"), [("softmax", 3, 12), ("bernoulli", 2, 2), ("mixture", 3, 20), ("mixture", 1, 6)]
)
def test_nan_is_told_where_it_is_drawn_of_and_nowhere_else(name, channels, size, temperature):
    distribution = {
        "softmax": Categorical(4, "B(KC)HW", temperature),
        "bernoulli": Bernoulli(temperature),
        "mixture": LogisticMixture(2, temperature),
    }[name]
    shape = (channels, 3, 4)
    noise = torch.rand(distribution.noise_shape(5, shape))
    params = torch.randn(5, size, 3, 4)
    for channel in range(size):
        one = params.clone()
        one[2, channel, 1, 3] = math.nan
        found = by_machine(SampleRequest(5, shape, noise, distribution), one)
        expected = by_definition(SampleRequest(5, shape, noise, distribution), one)
        assert found[1] and expected[1]
        others = torch.ones(5, 3, 4, dtype=torch.bool)
        others[2, 1, 3] = False
        assert torch.equal(found[0].movedim(1, -1)[others], expected[0].movedim(1, -1)[others])
        mask = torch.zeros(5, *shape, dtype=torch.bool)
        mask[2, :, 1, 3] = True
        _, bad = same(distribution, shape, one, noise, torch.zeros(5, *shape, dtype=torch.long), mask)
        assert not bad


def test_what_the_machine_cannot_draw_is_left_to_torch():
    class Own(Categorical):
        """With a `draw` that may be another."""

    params, noise = torch.zeros(1, 4, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    levels = torch.zeros(1, 1, 1, 1, dtype=torch.int64)
    assert not knows(SampleRequest(1, (1, 1, 1), noise, Own(4)), params, levels)
    assert not knows(SampleRequest(1, (1, 1, 1), noise, Categorical(4)), params.double(), levels)
    assert not knows(SampleRequest(1, (1, 1, 1), noise.double(), Categorical(4)), params, levels)
    assert not knows(SampleRequest(1, (1, 1, 1), noise, Categorical(4)), params, levels.float())


def test_a_draw_stops_before_a_program_that_is_not_the_machines():
    shape, distribution = (1, 2, 4), Categorical(4)
    request = SampleRequest(3, shape, torch.rand(3, 1, 2, 4), distribution)
    params, levels = torch.randn(3, 4, 1, 2, 4), torch.full((3, 1, 2, 4), -1)
    order = order_of(shape, True)
    draws = Draws(request, params, levels, order, True)
    nothing = (ctypes.c_int64 * 1)()
    programs = (ProgramCode * 2)(ProgramCode(ctypes.addressof(nothing), 0, 1), ProgramCode())
    steps = (StepCode * 9)(*[StepCode(int(k == 4), None, 0, 0) for k in range(9)])
    play = PlayCode(programs, steps, (MoveCode * 1)(), ctypes.pointer(draws.code), 3, 1)
    assert machine().play(ctypes.addressof(play), 0, 8) == 3
    expected, _ = by_definition(request, params)
    drawn = np.array([levels[0, 0, i, j] >= 0 for _, i, j in order])
    assert drawn.tolist() == [True] * 4 + [False] * 4  # the level before that program is there
    assert machine().play(ctypes.addressof(play), 4, 8) == 8
    assert torch.equal(levels, expected)
