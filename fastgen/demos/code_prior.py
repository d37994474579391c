"""A prior over codes: a VQ-VAE (van den Oord, Vinyals & Kavukcuoglu 2017, "Neural Discrete Representation Learning")
encodes patches of photographs as grids of integer codes (B, H, W), and a PixelCNN learns, draws and completes the
grids.

The PixelCNN is conditioned on a thumbnail of the patch.
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

THUMBNAIL = 8  # a pixel of a thumbnail is the mean of 8x8 pixels of a patch
BATCH, RATE = 32, 2e-3  # images a step, peak learning rate
DECAY, COMMITMENT = 0.97, 0.25  # of the codebook's moving averages; weight of the commitment loss
SHOWN = 10  # patches in the picture


class VQVAE(nn.Module):
    """Encodes images (B, 3, H, W) in [-1, 1] as codes (B, H / 4, W / 4), indexes of the vectors of a codebook.

    Each vector of the codebook is a moving average of the features nearest to it (appendix A.1 of the paper). A vector
    that is no longer the nearest of any feature is replaced by a random feature of the batch.

    Args:
        codes: number of vectors in the codebook.
        channels: feature maps of the hidden layers.
        dimensions: length of a vector.
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
        """Features (B, dimensions, H, W) -> the index of the nearest vector to each, (B * H * W,)."""
        return torch.cdist(features.movedim(1, -1).flatten(0, 2), self.codebook).argmin(1)

    def encode(self, x: Tensor) -> Tensor:
        features = self.encoder(x)
        return self._nearest(features).view(len(x), *features.shape[2:])

    def decode(self, codes: Tensor) -> Tensor:
        return self.decoder(self.codebook[codes].movedim(-1, 1))

    def loss(self, x: Tensor) -> Tensor:
        """Squared error plus commitment loss (equation 3; the codebook has no loss, it is averaged). In training mode
        it also updates the codebook."""
        features = self.encoder(x)
        codes = self._nearest(features)
        if self.training:
            self._update_codebook(features.detach().movedim(1, -1).flatten(0, 2), codes)
        vectors = self.codebook[codes].view_as(features.movedim(1, -1)).movedim(-1, 1)
        straight_through = features + (vectors - features).detach()  # the vectors, with the gradient of the features
        return F.mse_loss(self.decoder(straight_through), x) + COMMITMENT * F.mse_loss(features, vectors)

    def _update_codebook(self, features: Tensor, codes: Tensor) -> None:
        """Features (N, dimensions) and the codes (N,) of the vectors nearest to them."""
        counts = torch.bincount(codes, minlength=len(self.counts)).to(features.dtype)
        sums = torch.zeros_like(self.codebook).index_add(0, codes, features)
        decayed = self.counts * DECAY
        self.counts.copy_(decayed + counts * (1 - DECAY))
        total = decayed.unsqueeze(1) * self.codebook + (1 - DECAY) * sums
        self.codebook.copy_(total / self.counts.clamp(min=1e-9).unsqueeze(1))
        unused = self.counts < 0.05
        replacements = features[torch.randint(len(features), (len(self.counts),))]
        self.codebook.copy_(torch.where(unused.unsqueeze(1), replacements, self.codebook))
        self.counts.masked_fill_(unused, 1.0)


class Prior(nn.Module):
    """A PixelCNN over codes: codes (B, H, W) and thumbnails (B, 3, h, w) in [-1, 1] -> logits (B, K, H, W). Each logit
    depends on the codes before its own and on the whole thumbnail."""

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
        context = F.interpolate(self.thumbnail(thumbnail), codes.shape[1:])
        x = self.first(self.embedding(codes).movedim(-1, 1))
        for layer in self.rest:
            x = x + layer(x + context)
        return self.last(F.relu(x + context))

    def loss(self, codes: Tensor, thumbnail: Tensor) -> Tensor:
        """Mean of -log p(code) over all codes, () nats."""
        return F.cross_entropy(self(codes, thumbnail), codes)


