"""Damaged compressed streams, and other models to decode with, are refused with a reason."""

import struct

import constriction  # noqa: F401 (without it this file is not collected)
import numpy as np
import pytest
import torch
from torch import nn

import fastgen
from fastgen import compression
from fastgen.stream_header import DIGEST, Header, digest
from tests.compressed import Spins, gated, small_model_and_images

FIXED = 90  # bytes of a header before its text


@pytest.fixture(scope="module")
def small():
    return small_model_and_images()


@pytest.fixture(scope="module")
def stream(small):
    return fastgen.compress(*small)


def resealed(body):
    return body + digest(body)


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


@pytest.mark.parametrize("levels", [5, 300])
def test_damage_behind_a_right_seal_never_gives_images(levels):
    """Words that were changed or lost, and the seal made anew. The last of 300 levels has the second digit 43: coders
    know more of them."""
    model = gated((1, 4, 4), levels)
    images, refused = model.sample(20, seed=0), []
    stream = fastgen.compress(model, images)
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
    """A stream whose header promises far too many images or words is refused after the first batches."""
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
        monkeypatch.setattr(compression, "weights_digest", lambda *arguments: Header.read(stream)[0].model_digest)
        fastgen.decompress(double, stream)
    monkeypatch.setattr(compression, "MOST_IMAGES", 7)
    with pytest.raises(ValueError, match=r"batch 256.*batch 7"):
        fastgen.decompress(model, stream)


def test_arithmetic_that_no_header_tells_is_noticed(small, stream, monkeypatch):
    """A machine that rounds otherwise, but has the same header."""
    right = compression._probabilities
    monkeypatch.setattr(compression, "_probabilities", lambda *arguments: right(*arguments) * [1, 1, 1.001, 1, 1])
    with pytest.raises(ValueError, match="computed otherwise on this machine"):
        fastgen.decompress(small[0], stream)
