"""Compressed images come back bit for bit, in about as many bits as the model says, or not at all."""

import math
import re
import struct
import subprocess
import sys

import constriction  # noqa: F401 (without it this file is not collected)
import numpy as np
import pytest
import torch
from torch import nn

import fastgen
from fastgen import compression, data, models
from fastgen.stream_header import DIGEST, Header, digest

FIXED = 90  # bytes of a header before its text


def gated(shape, levels, n_classes=None):
    """A model whose probabilities are far from even."""
    torch.manual_seed(1)
    model = models.GatedPixelCNN(shape, levels, channels=8, layers=2, n_classes=n_classes).eval()
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.mul_(4)
    return model


@pytest.fixture(scope="module")
def small():
    """A model of 4x4 images with 5 levels, and images that it drew."""
    model = gated((1, 4, 4), 5)
    return model, model.sample(20, seed=0)


@pytest.fixture(scope="module")
def stream(small):
    return fastgen.compress(*small)


def resealed(body):
    return body + digest(body)


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


@pytest.mark.slow
def test_all_test_patches():
    pytest.importorskip("sklearn")
    patches = data.load("patches")
    torch.manual_seed(0)
    assert_round_trip(models.PixelCNNPP(patches.shape, channels=8, layers=1, n_mix=3).eval(), patches.test.images)


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


@pytest.mark.parametrize("condition", [1, torch.tensor([2]), torch.arange(9) % 3], ids=["int", "one", "each"])
def test_classes(condition):
    model = gated((1, 4, 3), 4, n_classes=3)
    classes = torch.as_tensor(condition).expand(9)
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


class Spins(nn.Module):
    """(B, 1, H, W) -> a logit for each pixel, of those before it."""

    def __init__(self):
        super().__init__()
        self.conv = fastgen.nn.MaskedConv2d(1, 1, 3, padding=1, mask_type="A")

    def forward(self, x):
        return 3 * self.conv(x)


