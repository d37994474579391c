"""Compressed images come back bit for bit, or an error is raised; streams are about as long as the likelihood says."""

import math
import re
import subprocess
import sys

import constriction  # noqa: F401 (without it this file is not collected)
import numpy as np
import pytest
import torch
from torch import nn

import fastgen
from fastgen import compression, data, models
from fastgen.stream_header import Header
from tests.compressed import Spins, gated, small_model_and_images


@pytest.fixture(scope="module")
def small():
    return small_model_and_images()


def bits_of(model, images, condition=None):
    with torch.no_grad():
        return -float(model.log_prob(images.long(), condition).double().sum()) / math.log(2)


def assert_round_trip(model, images, condition=None, bits=None):
    packed = fastgen.compress(model, images, condition=condition)
    found = fastgen.decompress(model, packed, condition=condition)
    assert found.dtype == torch.long and torch.equal(found, images.long())
    _, words = Header.read(packed)
    bits = bits_of(model, images, condition) if bits is None else bits
    assert bits - 1 < 32 * len(words) < 1.001 * bits + 64  # the coder's own last words
    return packed


def test_all_test_digits():
    pytest.importorskip("sklearn")
    digits = data.load("digits")
    packed = assert_round_trip(gated(digits.shape, digits.levels), digits.test.images)
    assert len(packed) < 297 * 64


@pytest.mark.parametrize("kind", ["pixelcnnpp", "gated_pixelcnn"])
def test_colours(kind):
    pytest.importorskip("sklearn")
    images = data.load("patches").test.images[:5, :, 10:16, 10:17]
    model = gated((3, 6, 7), 256)
    if kind == "pixelcnnpp":
        model = models.PixelCNNPP((3, 6, 7), channels=6, layers=1, n_mix=2).eval()
    assert_round_trip(model, images)


def test_some_test_patches():
    pytest.importorskip("sklearn")
    patches = data.load("patches")
    torch.manual_seed(0)
    assert_round_trip(models.PixelCNNPP(patches.shape, channels=8, layers=1, n_mix=3).eval(), patches.test.images[::20])


def test_sixteen_bits_a_pixel():
    model = gated((1, 5, 6), 65536)
    images = torch.cat(
        (model.sample(4, seed=0), torch.tensor([0, 65535, 255, 256, 32768]).view(5, 1, 1, 1).expand(5, 1, 5, 6))
    )
    assert_round_trip(model, images)


@pytest.mark.parametrize("n", [0, 1, 300])
def test_any_number_of_images(small, n):
    model, images = small
    assert_round_trip(model, images.repeat(15, 1, 1, 1)[:n])


def test_classes_of_several_batches(monkeypatch):
    """Each image is coded with its own class; another class would take many more bits."""
    monkeypatch.setattr(compression, "MOST_IMAGES", 16)
    model, classes = gated((1, 4, 3), 4, n_classes=3), torch.arange(90) % 3
    with torch.no_grad():
        for block in model.blocks:
            block.condition.weight *= 20
    images = model.sample(90, seed=0, condition=classes)
    assert bits_of(model, images, classes.roll(1)) > bits_of(model, images, classes) + 100
    assert_round_trip(model, images, classes)


@pytest.mark.parametrize("condition", [1, torch.tensor([2]), torch.arange(9) % 3], ids=["int", "one", "each"])
def test_classes(condition):
    model = gated((1, 4, 3), 4, n_classes=3)
    classes = torch.as_tensor(condition).expand(9).clone()
    images = model.sample(9, seed=0, condition=classes)
    packed = fastgen.compress(model, images, condition=condition)
    assert torch.equal(fastgen.decompress(model, packed, condition=classes), images)
    with pytest.raises(ValueError, match="another condition"):
        fastgen.decompress(model, packed, condition=(classes + 1) % 3)
    with pytest.raises(ValueError, match="9 rows"):
        fastgen.decompress(model, packed, condition=torch.zeros(8, dtype=torch.long))


class Tokens(nn.Module):
    """(B, T) -> (B, T, K): sums of embeddings of the tokens before."""

    def __init__(self, levels):
        super().__init__()
        self.embedding = nn.Embedding(levels, 6)
        self.head = nn.Linear(6, levels)

    def forward(self, x):
        before = nn.functional.pad(self.embedding(x), (0, 0, 1, 0))[:, :-1]
        return self.head(before.cumsum(1))


@pytest.mark.parametrize("backend", ["auto", "naive", "fixed_point", "eager"])
def test_samplers_of_any_model(backend):
    spins = fastgen.accelerate(Spins(), (1, 4, 5), distribution=fastgen.Bernoulli(), backend=backend)
    tokens = fastgen.accelerate(Tokens(300), (7,), distribution=fastgen.Categorical(300, layout="BTK"), backend=backend)
    for sampler in (spins, tokens):
        images, log_prob = sampler.sample(6, seed=0, return_log_prob=True)
        packed = assert_round_trip(sampler, images, bits=-float(log_prob.sum()) / math.log(2))
        assert backend == "auto" or f"backend {backend}" in Header.read(packed)[0].computed


