"""CompressAI's serial codecs with `sampler.decode` in place of their loop: the same symbols, the same stream.

The two sides of a stream must compute in one way: a scale that rounds to another side of a table's step spoils it. So
encoder and decoder both go through the sampler; that its stream is also the serial loop's is seen at seeds where no
scale is that near.
"""

import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastgen
from tests.sampling.other_packages import other_package

other_package("compressai")

from compressai.ans import BufferedRansEncoder, RansDecoder  # noqa: E402
from compressai.models import Cheng2020Attention, JointAutoregressiveHierarchicalPriors  # noqa: E402

from fastgen.demos.examples.codec import Context, loop, main  # noqa: E402

M = 8


def codec_of(kind, channels):
    torch.manual_seed(0)
    codec = kind(channels) if kind is Cheng2020Attention else kind(channels, channels)
    codec.eval().requires_grad_(False).update()
    return codec


def sampler_of(codec, params, **options):
    network = Context([codec.context_prediction, codec.entropy_parameters])
    shape = (codec.context_prediction.in_channels, *params.shape[2:])
    return fastgen.accelerate(network, shape, distribution=fastgen.Gaussian(), condition=params, **options)


def tables_of(codec):
    gaussian = codec.gaussian_conditional
    return [one.tolist() for one in (gaussian.quantized_cdf, gaussian.cdf_length, gaussian.offset)]


def encoded(codec, sampler, params, y):
    """y_hat and the stream, by the sampler."""
    encoder, symbols, indexes = BufferedRansEncoder(), [], []

    def look(found, means, i, j):
        here = (y[0, :, i, j] - means[0]).round().int().tolist()
        symbols.extend(here)
        indexes.extend(found)
        return here

    y_hat = loop(sampler, codec.gaussian_conditional, params, look)
    encoder.encode_with_indexes(symbols, indexes, *tables_of(codec))
    return y_hat, encoder.flush()


def decoded(codec, sampler, params, stream):
    decoder, tables = RansDecoder(), tables_of(codec)
    decoder.set_stream(stream)
    return loop(sampler, codec.gaussian_conditional, params, lambda found, *_: decoder.decode_stream(found, *tables))


@pytest.mark.parametrize("backend", ["auto", "eager", "naive"])
@pytest.mark.parametrize("kind", [JointAutoregressiveHierarchicalPriors, Cheng2020Attention])
def test_the_serial_loop_is_replaced(kind, backend):
    codec, height, width = codec_of(kind, M), 4, 6
    params, y = torch.randn(1, 2 * M, height, width), 9 * torch.randn(1, M, height, width)
    sampler = sampler_of(codec, params, backend=backend)
    y_hat, stream = encoded(codec, sampler, params, y)
    assert stream == codec._compress_ar(F.pad(y, (2, 2, 2, 2)), params, height, width, 5, 2)
    assert torch.equal(decoded(codec, sampler, params, stream), y_hat)
    serial = torch.zeros(1, M, height + 4, width + 4)
    codec._decompress_ar(stream, serial, params, height, width, 5, 2)
    torch.testing.assert_close(y_hat, serial[..., 2:-2, 2:-2], atol=1e-4, rtol=0)
    assert y_hat.round().unique().numel() > 20
    given = sampler.params(y_hat, condition=params)
    torch.testing.assert_close(given, sampler.model(y_hat, params), atol=1e-4, rtol=1e-4)


class CausalAttention(nn.Module):
    """In place of `context_prediction`: each position looks at all before it, which no crop can hold."""

    def __init__(self, channels, places):
        super().__init__()
        self.in_channels = channels
        self.first, self.places = nn.Parameter(torch.randn(channels)), nn.Parameter(torch.randn(places, channels))
        self.attention, self.out = (
            nn.MultiheadAttention(channels, 2, batch_first=True),
            nn.Linear(channels, 2 * channels),
        )

    def forward(self, y_hat):
        b, channels, height, width = y_hat.shape
        tokens = y_hat.flatten(2).mT
        before = torch.cat((self.first.expand(b, 1, channels), tokens[:, :-1]), 1) + self.places
        mask = torch.ones(height * width, height * width, dtype=torch.bool).triu(1)
        mixed = self.attention(before, before, before, attn_mask=mask, need_weights=False)[0]
        return self.out(mixed).mT.unflatten(2, (height, width))


