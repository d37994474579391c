"""A PixelCNN as most public ones are written: it masks its weights in forward, and was written without fastgen."""

import torch
from torch import nn


class MaskedConv(nn.Conv2d):
    def __init__(self, kind, *sizes, **options):
        super().__init__(*sizes, **options)
        mask = torch.ones_like(self.weight)
        rows, columns = self.kernel_size
        mask[:, :, rows // 2, columns // 2 + (kind == "B") :] = 0
        mask[:, :, rows // 2 + 1 :] = 0
        self.register_buffer("mask", mask)

    def forward(self, x):
        self.weight.data *= self.mask
        return super().forward(x)


def stranger(levels, channels=16):
    """(B, 1, H, W) -> logits (B, levels, H, W)."""
    layers = [MaskedConv("A", 1, channels, 7, padding=3), nn.ReLU()]
    for _ in range(2):
        layers += [MaskedConv("B", channels, channels, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(channels, levels, 1)).eval()