@pytest.mark.parametrize("backend", ["auto", "naive"])
@pytest.mark.parametrize("counts", [torch.tensor([[3, 300, 2], [1, 5, 2]]), [2, 7, 300]], ids=["each", "columns"])
def test_numbers_of_levels_that_depend_on_the_place(counts, backend):
    """A place costs bits only for the levels that it has."""
    distribution = fastgen.Categorical(counts, layout="B(KC)HW")
    sampler = fastgen.accelerate(Grid(), (2, 3), distribution=distribution, backend=backend)
    images, log_prob = sampler.sample(40, seed=0, return_log_prob=True)
    packed = assert_round_trip(sampler, images, bits=-float(log_prob.sum()) / math.log(2))
    other = fastgen.accelerate(Grid(), (2, 3), distribution=fastgen.Categorical(300, layout="B(KC)HW"))
    other.model.load_state_dict(sampler.model.state_dict())
    with pytest.raises(ValueError, match="another model"):
        fastgen.decompress(other, packed)


class Grid(nn.Module):
    """Codes (B, H, W) -> logits (B, 300, H, W)."""

    def __init__(self):
        super().__init__()
        self.conv = fastgen.nn.MaskedConv2d(1, 300, 3, padding=1, mask_type="A")

    def forward(self, x):
        return self.conv(x.unsqueeze(1) / 100)


# --- probabilities


@pytest.mark.parametrize("channels", [1, 3])
def test_conditional_probabilities_of_mixtures(channels):
    """They sum to one, and their product is the probability of the pixel."""
    mixture = fastgen.LogisticMixture(3)
    params = torch.randn(4, 30 if channels == 3 else 9) * 2
    levels = torch.randint(256, (4, channels))
    levels[0], levels[1] = 0, 255
    log_p = 0
    for channel in range(channels):
        p = compression._probabilities(mixture, params, channel, levels[:, :channel], channels)
        np.testing.assert_allclose(p.sum(1), 1, atol=1e-12)
        log_p = log_p + np.log(p[np.arange(4), levels[:, channel].numpy()])
    np.testing.assert_allclose(log_p, mixture.log_prob(params, levels).numpy(), atol=1e-9)


def test_probabilities_of_a_temperature_are_those_of_the_model():
    logits = torch.randn(3, 5, 2)
    cold = fastgen.Categorical(5, temperature=0.1, top_k=1)
    p = compression._probabilities(cold, logits, 1, torch.zeros(3, 1, dtype=torch.long), 2)
    np.testing.assert_allclose(p, logits[:, :, 1].double().softmax(1).numpy())
    p = compression._probabilities(fastgen.Bernoulli(), torch.tensor([[800.0, -1.0]]), 0, torch.zeros(1, 0), 2)
    assert p.tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("count", [2, 256, 257, 600, 70000])
