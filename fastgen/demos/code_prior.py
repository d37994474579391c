"""A code prior: a VQ-VAE (van den Oord, Vinyals & Kavukcuoglu 2017, "Neural Discrete Representation Learning") turns
patches of photographs into grids of integer codes (B, H, W), and a PixelCNN learns, draws and completes these.

The prior is conditioned on a map, the patch as a thumbnail of one colour a cell.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from fastgen import Categorical, accelerate, data
from fastgen.demos.pictures import rows_of, sheet
from fastgen.nn import MaskedConv2d

CELL = 4  # pixels of a code's side
THUMBNAIL = 8  # pixels of a thumbnail's
BATCH, RATE = 32, 2e-3
DECAY, COMMITMENT = 0.97, 0.25  # of the codebook's moving averages, of the encoder's loss
SHOWN = 10  # patches


class VQVAE(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] <-> codes (B, H / CELL, W / CELL) of `codes` vectors.

    The codebook holds moving averages of the features that chose each vector (appendix A.1 of the paper); a vector that
    nothing chooses becomes a feature of the batch.
    """

    def __init__(self, codes: int = 64, channels: int = 48, dimensions: int = 16) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, channels, 4, 2, 1), nn.ReLU(),
            nn.Conv2d(channels, channels, 4, 2, 1), nn.ReLU(),
            nn.Conv2d(channels, channels, 3, 1, 1), nn.ReLU(),
            nn.Conv2d(channels, dimensions, 1),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Conv2d(dimensions, channels, 3, 1, 1), nn.ReLU(),
            nn.ConvTranspose2d(channels, channels, 4, 2, 1), nn.ReLU(),
            nn.ConvTranspose2d(channels, 3, 4, 2, 1),
        )  # fmt: skip
        self.register_buffer("codebook", torch.randn(codes, dimensions))
        self.register_buffer("counts", torch.zeros(codes))
        self.codebook: Tensor
        self.counts: Tensor

    def _nearest(self, features: Tensor) -> Tensor:
        return torch.cdist(features.movedim(1, -1).flatten(0, 2), self.codebook).argmin(1)

    def encode(self, x: Tensor) -> Tensor:
        features = self.encoder(x)
        return self._nearest(features).view(len(x), *features.shape[2:])

    def decode(self, codes: Tensor) -> Tensor:
        return self.decoder(self.codebook[codes].movedim(-1, 1))

    def loss(self, x: Tensor) -> Tensor:
        """Squared error and commitment (equation 3, with the codebook averaged); moves the codebook."""
        features = self.encoder(x)
        chosen = self._nearest(features)
        flat = features.detach().movedim(1, -1).flatten(0, 2)
        if self.training:
            self._follow(flat, chosen)
        vectors = self.codebook[chosen].view_as(features.movedim(1, -1)).movedim(-1, 1)
        straight_through = features + (vectors - features).detach()  # the vectors, with the gradient of the features
        return F.mse_loss(self.decoder(straight_through), x) + COMMITMENT * F.mse_loss(features, vectors)

    def _follow(self, flat: Tensor, chosen: Tensor) -> None:
        counts = torch.bincount(chosen, minlength=len(self.counts)).to(flat.dtype)
        sums = torch.zeros_like(self.codebook).index_add(0, chosen, flat)
        before = self.counts * DECAY
        self.counts.copy_(before + counts * (1 - DECAY))
        total = before.unsqueeze(1) * self.codebook + (1 - DECAY) * sums
        self.codebook.copy_(total / self.counts.clamp(min=1e-9).unsqueeze(1))
        unused = self.counts < 0.05
        anew = flat[torch.randint(len(flat), (len(self.counts),))]
        self.codebook.copy_(torch.where(unused.unsqueeze(1), anew, self.codebook))
        self.counts.masked_fill_(unused, 1.0)


class Prior(nn.Module):
    """Codes (B, H, W) and thumbnails (B, 3, h, w) in [-1, 1], which see everything -> logits (B, K, H, W)."""

    def __init__(self, codes: int, channels: int = 48, layers: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, channels)
        self.thumbnail = nn.Conv2d(3, channels, 3, padding=1)
        self.first = MaskedConv2d(channels, channels, 5, padding=2, mask_type="A")
        self.rest = nn.ModuleList(
            MaskedConv2d(channels, 2 * channels, 3, padding=1, mask_type="B", activation="gated") for _ in range(layers)
        )
        self.last = MaskedConv2d(channels, codes, 1, mask_type="B")

    def forward(self, codes: Tensor, thumbnail: Tensor) -> Tensor:
        beside = F.interpolate(self.thumbnail(thumbnail), codes.shape[1:])
        x = self.first(self.embedding(codes).movedim(-1, 1))
        for layer in self.rest:
            x = x + layer(x + beside)
        return self.last(F.relu(x + beside))

    def loss(self, codes: Tensor, thumbnail: Tensor) -> Tensor:
        """Mean -log p of a code, nats."""
        return F.cross_entropy(self(codes, thumbnail), codes)


