"""A whole training step of a VAE without the optimizer: loss and gradients of a batch. The rivals hold the same
networks, and the loss in plain PyTorch. On a GPU bfloat16 means autocast of the networks."""

import functools
from typing import Any

import torch
from torch import Tensor

from benchmarks import references
from benchmarks.case import Case, Rivals
from benchmarks.reconstruction_nll import RIVALS
from fastgen import ops
from fastgen.models import VAE
from fastgen.ops.reconstruction_nll import reconstruction_nll_reference
from fastgen.ops.reparameterize_kl import reparameterize_kl_reference

# Likelihood, images (C, H, W), batch, arguments of the VAE.
Job = tuple[str, tuple[int, int, int], int, dict[str, Any]]
MLP = ("bernoulli", (1, 28, 28), 128, {"latent_dim": 20, "network": "mlp", "hidden": 400})
JOBS: dict[str, list[Job]] = {
    "toy": [
        ("bernoulli", (1, 3, 5), 2, {"latent_dim": 3, "network": "mlp", "hidden": 8}),
        ("logistic_mixture", (3, 5, 6), 2, {"latent_dim": 3, "channels": 4}),
    ],
    "cpu": [MLP, ("logistic_mixture", (3, 32, 32), 8, {"latent_dim": 64, "channels": 16})],
    "gpu": [MLP, ("logistic_mixture", (3, 32, 32), 256, {"latent_dim": 128, "channels": 64})],
    "gpu-full": [
        MLP,
        ("categorical", (3, 32, 32), 64, {"latent_dim": 128, "channels": 64}),
        ("logistic_mixture", (3, 32, 32), 256, {"latent_dim": 128, "channels": 64}),
        ("logistic_mixture", (3, 64, 64), 256, {"latent_dim": 256, "channels": 64}),
    ],
}


def _inputs(device: torch.device, job: Job, dtype: torch.dtype) -> dict[str, Any]:
    likelihood, shape, batch, of_model = job
    model = VAE(shape, likelihood=likelihood, **of_model).to(device)
    return {
        "model": model,
        "x": torch.randint(model.levels, (batch, *shape), device=device, dtype=torch.uint8),
        "autocast": torch.autocast(device.type, dtype, enabled=dtype != torch.float32),
    }


def _noise(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The same noise for all where they are compared; while timed, each draws its own."""
    model, x = inputs["model"], inputs["x"]
    return {"eps": torch.randn(len(x), model.latent_dim, device=x.device)}


def fastgen_loss(model: VAE, x: Tensor, autocast: Any, eps: Tensor | None = None) -> Tensor:
    """Mean nats an image."""
    with autocast:
        mu, logvar = model.encode(x)
        z, kl = ops.reparameterize_kl(mu, logvar, eps=eps)
        params = model.decode(z)
    return -ops.elbo(params, x, kl, model.likelihood, levels=model.levels).elbo.mean()


def plain_loss(model: VAE, x: Tensor, autocast: Any, eps: Tensor | None = None) -> Tensor:
    with autocast:
        z, kl = references.reparameterize_kl_textbook(*model.encode(x), eps)
        params = model.decode(z)
    return (RIVALS[model.likelihood](params, x) + kl).mean()


def truth(model: VAE, x: Tensor, autocast: Any, eps: Tensor) -> Tensor:
    """In float64, so without autocast."""
    z, kl = reparameterize_kl_reference(*model.encode(x), eps=eps)
    return (reconstruction_nll_reference(model.decode(z), x, model.likelihood) + kl).mean()


def cases(size: str, device: torch.device) -> list[Case]:
    dtypes = {"gpu": [torch.bfloat16], "gpu-full": [torch.float32, torch.bfloat16]}.get(size, [torch.float32])
    found = []
    for job in JOBS.get(size, JOBS[size.removesuffix("-full")]):
        likelihood, shape, batch, of_model = job
        sizes = " ".join(f"{key}={value}" for key, value in of_model.items())
        for dtype in dtypes:
            providers: Rivals = {"eager": plain_loss}
            if size != "toy":
                providers["compiled"] = references.compiled(plain_loss)
            if device.type == "cuda":
                providers["compiled reduce-overhead"] = references.compiled(plain_loss, "reduce-overhead")
            providers["fastgen"] = fastgen_loss
            if size.endswith("-full"):
                providers["fastgen, compiled"] = references.compiled(fastgen_loss)
            found.append(
                Case(
                    op="vae",
                    shape=f"{likelihood} {'x'.join(map(str, shape))} B={batch} {sizes}",
                    dtype=dtype,
                    inputs=functools.partial(_inputs, job=job, dtype=dtype),
                    providers=providers,
                    truth=truth,
                    kernels=(
                        "logistic_mixture_nll" if likelihood == "logistic_mixture" else "reconstruction_nll",
                        "reparameterize_kl",
                    ),
                    modes=("full",),
                    given=_noise,
                    batch=batch,
                )
            )
    return found
