"""Sample from a PixelCNN that was written without fastgen, and compare with the usual loop."""

import torch
from torch import nn

import fastgen


class MaskedConv(nn.Conv2d):  # as in most public PixelCNNs, forward masks the weights
    mask: torch.Tensor

    def __init__(self, centre, *sizes, **options):
        super().__init__(*sizes, **options)
        size = self.weight[0, 0].numel()
        self.register_buffer("mask", (torch.arange(size) < size // 2 + centre).view(self.kernel_size).float())

    def forward(self, x):
        self.weight.data *= self.mask
        return super().forward(x)


def build(levels=4, channels=32):
    first, second = MaskedConv(0, 1, channels, 7, padding=3), MaskedConv(1, channels, channels, 3, padding=1)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Conv2d(channels, levels, 1)).eval()


@torch.no_grad()
def main(shape=(1, 16, 16), levels=4):
    model = build(levels)  # images scaled to -1..1 -> logits (B, levels, H, W)
    sampler = fastgen.accelerate(model, shape, distribution=fastgen.Categorical(levels, layout="B(KC)HW"))
    noise, images = torch.rand(sampler.noise_shape(8)), torch.zeros(8, *shape, dtype=torch.long)
    for i, j in torch.cartesian_prod(torch.arange(shape[1]), torch.arange(shape[2])).tolist():  # the usual loop
        cumulative = model(images / (levels - 1) * 2 - 1)[:, :, i, j].softmax(1).cumsum(1)
        images[:, 0, i, j] = (cumulative <= noise[:, 0, i, j, None]).sum(1).clamp(max=levels - 1)
    return sampler.sample(8, noise=noise), images, sampler.explain()


if __name__ == "__main__":
    fast, slow, explanation = main()
    print(f"the images are those of the loop: {torch.equal(fast, slow)}", explanation, sep="\n")
