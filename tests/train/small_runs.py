"""Small models, images and settings for the tests of training."""

import functools
import json
from dataclasses import replace

import torch
from torch import nn

from fastgen import data
from fastgen.models import VAE, Autoencoder, GatedPixelCNN, PixelCNN
from fastgen.train import METRICS, Settings
from fastgen.train import train as train_anywhere

train = functools.partial(train_anywhere, device="cpu", progress=False)  # where the same run gives the same bits
QUICK = Settings(steps=7, batch_size=8, lr=0.01, warmup=2, validate_every=3, ema=0.5)


def images(count=40):
    return torch.randint(4, (count, 1, 4, 3), generator=torch.Generator().manual_seed(0))


def dataset():
    part = data.Split(images().to(torch.uint8), torch.arange(40) % 2)
    return data.Dataset("noise", 4, 2, part[:20], part[20:30], part[30:])


def pixelcnn(**options):
    torch.manual_seed(0)
    return PixelCNN((1, 4, 3), 4, channels=4, layers=1, **options)


def gated():
    torch.manual_seed(1)
    return GatedPixelCNN((1, 4, 3), 4, channels=6, layers=2, dropout=0.3, n_classes=2)


def vae():
    torch.manual_seed(1)
    return VAE((1, 4, 3), 2, likelihood="categorical", levels=4, channels=4, hidden=8)


def autoencoder():
    torch.manual_seed(1)
    return Autoencoder((1, 4, 3), 2, levels=4, channels=4, hidden=8)


class Own(nn.Module):
    """A model of independent pixels whose loss is not a likelihood."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(1, 4, 3))

    def loss(self, x):
        return (x.float() - self.mean).square().mean()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rows(folder):
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def resumes_exactly(build, source, tmp_path, **options):
    """Trains without and with an interruption; returns the folder of the uninterrupted run."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    models = [build() for _ in range(3)]
    made = [{name: make(model) for name, make in options.items()} for model in models]
    train(models[0], source, whole, QUICK, **made[0])
    train(models[1], source, parts, replace(QUICK, steps=4), **made[1])
    torch.rand(3)
    train(models[2], source, parts, QUICK, resume=True, **made[2])
    for name in (METRICS, "model.safetensors"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()
    return whole
