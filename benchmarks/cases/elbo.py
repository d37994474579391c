"""A VAE's loss without its networks: the latent draw with its KL, and the nats of the reconstruction."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import reconstruction_nll, references, reparameterize_kl
from benchmarks.harness.case import Case, contenders
from fastgen import ops
from fastgen.ops.reconstruction_nll import reconstruction_nll_reference
from fastgen.ops.reparameterize_kl import reparameterize_kl_reference

# Likelihood, shape (B, C, H, W) of the images, latent dimensions.
Size = tuple[str, tuple[int, ...], int]
CPU: list[Size] = [("bernoulli", (128, 1, 28, 28), 20), ("logistic_mixture", (8, 3, 32, 32), 128)]
SIZES: dict[str, list[Size]] = {
    "toy": [("bernoulli", (2, 1, 3, 5), 7), ("logistic_mixture", (2, 3, 2, 3), 5)],
    "cpu": CPU,
    "cpu-full": CPU,
    "gpu": [("bernoulli", (128, 1, 28, 28), 20), ("logistic_mixture", (256, 3, 32, 32), 128)],
    "gpu-full": [
        ("bernoulli", (128, 1, 28, 28), 20),
        ("gaussian", (256, 3, 64, 64), 256),
        ("logistic_mixture", (256, 3, 32, 32), 128),
        ("logistic_mixture", (256, 3, 64, 64), 4096),
    ],
}


def inputs(
    device: torch.device, likelihood: str, image: tuple[int, ...], latent: int, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    posterior = reparameterize_kl.inputs(device, (image[0], latent), dtype)
    return posterior | reconstruction_nll.inputs(device, likelihood, image, dtype)


def fused(
    mu: Tensor, logvar: Tensor, params: Tensor, target: Tensor, eps: Tensor | None = None, *, impl: str = "auto",
    likelihood: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """z (B, D) and the ELBO (B,) by fastgen's two operations."""
    z, kl = ops.reparameterize_kl(mu, logvar, eps=eps, impl=impl)
    return z, ops.elbo(params, target, kl, likelihood, impl=impl).elbo


def in_parts(
    mu: Tensor, logvar: Tensor, params: Tensor, target: Tensor, eps: Tensor | None = None, *,
    kl: Callable[..., Any], nats: Callable[..., Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """z (B, D) and the ELBO (B,) by given functions for the draw with its KL and for the reconstruction."""
    z, divergence = kl(mu, logvar, eps=eps)
    return z, -(nats(params, target) + divergence)


def definition_of(likelihood: str) -> Callable[..., tuple[Tensor, Tensor]]:
    nats = functools.partial(reconstruction_nll_reference, likelihood=likelihood)
    return functools.partial(in_parts, kl=reparameterize_kl_reference, nats=nats)


def cases(size: str, device: torch.device) -> Iterator[Case]:
    for likelihood, image, latent in SIZES[size]:
        textbook, nats = references.reparameterize_kl_textbook, reconstruction_nll.RIVALS[likelihood]
        rivals = references.rivals_of(functools.partial(in_parts, kl=textbook, nats=nats))
        definition, operation = definition_of(likelihood), functools.partial(fused, likelihood=likelihood)
        case_inputs = functools.partial(inputs, likelihood=likelihood, image=image, latent=latent)
        mu, _, params, target = (x.numel() * x.dtype.itemsize for x in case_inputs(torch.device("meta")).values())
        yield Case(
            op="elbo",
            shape=f"{likelihood} {'x'.join(map(str, image))} D={latent}",
            dtype=torch.float32,
            inputs=case_inputs,
            providers=contenders(size, device, rivals, operation, definition),
            truth=definition,
            # Of the two operations, as in their own benchmarks.
            bytes=(3 * mu + params + target, 5 * mu + 2 * params + target),
            given=reparameterize_kl.noise,
            batch=image[0],
        )
