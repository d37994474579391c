"""The variational autoencoder (Kingma & Welling 2014), with exact p(x | z) and importance-weighted bounds of log
p(x)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgen import ops
from fastgen.models import decoded
from fastgen.models.arguments import as_floats, check_condition, check_counts, check_latents
from fastgen.models.bound import Bound
from fastgen.models.networks import Decoder, Encoder, check_network
from fastgen.models.rebuildable import Rebuildable
from fastgen.ops.elbo import bound_of
from fastgen.ops.reconstruction_nll import LIKELIHOODS
from fastgen.ops.reparameterize_kl import MAX_LOGVAR, MIN_LOGVAR

PARAMETERS_AT_ONCE = 2**24  # size of the decoder's output beyond which `log_prob` decodes its samples in several parts


class VAE(Rebuildable):
    """A variational autoencoder: p(x) = E over z ~ N(0, I) of p(x | z), with a Gaussian q(z | x) of diagonal covariance
    for training and scoring.

    Images are integer levels (B, C, H, W), as in the autoregressive models. The networks see them as floats in [-1, 1]
    (Bernoulli: 0 and 1); float images count as converted already.

    Args:
        shape: (C, H, W) of an image, any sizes; C = 1 or 3 for "logistic_mixture".
        latent_dim: D, dimensions of z.
        likelihood: p(x | z), as in `fastgen.ops.reconstruction_nll`. "bernoulli": levels 0 and 1. "categorical": a
            softmax over the levels. "logistic_mixture": as in PixelCNN++. "gaussian": a Gaussian with learned mean and
            variance, rounded to the nearest level; float images have its density instead, whose nats are not comparable
            with those of levels. The variance starts near 1 on the scale of -1..1. It cannot fall below the variance of
            rounding to a level, so that the density of a constant pixel stays finite.
        levels: number of levels of a channel; ignored for "bernoulli", which has two.
        n_classes: number of classes of a class-conditional model p(x | y), None for an unconditional one.
        network: "convolutional" or "mlp"; see `fastgen.models.networks`.
        channels: feature maps of the convolutional network at full resolution.
        hidden: units of a hidden layer of the MLP.
        n_mix: number of components of the logistic mixture.

    Raises:
        ValueError: an argument is not as above.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        latent_dim: int,
        *,
        likelihood: str = "bernoulli",
        levels: int = 256,
        n_classes: int | None = None,
        network: str = "convolutional",
        channels: int = 32,
        hidden: int = 512,
        n_mix: int = 10,
    ) -> None:
        super().__init__()
        check_network(shape, network, latent_dim=latent_dim, n_mix=n_mix)
        if likelihood not in LIKELIHOODS:
            raise ValueError(f"likelihood must be one of {LIKELIHOODS}, got {likelihood!r}")
        if likelihood == "logistic_mixture" and shape[0] not in (1, 3):
            raise ValueError(f"shape must have 1 or 3 channels for a mixture of logistics, got {shape!r}")
        check_counts(2, levels=levels)
        self.shape = tuple(shape)
        self.latent_dim = latent_dim
        self.likelihood = likelihood
        self.levels = 2 if likelihood == "bernoulli" else levels
        self.n_classes = n_classes
        self.planes = decoded.planes_of(likelihood, shape[0], self.levels, n_mix)
        sizes: dict[str, Any] = {"network": network, "channels": channels, "hidden": hidden, "n_classes": n_classes}
        self.encoder = Encoder(shape, 2 * latent_dim, **sizes)
        self.decoder = Decoder(shape, latent_dim, self.planes, **sizes)
        if likelihood == "gaussian":
            with torch.no_grad():  # `decode` then gives log-variances of about 0
                self.decoder.bias[shape[0] :] = max(-self._least_log_variance, 0.0)

    # --- the two networks

    def _floats(self, x: Tensor) -> Tensor:
        dtype = next(self.parameters()).dtype
        if self.likelihood == "bernoulli":
            x = x.to(dtype)
        return as_floats(x, self.shape, self.levels, dtype)

    def encode(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Maps images (B, C, H, W) and classes (B,) to the mean and log-variance of q(z | x), (B, D) each."""
        check_condition(condition, self.n_classes)
        mu, logvar = self.encoder(self._floats(x), condition).chunk(2, 1)
        return mu, logvar

    def decode(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        """Maps z (B, D) and classes (B,) to the parameters of p(x | z) that `fastgen.ops.reconstruction_nll` takes.

        "bernoulli": logits (B, C, H, W). "gaussian": (B, 2*C, H, W), means, then log-variances. "categorical": logits
        (B, K, C, H, W). "logistic_mixture": (B, 10 * n_mix, H, W) for RGB, (B, 3 * n_mix, H, W) for one channel.
        """
        check_latents(self.latent_dim, z=z)
        check_condition(condition, self.n_classes)
        params = self.decoder(z, condition)
        if self.likelihood == "categorical":
            return params.unflatten(1, (self.levels, self.shape[0]))
        if self.likelihood == "gaussian":
            mean, log_variance = params.chunk(2, 1)
            return torch.cat((mean, F.softplus(log_variance) + self._least_log_variance), 1)
        return params

    @property
    def _least_log_variance(self) -> float:
        """The log-variance of uniform noise on an interval as wide as a level."""
        width = 2 / (self.levels - 1)
        return math.log(width**2 / 12)

    def _nll(self, params: Tensor, x: Tensor) -> Tensor:
        """-log p(x | z), (B,) nats. Raises TypeError if a likelihood of integer levels gets floats."""
        if self.likelihood == "gaussian":
            if not x.is_floating_point():
                return decoded.gaussian_nll(params, x, self.levels)
            x = self._floats(x)
        elif self.likelihood != "bernoulli" and x.is_floating_point():
            raise TypeError(f"x must hold integer levels 0..{self.levels - 1}, got {x.dtype}")
        return ops.reconstruction_nll(params, x, self.likelihood, levels=self.levels)

    # --- likelihood

    def elbo(
        self,
        x: Tensor,
        condition: Tensor | None = None,
        *,
        beta: float | Tensor = 1.0,
        free_bits: float = 0.0,
        eps: Tensor | None = None,
    ) -> Bound:
        """Estimates the evidence lower bound of each image from one draw of z.

        Args:
            x: integer levels (B, C, H, W); for "bernoulli" and "gaussian" also floats, as the networks see them.
            condition: classes (B,) of a class-conditional model.
            beta: weight of the KL (Higgins et al. 2017). To anneal it, give another value in each step; under
                `torch.compile` as a tensor of one element, which avoids recompilation.
            free_bits: minimum of the KL of each latent dimension, nats; see `fastgen.ops.reparameterize_kl`.
            eps: standard normal noise (B, D); None draws it from torch's default generator.

        Raises:
            ValueError: x has another shape, condition is missing or superfluous, or as in `fastgen.ops.elbo`.
            TypeError: a likelihood of integer levels gets floats, or as in `fastgen.ops.elbo`.
        """
        mu, logvar = self.encode(x, condition)
        z, kl = ops.reparameterize_kl(mu, logvar, eps=eps, free_bits=free_bits)
        parts = bound_of(self._nll(self.decode(z, condition), x), kl, beta)
        density = self.likelihood == "gaussian" and x.is_floating_point()
        return Bound(*parts, mu.detach(), logvar.detach(), math.prod(self.shape), density)

    forward = elbo

    def loss(
        self,
        x: Tensor,
        condition: Tensor | None = None,
        *,
        beta: float | Tensor = 1.0,
        free_bits: float = 0.0,
    ) -> Tensor:
        """The mean of -elbo over the batch, () nats, for training. Arguments as in `elbo`."""
        return -self.elbo(x, condition, beta=beta, free_bits=free_bits).elbo.mean()

    def log_prob(
        self,
        x: Tensor,
        n_samples: int = 64,
        condition: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Importance-weighted estimate of log p(x), (B,) nats (Burda et al. 2016, "Importance Weighted Autoencoders",
        equation 8).

        It is the logarithm of the mean of p(x | z) p(z) / q(z | x) over n_samples draws z from q(z | x). Its
        expectation is a lower bound of log p(x): the ELBO for one sample; it increases with n_samples towards log p(x).

        Args:
            x, condition: as in `elbo`.
            n_samples: draws of z for each image. They are decoded in several parts if memory requires it.
            generator: generator of the noise; None uses torch's default generator of the device.

        Raises:
            ValueError, TypeError: as in `elbo`; ValueError also if n_samples < 1.
        """
        check_counts(n_samples=n_samples)
        mu, logvar = self.encode(x, condition)
        at_once = PARAMETERS_AT_ONCE // max(1, x.shape[0] * self.planes * self.shape[1] * self.shape[2])
        at_once = min(max(1, at_once), n_samples)
        noise = torch.randn(n_samples, *mu.shape, generator=generator, dtype=mu.dtype, device=mu.device)
        log_weights = []
        for eps in noise.split(at_once):
            count = len(eps)
            z, _ = ops.reparameterize_kl(mu.expand_as(eps), logvar.expand_as(eps), eps=eps)
            params = self.decode(z.flatten(0, 1), None if condition is None else condition.repeat(count))
            nll = self._nll(params, x.repeat(count, 1, 1, 1))
            # log p(z) - log q(z | x): the constants cancel, and (z - mu) / sigma is eps.
            eps, z, clamped = (tensor.to(nll.dtype) for tensor in (eps, z, logvar.clamp(MIN_LOGVAR, MAX_LOGVAR)))
            log_ratio = 0.5 * (eps.square() - z.square() + clamped).sum(2)
            log_weights.append(log_ratio - nll.view(count, -1))
        return torch.cat(log_weights).logsumexp(0) - math.log(n_samples)

    # --- images

    def expected(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        """E[x | z] for z (B, D) and classes (B,), in levels: floats (B, C, H, W) within 0..levels - 1."""
        return decoded.expected(self.decode(z, condition), self.likelihood, self.shape[0], self.levels)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        seed: int | None = None,
        temperature: float = 1.0,
        condition: Tensor | None = None,
        expected: bool = False,
    ) -> Tensor:
        """Draws n images: z from the prior, then x from p(x | z).

        Args:
            n: number of images.
            seed: seed of the noise; None uses torch's default generator of the device.
            temperature: factor of the prior's standard deviation.
            condition: classes (n,) of a class-conditional model.
            expected: True returns E[x | z] instead of a draw from p(x | z). It looks smoother, but is not a sample.

        Returns:
            int64 levels (n, C, H, W); with `expected` floats within 0..levels - 1.

        Raises:
            ValueError: n is not an int >= 0, temperature is not a finite number >= 0, or condition does not fit.
        """
        check_counts(0, n=n)
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature must be a finite number >= 0, got {temperature!r}")
        weight = next(self.parameters())
        generator = None if seed is None else torch.Generator(weight.device).manual_seed(seed)
        z = torch.randn(n, self.latent_dim, generator=generator, device=weight.device) * temperature
        z = z.to(weight.dtype)
        if expected:
            return self.expected(z, condition)
        params = self.decode(z, condition)
        return decoded.draw(params, self.likelihood, self.shape[0], self.levels, generator)

    @torch.no_grad()
    def reconstruct(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """E[x | z] where z is the mean of q(z | x): floats (B, C, H, W) within 0..levels - 1."""
        return self.expected(self.encode(x, condition)[0], condition)

    @torch.no_grad()
    def interpolate(self, x1: Tensor, x2: Tensor, steps: int, condition: Tensor | None = None) -> Tensor:
        """Expected images at points on the straight line between the posterior means of x1 and x2.

        Args:
            x1, x2: images (B, C, H, W) as in `elbo`, or one image (C, H, W) each.
            steps: number of points on the line, including both ends; at least 2.
            condition: classes (B,) of a class-conditional model.

        Returns:
            Floats (steps, B, C, H, W), or (steps, C, H, W) for one image each, within 0..levels - 1. The first and the
            last are the reconstructions of x1 and x2.

        Raises:
            ValueError: x1 and x2 differ in shape, or steps < 2.
        """
        check_counts(2, steps=steps)
        if x1.shape != x2.shape:
            raise ValueError(f"x1 and x2 must have one shape, got {tuple(x1.shape)} and {tuple(x2.shape)}")
        single = x1.dim() == 3
        ends = [self.encode(x.unsqueeze(0) if single else x, condition)[0] for x in (x1, x2)]
        along = torch.linspace(0, 1, steps, device=x1.device, dtype=ends[0].dtype).view(-1, 1, 1)
        images = self._expected_of_each(torch.lerp(ends[0], ends[1], along), condition)
        return images.squeeze(1) if single else images

    @torch.no_grad()
    def traverse(
        self, x: Tensor, dimension: int, values: Sequence[float] | Tensor, condition: Tensor | None = None
    ) -> Tensor:
        """Expected images at the posterior means of x, with one latent dimension replaced by each of the values.

        Args:
            x: images (B, C, H, W) as in `elbo`.
            dimension: index of the latent dimension, 0..D - 1.
            values: V numbers; the prior of the dimension has mean 0 and standard deviation 1.
            condition: classes (B,) of a class-conditional model.

        Returns:
            Floats (V, B, C, H, W) within 0..levels - 1.

        Raises:
            ValueError: dimension is not an int in 0..D - 1.
        """
        if not isinstance(dimension, int) or not 0 <= dimension < self.latent_dim:
            raise ValueError(f"dimension must be an int in 0..{self.latent_dim - 1}, got {dimension!r}")
        mu = self.encode(x, condition)[0]
        coordinates = torch.as_tensor(values, dtype=mu.dtype, device=mu.device)
        z = mu.repeat(len(coordinates), 1, 1)
        z[:, :, dimension] = coordinates.unsqueeze(1)
        return self._expected_of_each(z, condition)

    def _expected_of_each(self, z: Tensor, condition: Tensor | None) -> Tensor:
        """Expected images (V, B, C, H, W) of z (V, B, D)."""
        images = self.expected(z.flatten(0, 1), None if condition is None else condition.repeat(z.shape[0]))
        return images.unflatten(0, z.shape[:2])