def _train(model: nn.Module, loss: Callable[[Tensor], Tensor], images: int, steps: int) -> None:
    """Trains with Adam and a cosine schedule. `loss` gets the indexes (BATCH,) of random images out of `images`."""
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    model.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        loss(torch.randint(images, (BATCH,))).backward()
        optimizer.step()
    model.eval()


def run(*, codes: int = 64, steps: int = 1500, seed: int = 0) -> tuple[dict[str, Any], Image.Image]:
    """Trains a VQ-VAE and a prior of its codes on `patches`. Then draws codes given the thumbnails of test patches, and
    completes grids of codes whose upper half is kept.

    Args:
        codes: number of vectors in the codebook.
        steps: training steps of each of the two networks.
        seed: seed of the draws.

    Returns:
        "error": mean squared error of reconstructed test patches, on the scale of -1..1. "error_of_thumbnail": the same
        for enlarged thumbnails. "codes_used": how many different codes the test patches have.

        Bits per code on the test patches: "uniform", "histogram" (of the training codes), "prior", and
        "prior_of_others" (given the thumbnails of other patches).

        "identical": whether fastgen drew the same codes as the naive loop from the same noise. "speedup": the loop's
        time divided by fastgen's, both measured here. "work_ratio": as `Sampler.work_ratio`.
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
        bits, bits_of_others = (
            float(prior.loss(test_grids, thumbnail)) / math.log(2)
            for thumbnail in (test_thumbnails, test_thumbnails.roll(1, 0))
        )
    counts = torch.bincount(grids.flatten(), minlength=codes) + 1.0
    shape, chosen = tuple(test_grids.shape[1:]), torch.linspace(0, len(test) - 1, SHOWN).long()
    chosen_thumbnails = test_thumbnails[chosen]
    arguments: dict[str, Any] = {"distribution": Categorical(codes, layout="B(KC)HW"), "condition": chosen_thumbnails}
    sampler, naive = (accelerate(prior, shape, backend=backend, **arguments) for backend in ("auto", "naive"))
    noise = torch.rand(sampler.noise_shape(SHOWN), generator=torch.Generator().manual_seed(seed))
    drawn, seconds = _timed(lambda: sampler.sample(SHOWN, noise=noise))
    naive_drawn, naive_seconds = _timed(lambda: naive.sample(SHOWN, noise=noise))
    upper_half = torch.zeros(shape, dtype=torch.bool)
    upper_half[: shape[0] // 2] = True
    completed = sampler.sample(SHOWN, noise=noise, known=test_grids[chosen], known_mask=upper_half)
    numbers = {
        "error": F.mse_loss(rebuilt, test).item(),
        "error_of_thumbnail": F.mse_loss(_enlarged(test_thumbnails, test), test).item(),
        "codes_used": len(test_grids.unique()),
        "uniform": math.log2(codes),
        "histogram": float(-(counts / counts.sum()).log2()[test_grids].mean()),
        "prior": bits,
        "prior_of_others": bits_of_others,
        "identical": torch.equal(drawn, naive_drawn),
        "speedup": naive_seconds / seconds,
        "work_ratio": sampler.work_ratio,
    }
    shown = test[chosen]
    with torch.no_grad():
        rows = {
            "Test patches": shown,
            f"The patches decoded from their {shape[0]}x{shape[1]} codes ({codes} different ones)": rebuilt[chosen],
            "Thumbnails": _enlarged(chosen_thumbnails, shown),
            "Decoded from codes drawn given the thumbnails": model.decode(drawn),
            "Upper half of the codes kept, lower half drawn": model.decode(completed),
        }
    parts = [(name, rows_of(((x + 1) * 127.5).clamp(0, 255).unsqueeze(0), 256)) for name, x in rows.items()]
    caption = f"{bits:.2f} bits per code; given the thumbnails of other patches {bits_of_others:.2f}"
    return numbers, sheet(*parts, (caption, None), (patches.attribution, None))


def _enlarged(thumbnails: Tensor, images: Tensor) -> Tensor:
    return F.interpolate(thumbnails, images.shape[2:])


def _timed(call: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """The result and the seconds of a second call; the first one prepares the sampler."""
    call()
    start = time.perf_counter()
    return call(), time.perf_counter() - start