def _train(model: nn.Module, loss: Callable[[Tensor], Tensor], images: int, steps: int) -> None:
    """Adam; `loss` is given the numbers of a batch's images."""
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    model.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        loss(torch.randint(images, (BATCH,))).backward()
        optimizer.step()
    model.eval()


def run(*, codes: int = 64, steps: int = 1500, seed: int = 0) -> tuple[dict[str, Any], Image.Image]:
    """Trains a VQ-VAE and its prior on `patches`; draws codes for the thumbnails of test patches, and completes codes
    of which the upper half is kept.

    Args:
        steps: of training, of either network.
        seed: of the draws.

    Returns:
        "error", the squared error of a reconstruction a dimension on -1..1, "error_of_thumbnail" that of the thumbnail
        alone; "codes_used" on the test patches; bits a code on these: "uniform", "histogram" (of the training codes),
        "prior", and "prior_of_others", with the thumbnails of other patches; "identical", whether the codes are those
        of the naive loop for the same noise, and "speedup" over it, both timed here; "work_ratio".
    """
    patches = data.load("patches")
    train, test = (split.images.float() / 127.5 - 1 for split in (patches.train, patches.test))
    train = torch.cat((train, train.flip(3)))
    model = VQVAE(codes)
    _train(model, lambda chosen: model.loss(train[chosen]), len(train), steps)
    with torch.no_grad():
        grids, test_grids = model.encode(train), model.encode(test)
        rebuilt = model.decode(test_grids)
    thumbnails, test_thumbnails = (F.avg_pool2d(images, THUMBNAIL) for images in (train, test))
    prior = Prior(codes)
    _train(prior, lambda chosen: prior.loss(grids[chosen], thumbnails[chosen]), len(train), steps)
    with torch.no_grad():
        bits = [float(prior.loss(test_grids, x)) / math.log(2) for x in (test_thumbnails, test_thumbnails.roll(1, 0))]
    counts = torch.bincount(grids.flatten(), minlength=codes) + 1.0
    shape, chosen = tuple(test_grids.shape[1:]), torch.linspace(0, len(test) - 1, SHOWN).long()
    given, kept_codes = test_thumbnails[chosen], test_grids[chosen]
    arguments: dict[str, Any] = {"distribution": Categorical(codes, layout="B(KC)HW"), "condition": given}
    sampler, naive = (accelerate(prior, shape, backend=backend, **arguments) for backend in ("auto", "naive"))
    noise = torch.rand(sampler.noise_shape(SHOWN), generator=torch.Generator().manual_seed(seed))
    drawn, seconds = _timed(lambda: sampler.sample(SHOWN, noise=noise))
    slowly, naive_seconds = _timed(lambda: naive.sample(SHOWN, noise=noise))
    kept = torch.zeros(shape, dtype=torch.bool)
    kept[: shape[0] // 2] = True
    completed = sampler.sample(SHOWN, noise=noise, known=kept_codes, known_mask=kept)
    numbers = {
        "error": F.mse_loss(rebuilt, test).item(),
        "error_of_thumbnail": F.mse_loss(_enlarged(test_thumbnails, test), test).item(),
        "codes_used": len(test_grids.unique()),
        "uniform": math.log2(codes),
        "histogram": float(-(counts / counts.sum()).log2()[test_grids].mean()),
        "prior": bits[0],
        "prior_of_others": bits[1],
        "identical": torch.equal(drawn, slowly),
        "speedup": naive_seconds / seconds,
        "work_ratio": sampler.work_ratio,
    }
    shown = test[chosen]
    with torch.no_grad():
        rows = {
            "Test patches": shown,
            f"Their codes, {shape[0]}x{shape[1]} of {codes}, decoded": rebuilt[chosen],
            "Thumbnails": _enlarged(given, shown),
            "Codes drawn for the thumbnails": model.decode(drawn),
            "The upper half of the codes kept, the lower drawn": model.decode(completed),
        }
    parts = [(name, rows_of(((x + 1) * 127.5).clamp(0, 255).unsqueeze(0), 256)) for name, x in rows.items()]
    caption = f"{bits[0]:.2f} bits a code; with the thumbnails of other patches {bits[1]:.2f}"
    return numbers, sheet(*parts, (caption, None), (patches.attribution, None))


def _enlarged(thumbnails: Tensor, images: Tensor) -> Tensor:
    return F.interpolate(thumbnails, images.shape[2:])


def _timed(call: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """The result, and the seconds of a second call."""
    call()
    start = time.perf_counter()
    return call(), time.perf_counter() - start