def test_digits_are_coded_by_the_chain_rule(count):
    """The probabilities of a level's digits, the most significant first, multiply to that of the level."""
    random = np.random.default_rng(0)
    p = random.random((3, count))
    p /= p.sum(1, keepdims=True)
    levels = np.array([0, count - 1, count // 2])
    coded = []

    def code(probabilities, digits):
        coded.append((probabilities / probabilities.sum(1, keepdims=True))[np.arange(3), digits])
        assert probabilities.shape[1] <= 256
        return digits

    sampler = fastgen.accelerate(Spins(), (1, 1, 1), distribution=fastgen.Bernoulli())
    batch = compression._Batch(sampler, torch.zeros(3, 1, 1, 1, dtype=torch.long), code)
    assert batch._coded(p, levels).tolist() == levels.tolist()
    assert len(coded) == 1 + (count > 256) + (count > 65536)
    np.testing.assert_allclose(np.prod(coded, 0), p[np.arange(3), levels], rtol=1e-12)


def test_digits_of_no_level_are_refused():
    """With 300 levels the first digit is 0 or 1, but a damaged stream may hold 1 and then 255."""
    sampler = fastgen.accelerate(Grid(), (2, 3), distribution=fastgen.Categorical(300, layout="B(KC)HW"))
    last = compression._Batch(
        sampler, torch.zeros(2, 2, 3, dtype=torch.long), lambda p, _: np.full(len(p), p.shape[1] - 1)
    )
    with pytest.raises(ValueError, match="other images"):
        last.run(None)


class Certain(nn.Module):
    """Gives level 7 a probability that float64 rounds to 1."""

    def __init__(self, levels):
        super().__init__()
        self.logits = nn.Parameter(torch.full((levels,), -1e4))
        self.logits.data[7] = 1e4

    def forward(self, x):
        return self.logits.view(1, -1, 1, 1, 1).expand(len(x), -1, *x.shape[1:])


@pytest.mark.parametrize("levels", [10, 1000])
def test_levels_that_cannot_be_are_coded_too(levels):
    """Levels of probability 0 take a few bytes each, certain levels almost nothing."""
    sampler = fastgen.accelerate(Certain(levels), (1, 8, 8), distribution=fastgen.Categorical(levels))
    images = torch.full((16, 1, 8, 8), 7)
    certain = fastgen.compress(sampler, images)
    assert len(Header.read(certain)[1]) <= 2
    images[3, 0, 2] = torch.arange(8) * (levels // 8)
    packed = fastgen.compress(sampler, images)
    assert torch.equal(fastgen.decompress(sampler, packed), images)
    assert len(packed) < len(certain) + 8 * 8


def test_another_process_decodes(small, tmp_path):
    model, images = small
    fastgen.save(model, tmp_path)
    (tmp_path / "stream").write_bytes(fastgen.compress(fastgen.load(tmp_path), images))
    code = (
        "import sys, torch, fastgen, pathlib\n"
        "torch.set_num_threads(int(sys.argv[2]))\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "images = fastgen.decompress(fastgen.load(folder), (folder / 'stream').read_bytes())\n"
        "print(images.flatten().tolist())\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path), str(torch.get_num_threads())]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.stdout.strip() == str(images.flatten().tolist()), found.stderr


# --- wrong arguments


def test_wrong_arguments_are_named(small, monkeypatch):
    model, images = small
    for wrong, kind, named in (
        ((models.VAE((1, 8, 8), 2), images), TypeError, "VAE"),
        ((nn.Linear(2, 2), images), TypeError, "Linear"),
        ((model, images.float()), TypeError, "float32"),
        ((model, images.numpy()), TypeError, "ndarray"),
        ((model, images + 4), ValueError, r"images must be levels in 0\.\.4"),
        ((model, images[:, :, :3]), ValueError, r"images must have the shape \(n, "),
        ((model, images.to(torch.complex64)), TypeError, "complex64"),
    ):
        with pytest.raises(kind, match=named):
            fastgen.compress(*wrong)
    with pytest.raises(ValueError, match="unconditional"):
        fastgen.compress(model, images, condition=1)
    with pytest.raises(ValueError, match="training mode"):
        fastgen.compress(models.GatedPixelCNN((1, 4, 4), 5, channels=4, layers=1), images)
    real = fastgen.accelerate(Reals(), (1, 4, 4), distribution=fastgen.Gaussian())
    with pytest.raises(TypeError, match="Gaussian"):
        fastgen.compress(real, images)
    with torch.no_grad():
        broken = gated((1, 4, 4), 5)
        broken.head[1].bias[0] = math.nan
    with pytest.raises(FloatingPointError, match="row 0, column 0"):
        fastgen.compress(broken, images)
    monkeypatch.setitem(sys.modules, "constriction", None)
    for call in (lambda: fastgen.compress(model, images), lambda: fastgen.decompress(model, b"")):
        with pytest.raises(ImportError, match=re.escape("fastgen[compress]")):
            call()


class Reals(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = fastgen.nn.MaskedConv2d(1, 2, 3, padding=1, mask_type="A")

    def forward(self, x):
        return self.conv(x)


class Keyed(nn.Module):
    """Logits (B, 3, T) of the value before, moved by keyword arguments."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 3, 1)

    def forward(self, x, first, second):
        return (
            self.conv(nn.functional.pad(x[:, None], (1, -1))) + first[:, None, None] - second * x.new_ones(3)[:, None]
        )


def test_keyword_arguments_come_in_any_order_and_count_by_name():
    torch.manual_seed(0)
    first = torch.rand(2)
    sampler = fastgen.accelerate(
        Keyed().eval(), (4,), distribution=fastgen.Categorical(3, "BKT"), condition={"first": first, "second": 0.5}
    )
    images = torch.randint(3, (2, 4))
    packed = fastgen.compress(sampler, images, condition={"first": first, "second": 0.5})
    assert torch.equal(fastgen.decompress(sampler, packed, condition={"second": 0.5, "first": first}), images)
    with pytest.raises(ValueError, match="another condition"):
        fastgen.decompress(sampler, packed, condition={"first": first, "second": 0.25})
    empty = {"first": first[:0], "second": 0.5}
    packed = fastgen.compress(sampler, images[:0], condition=empty)
    assert fastgen.decompress(sampler, packed, condition=empty).shape == (0, 4)


def test_runs_in_inference_mode(small):
    model, images = small
    with torch.inference_mode():
        packed = fastgen.compress(model, images.clone())
        assert torch.equal(fastgen.decompress(model, packed), images)
