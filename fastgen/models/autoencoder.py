"""A plain autoencoder: features from which an image can be reconstructed."""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from fastgen.models.arguments import as_floats, check_condition, check_counts, check_latents
from fastgen.models.networks import Decoder, Encoder, check_network
from fastgen.models.rebuildable import Rebuildable


class Autoencoder(Rebuildable):
    """An autoencoder trained on the squared distance between an image and its reconstruction. `encode` gives features,
    for example for a classifier with few labels. The model has no likelihood and cannot be sampled.

    Args:
        shape: (C, H, W) of an image, any sizes.
        latent_dim: number of features.
        levels: number of levels of a channel.
        n_classes: number of classes of a class-conditional model, None for an unconditional one.
        network: "convolutional" or "mlp".
        channels: feature maps of the convolutional network at full resolution.
        hidden: units of a hidden layer of the MLP.

    Raises:
        ValueError: an argument is not as above.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        latent_dim: int,
        *,
        levels: int = 256,
        n_classes: int | None = None,
        network: str = "convolutional",
        channels: int = 32,
        hidden: int = 512,
    ) -> None:
        super().__init__()
        check_network(shape, network, latent_dim=latent_dim)
        check_counts(2, levels=levels)
        self.shape = tuple(shape)
        self.latent_dim = latent_dim
        self.levels = levels
        self.n_classes = n_classes
        sizes: dict[str, Any] = {"network": network, "channels": channels, "hidden": hidden, "n_classes": n_classes}
        self.encoder = Encoder(shape, latent_dim, **sizes)
        self.decoder = Decoder(shape, latent_dim, shape[0], **sizes)

    def _floats(self, x: Tensor) -> Tensor:
        return as_floats(x, self.shape, self.levels, next(self.parameters()).dtype)

    def encode(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Encodes integer levels (B, C, H, W), or floats in [-1, 1], and classes (B,) as features (B, latent_dim)."""
        check_condition(condition, self.n_classes)
        return self.encoder(self._floats(x), condition)

    def decode(self, features: Tensor, condition: Tensor | None = None) -> Tensor:
        """Decodes features (B, latent_dim) to images (B, C, H, W), floats; -1 is level 0 and 1 the highest level."""
        check_latents(self.latent_dim, features=features)
        check_condition(condition, self.n_classes)
        return self.decoder(features, condition)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """The reconstruction decode(encode(x)), floats as in `decode`."""
        return self.decode(self.encode(x, condition), condition)

    def loss(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Squared distance of the reconstruction on the scale of -1..1, summed over an image, mean over the batch:
        ()."""
        return F.mse_loss(self(x, condition), self._floats(x), reduction="sum") / x.shape[0]

    def reconstruct(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """The reconstruction in levels, floats (B, C, H, W) within 0..levels - 1."""
        return (self(x, condition).clamp(-1, 1) + 1) * ((self.levels - 1) / 2)