def test_a_serial_context_with_attention():
    codec, size = codec_of(JointAutoregressiveHierarchicalPriors, M), 4
    codec.context_prediction = CausalAttention(M, size * size).eval().requires_grad_(False)
    params, y = torch.randn(1, 2 * M, size, size), 9 * torch.randn(1, M, size, size)
    serial, symbols, indexes = torch.zeros(1, M, size, size), [], []
    for i in range(size):
        for j in range(size):  # the serial loop: a whole pass for each position
            gaussian_params = codec.entropy_parameters(torch.cat((params, codec.context_prediction(serial)), 1))
            scales, means = gaussian_params[..., i, j].chunk(2, 1)
            symbols += (y[0, :, i, j] - means[0]).round().int().tolist()
            indexes += codec.gaussian_conditional.build_indexes(scales)[0].tolist()
            serial[..., i, j] = torch.tensor(symbols[-M:]) + means
    encoder = BufferedRansEncoder()
    encoder.encode_with_indexes(symbols, indexes, *tables_of(codec))
    stream = encoder.flush()
    sampler = sampler_of(codec, params)
    y_hat, ours = encoded(codec, sampler, params, y)
    assert ours == stream and sampler.work_ratio < 1.01
    assert torch.equal(decoded(codec, sampler, params, stream), y_hat)
    torch.testing.assert_close(y_hat, serial, atol=1e-4, rtol=0)


def test_one_sampler_serves_all_images_of_a_size(monkeypatch):
    codec = codec_of(JointAutoregressiveHierarchicalPriors, M)
    images = torch.rand(3, 3, 64, 64)
    sampler = sampler_of(codec, torch.zeros(1, 2 * M, 4, 4))
    monkeypatch.setattr("fastgen.sampling.backends.build_engine", None)  # no further analysis
    for image in images.split(1):
        theirs = codec.compress(image)
        params = codec.h_s(codec.entropy_bottleneck.decompress(theirs["strings"][1], theirs["shape"]))
        y_hat, stream = encoded(codec, sampler, params, codec.g_a(image))
        assert stream == theirs["strings"][0][0]
        again = decoded(codec, sampler, params, stream)
        assert torch.equal(again, y_hat)
        expected = codec.decompress(theirs["strings"], theirs["shape"])["x_hat"]
        torch.testing.assert_close(codec.g_s(again).clamp(0, 1), expected, atol=1e-4, rtol=0)


def test_it_is_quicker_than_the_serial_network():
    """16x16 latents of 192 channels; the entropy coder, the same for both, is left out."""
    codec, size, threads = codec_of(JointAutoregressiveHierarchicalPriors, 192), 16, torch.get_num_threads()
    params, y_hat = torch.randn(1, 384, size, size), torch.randn(1, 192, size, size)
    sampler = sampler_of(codec, params)
    padded, weight, bias = F.pad(y_hat, (2, 2, 2, 2)), codec.context_prediction.weight, codec.context_prediction.bias

    def serial():
        for h in range(size):
            for w in range(size):
                crop = F.conv2d(padded[:, :, h : h + 5, w : w + 5], weight, bias=bias)
                codec.entropy_parameters(torch.cat((params[:, :, h : h + 1, w : w + 1], crop), 1))

    def ours():
        sampler.decode(lambda _, place: y_hat[..., place[1], place[2]], 1, condition=params, dtype=torch.float32)

    try:
        torch.set_num_threads(1)
        times = [[], []]
        for _ in range(2):
            for run, found in zip((serial, ours), times, strict=True):
                start = time.process_time()
                run()
                found.append(time.process_time() - start)
    finally:
        torch.set_num_threads(threads)
    assert min(times[0]) > 3 * min(times[1])


def test_the_example():
    assert main()