@pytest.mark.parametrize("backend", ["auto", "naive", "fixed_point", "eager"])
def test_samplers_of_any_model(backend):
    spins = fastgen.accelerate(Spins(), (1, 4, 5), distribution=fastgen.Bernoulli(), backend=backend)
    tokens = fastgen.accelerate(Tokens(300), (7,), distribution=fastgen.Categorical(300, layout="BTK"), backend=backend)
    for sampler in (spins, tokens):
        images, log_prob = sampler.sample(6, seed=0, return_log_prob=True)
        packed = assert_round_trip(sampler, images, bits=-float(log_prob.sum()) / math.log(2))
        assert backend == "auto" or f"backend {backend}" in Header.read(packed)[0].computed


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
    """Of a level's digits, most significant first: their probabilities multiply to the level's."""
    random = np.random.default_rng(0)
    p = random.random((3, count))
    p /= p.sum(1, keepdims=True)
    levels = np.array([0, count - 1, count // 2])
    coded = []

    def code(probabilities, digits):
        coded.append((probabilities / probabilities.sum(1, keepdims=True))[np.arange(3), digits])
        assert probabilities.shape[1] <= 256
        return digits

    batch = compression._Batch(None, torch.zeros(3, 1, 1, 1, dtype=torch.long), code)
    assert batch._coded(p, levels).tolist() == levels.tolist()
    assert len(coded) == 1 + (count > 256) + (count > 65536)
    np.testing.assert_allclose(np.prod(coded, 0), p[np.arange(3), levels], rtol=1e-12)


class Certain(nn.Module):
    """Expects level 7 everywhere, with a certainty beyond float64."""

    def __init__(self, levels):
        super().__init__()
        self.logits = nn.Parameter(torch.full((levels,), -1e4))
        self.logits.data[7] = 1e4

    def forward(self, x):
        return self.logits.view(1, -1, 1, 1, 1).expand(len(x), -1, *x.shape[1:])


@pytest.mark.parametrize("levels", [10, 1000])
def test_levels_that_cannot_be_are_coded_too(levels):
    """At the price of a few bytes each; what is certain costs next to nothing."""
    sampler = fastgen.accelerate(Certain(levels), (1, 8, 8), distribution=fastgen.Categorical(levels))
    images = torch.full((16, 1, 8, 8), 7)
    certain = fastgen.compress(sampler, images)
    assert len(Header.read(certain)[1]) <= 2
    images[3, 0, 2] = torch.arange(8) * (levels // 8)
    packed = fastgen.compress(sampler, images)
    assert torch.equal(fastgen.decompress(sampler, packed), images)
    assert len(packed) < len(certain) + 8 * 8


# --- what cannot be decoded


def test_every_truncation_is_refused(small, stream):
    for length in range(len(stream)):
        with pytest.raises(ValueError, match="foreign" if length == 0 else "truncated"):
            fastgen.decompress(small[0], stream[:length])


def test_every_flipped_bit_is_refused(small, stream):
    random = np.random.default_rng(0)
    bits = [*range(8 * FIXED), *random.integers(8 * FIXED, 8 * len(stream), 600)]
    for bit in bits:
        damaged = bytearray(stream)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match=r"data: is (foreign|truncated|damaged|of version)"):
            fastgen.decompress(small[0], bytes(damaged))


def test_bytes_of_something_else_are_refused(small, stream):
    for foreign in (b"", b"\x89PNG\r\n\x1a\n" + stream[8:], b"x", b"\x80\x04]q\x00.", bytes(1000)):
        with pytest.raises(ValueError, match="foreign"):
            fastgen.decompress(small[0], foreign)
    with pytest.raises(ValueError, match="damaged"):
        fastgen.decompress(small[0], stream + b"\0")
    with pytest.raises(ValueError, match="version 2"):
        fastgen.decompress(small[0], stream[:8] + b"\2\0" + stream[10:])
    with pytest.raises(TypeError, match="bytes"):
        fastgen.decompress(small[0], "text")


def test_damage_behind_a_right_seal_never_gives_images(small, stream):
    """Words that were changed or lost, and the seal made anew."""
    model, images = small
    refused = []
    body = stream[:-DIGEST]
    start = FIXED + struct.unpack_from("<H", body, FIXED - 2)[0]
    random = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(body)
        for bit in random.integers(8 * start, 8 * len(body), random.integers(1, 6)):
            damaged[bit // 8] ^= 1 << bit % 8
        try:  # the last bits of a coder may say nothing
            assert torch.equal(fastgen.decompress(model, resealed(bytes(damaged))), images)
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 50 and all("checksum" in line for line in refused)
    for words in (0, 1, (len(body) - start) // 4 - 1):
        cut = bytearray(body[: start + 4 * words])
        struct.pack_into("<Q", cut, 32, words)
        with pytest.raises(ValueError, match="checksum"):
            fastgen.decompress(model, resealed(bytes(cut)))
    assert torch.equal(fastgen.decompress(model, resealed(body)), images)


def test_a_hostile_header_takes_no_memory(small, stream, monkeypatch):
    """A number of images or words that is far too high is refused after the first batches, not believed."""
    model, _ = small
    taken = []
    run = compression._Batch.run
    monkeypatch.setattr(compression._Batch, "run", lambda *arguments: taken.append(1) or run(*arguments))
    for images in (2**20, 2**63):
        hostile = bytearray(stream[:-DIGEST])
        struct.pack_into("<Q", hostile, 24, images)
        with pytest.raises(ValueError, match="checksum"):
            fastgen.decompress(model, resealed(bytes(hostile)))
        assert len(taken) <= 2
        taken.clear()
    hostile = bytearray(stream[:-DIGEST])
    struct.pack_into("<Q", hostile, 32, 2**62)
    with pytest.raises(ValueError, match="truncated"):
        fastgen.decompress(model, resealed(bytes(hostile)))
    conditional = gated((1, 4, 4), 5, n_classes=2)
    hostile = bytearray(fastgen.compress(conditional, small[1], condition=1)[:-DIGEST])
    struct.pack_into("<Q", hostile, 24, 2**40)
    with pytest.raises(ValueError, match="checksum"):
        fastgen.decompress(conditional, resealed(bytes(hostile)), condition=1)


def test_other_weights_and_other_shapes_are_named(small, stream):
    model, _ = small
    other = gated((1, 4, 4), 5)
    with torch.no_grad():
        other.head[1].bias[0] += 1e-6
    with pytest.raises(ValueError, match="other weights"):
        fastgen.decompress(other, stream)
    with pytest.raises(ValueError, match=r"shape \(1, 4, 4\), the model's are \(1, 4, 5\)"):
        fastgen.decompress(gated((1, 4, 5), 5), stream)
    with torch.no_grad():
        model.head[1].bias[0] += 1
        with pytest.raises(ValueError, match="other weights"):
            fastgen.decompress(model, stream)
        model.head[1].bias[0] -= 1


def test_buffers_are_weights():
    model = nn.Sequential(nn.BatchNorm2d(1), Spins()).eval()
    sampler = fastgen.accelerate(model, (1, 4, 4), distribution=fastgen.Bernoulli())
    packed = fastgen.compress(sampler, sampler.sample(3, seed=0))
    model[0].running_mean += 0.5
    with pytest.raises(ValueError, match="other weights"):
        fastgen.decompress(sampler, packed)


def test_other_arithmetic_is_named(small, stream, monkeypatch):
    model, _ = small
    with pytest.raises(ValueError, match=r"other arithmetic.*backend compiled.*here by backend eager"):
        fastgen.decompress(
            fastgen.accelerate(model, model.shape, distribution=model.distribution, backend="eager"), stream
        )
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.raises(ValueError, match=f"threads {threads},.*threads {threads + 1},"):
            fastgen.decompress(model, stream)
    finally:
        torch.set_num_threads(threads)
    with pytest.raises(ValueError, match=r"other arithmetic.*float32.*float64"):
        double = gated((1, 4, 4), 5).double()
        monkeypatch.setattr(compression, "weights_digest", lambda *arguments: Header.read(stream)[0].of_weights)
        fastgen.decompress(double, stream)
    monkeypatch.setattr(compression, "MOST_IMAGES", 7)
    with pytest.raises(ValueError, match=r"batch 256.*batch 7"):
        fastgen.decompress(model, stream)


def test_arithmetic_that_no_header_tells_is_noticed(small, stream, monkeypatch):
    """A machine that rounds otherwise, and says nothing of it."""
    right = compression._probabilities
    monkeypatch.setattr(compression, "_probabilities", lambda *arguments: right(*arguments) * [1, 1, 1.001, 1, 1])
    with pytest.raises(ValueError, match="computed otherwise on this machine"):
        fastgen.decompress(small[0], stream)


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
        ((model, images + 4), ValueError, r"0\.\.4"),
        ((model, images[:, :, :3]), ValueError, "shape"),
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
