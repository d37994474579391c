"""Everything of a VAE's loss but its networks: the latent draw with its KL, and the reconstruction's nats."""

import functools
from typing import Any

import torch
from torch import Tensor

from benchmarks import references
from benchmarks.case import Case, Rivals, contenders
from benchmarks.reconstruction_nll import KERNELS, RIVALS, likelihood_inputs
from fastgen import ops
from fastgen.ops.reconstruction_nll import reconstruction_nll_reference
from fastgen.ops.reparameterize_kl import reparameterize_kl_reference

# Likelihood, (B, C, H, W) images, latent dimensions.
Size = tuple[str, tuple[int, ...], int]
SIZES: dict[str, list[Size]] = {
    "toy": [("bernoulli", (2, 1, 3, 5), 7), ("logistic_mixture", (2, 3, 2, 3), 5)],
    "cpu": [("bernoulli", (128, 1, 28, 28), 20), ("logistic_mixture", (8, 3, 32, 32), 128)],
    "gpu": [("bernoulli", (128, 1, 28, 28), 20), ("logistic_mixture", (256, 3, 32, 32), 128)],
    "gpu-full": [
        ("bernoulli", (128, 1, 28, 28), 20),
        ("gaussian", (256, 3, 64, 64), 256),
        ("logistic_mixture", (256, 3, 32, 32), 128),
        ("logistic_mixture", (256, 3, 64, 64), 4096),
    ],
}


def _inputs(device: torch.device, likelihood: str, image: tuple[int, ...], latent: int) -> dict[str, Tensor]:
    mu, logvar = (torch.randn(image[0], latent, device=device).requires_grad_() for _ in range(2))
    return {"mu": mu, "logvar": logvar, **likelihood_inputs(device, likelihood, image, torch.float32)}


def _noise(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The same noise for all where they are compared; while timed, each draws its own."""
    return {"eps": torch.randn_like(inputs["mu"])}


def fused(
    mu: Tensor,
    logvar: Tensor,
    params: Tensor,
    target: Tensor,
    eps: Tensor | None = None,
    *,
    likelihood: str,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """z and the bound (B,)."""
    z, kl = ops.reparameterize_kl(mu, logvar, eps=eps, impl=impl)
    return z, ops.elbo(params, target, kl, likelihood, impl=impl).elbo


def defined(
    mu: Tensor, logvar: Tensor, params: Tensor, target: Tensor, eps: Tensor | None = None, *, likelihood: str
) -> tuple[Tensor, Tensor]:
    z, kl = reparameterize_kl_reference(mu, logvar, eps=eps)
    return z, -(reconstruction_nll_reference(params, target, likelihood) + kl)


def textbook(
    mu: Tensor, logvar: Tensor, params: Tensor, target: Tensor, eps: Tensor | None = None, *, likelihood: str
) -> tuple[Tensor, Tensor]:
    z, kl = references.reparameterize_kl_textbook(mu, logvar, eps)
    return z, -(RIVALS[likelihood](params, target) + kl)


def cases(size: str, device: torch.device) -> list[Case]:
    found = []
    for likelihood, image, latent in SIZES.get(size, SIZES[size.removesuffix("-full")]):
        rival = functools.partial(textbook, likelihood=likelihood)
        rivals: Rivals = {"eager": rival, "compiled": references.compiled(rival)}
        if device.type == "cuda":
            rivals["compiled reduce-overhead"] = references.compiled(rival, "reduce-overhead")
        definition = functools.partial(defined, likelihood=likelihood)
        example = _inputs(torch.device("meta"), likelihood, image, latent)
        params, z = 4 * example["params"].numel(), 4 * example["mu"].numel()
        target = example["target"].numel() * example["target"].dtype.itemsize
        found.append(
            Case(
                op="elbo",
                shape=f"{likelihood} {'x'.join(map(str, image))} D={latent}",
                dtype=torch.float32,
                inputs=functools.partial(_inputs, likelihood=likelihood, image=image, latent=latent),
                providers=contenders(size, device, rivals, functools.partial(fused, likelihood=likelihood), definition),
                truth=definition,
                kernels=(
                    KERNELS[likelihood],
                    "vae/reparameterize_kl",
                ),
                # The floors of the two operations, one after the other.
                bytes={
                    "fwd": 3 * z + params + target,
                    "bwd": 5 * z + 2 * params + target,
                    "full": 8 * z + 3 * params + 2 * target,
                },
                given=_noise,
                batch=image[0],
            )
        )
    return found
