"""Run the serial loop of a CompressAI codec (Minnen et al. 2018) with `sampler.decode`: the entropy decoder draws."""

import torch
from compressai.ans import RansDecoder
from compressai.models import JointAutoregressiveHierarchicalPriors

import fastgen


class Context(torch.nn.ModuleList):  # context_prediction, then entropy_parameters, as the codec's loop runs them
    def forward(self, y_hat, params):
        return self[1](torch.cat((params, self[0](y_hat)), 1))


def loop(sampler, gaussian, params, symbols_at):  # symbols_at(indexes, means, row, column) -> M symbols
    def draw(gaussian_params, place):
        scales, means = gaussian_params.chunk(2, 1)
        indexes = gaussian.build_indexes(scales)[0].tolist()
        return torch.tensor([symbols_at(indexes, means, *place[1:])]) + means

    return sampler.decode(draw, 1, condition=params, dtype=torch.float32)


def main(channels=16, size=8):
    torch.manual_seed(0)
    codec = JointAutoregressiveHierarchicalPriors(channels, channels).eval().requires_grad_(False)  # random weights
    codec.update()
    params, y = torch.randn(1, 2 * channels, size, size), 9 * torch.randn(1, channels, size, size)
    gaussian, decoder = codec.gaussian_conditional, RansDecoder()
    tables = [table.tolist() for table in (gaussian.quantized_cdf, gaussian.cdf_length, gaussian.offset)]
    network = Context([codec.context_prediction, codec.entropy_parameters])
    sampler = fastgen.accelerate(network, y.shape[1:], distribution=fastgen.Gaussian(), condition=params)
    y_hat = loop(sampler, gaussian, params, lambda _, means, i, j: (y[0, :, i, j] - means[0]).round().tolist())
    decoder.set_stream(codec._compress_ar(torch.nn.functional.pad(y, (2,) * 4), params, size, size, 5, 2))
    decoded = loop(sampler, gaussian, params, lambda indexes, *_: decoder.decode_stream(indexes, *tables))
    return torch.equal(decoded, y_hat)


if __name__ == "__main__":
    print(f"The sampler decodes the stream of the codec's own encoder to the same latents, bit for bit: {main()}")
