"""Training steps of a VAE: loss and gradients of a batch, without the optimizer.

The rivals have the same networks, and the loss in plain PyTorch. bfloat16 means autocast of the networks.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import references
from benchmarks.cases.reconstruction_nll import RIVALS
from benchmarks.cases.training import AVAILABLE, LEVELS, SHAPES, Shape, autocast, images, steps
from benchmarks.harness.case import Case
from fastgen import ops
from fastgen.models import VAE
from fastgen.ops.reconstruction_nll import reconstruction_nll_reference
from fastgen.ops.reparameterize_kl import reparameterize_kl_reference

# Likelihood, data (with a shape, if it is not the usual one), number of images, arguments of the VAE.
Job = tuple[str, str, int, dict[str, Any]]
MLP: Job = ("bernoulli", "binary", 128, {"latent_dim": 20, "network": "mlp", "hidden": 400})


def _on_all(digits: tuple[int, dict[str, Any]], colours: tuple[int, dict[str, Any]]) -> list[Job]:
    """A softmax over the levels of digits, mixtures of logistics for RGB images, and MLP.

    Args:
        digits, colours: number of images and arguments of the VAE.
    """
    jobs: list[Job] = [("categorical", "digits", *digits)]
    jobs += [("logistic_mixture", data, *colours) for data in ("patches", "random")]
    return [*(job for job in jobs if job[1] in AVAILABLE), MLP]


CPU = _on_all((128, {"latent_dim": 16, "channels": 16}), (8, {"latent_dim": 64, "channels": 16}))
JOBS: dict[str, list[Job]] = {
    "toy": [
        ("bernoulli", "binary 1x3x5", 2, {"latent_dim": 3, "network": "mlp", "hidden": 8}),
        ("logistic_mixture", "random 3x5x6", 2, {"latent_dim": 3, "channels": 4}),
    ],
    "cpu": CPU,
    "cpu-full": CPU,
    "gpu": _on_all((256, {"latent_dim": 16, "channels": 64}), (256, {"latent_dim": 128, "channels": 64})),
    "gpu-full": [
        *_on_all((1024, {"latent_dim": 16, "channels": 64}), (512, {"latent_dim": 128, "channels": 64})),
        ("categorical", "random", 64, {"latent_dim": 128, "channels": 64}),
        ("logistic_mixture", "random 3x64x64", 256, {"latent_dim": 256, "channels": 64}),
    ],
}


def _shape(data: str) -> Shape:
    name, _, shape = data.partition(" ")
    if shape:
        channels, height, width = map(int, shape.split("x"))
        return channels, height, width
    return (1, 28, 28) if name == "binary" else SHAPES[name]


def _inputs(device: torch.device, job: Job, dtype: torch.dtype) -> dict[str, Any]:
    likelihood, data, batch, model_sizes = job
    shape, name = _shape(data), data.partition(" ")[0]
    model = VAE(shape, likelihood=likelihood, levels=LEVELS.get(name, 2), **model_sizes).to(device)
    x = images("random" if name == "binary" else name, shape, model.levels, batch, device)
    return {"model": model, "x": x, "autocast": autocast(device, dtype)}


def _noise(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The same noise for all providers while they are compared. While they are timed, each draws its own."""
    model, x = inputs["model"], inputs["x"]
    return {"eps": torch.randn(len(x), model.latent_dim, device=x.device)}


def fastgen_loss(model: VAE, x: Tensor, autocast: Any, eps: Tensor | None = None) -> Tensor:
    """-ELBO, mean nats per image, by fastgen's operations."""
    with autocast:
        mu, logvar = model.encode(x)
        z, kl = ops.reparameterize_kl(mu, logvar, eps=eps)
        params = model.decode(z)
    return -ops.elbo(params, x, kl, model.likelihood, levels=model.levels).elbo.mean()


def plain_loss(model: VAE, x: Tensor, autocast: Any, eps: Tensor | None = None) -> Tensor:
    """-ELBO, mean nats per image, in plain PyTorch."""
    with autocast:
        z, kl = references.reparameterize_kl_textbook(*model.encode(x), eps)
        params = model.decode(z)
    return (RIVALS[model.likelihood](params, x) + kl).mean()


def truth(model: VAE, x: Tensor, autocast: Any, eps: Tensor) -> Tensor:
    """-ELBO by the definitions, without autocast: it is called with float64 inputs."""
    z, kl = reparameterize_kl_reference(*model.encode(x), eps=eps)
    return (reconstruction_nll_reference(model.decode(z), x, model.likelihood, levels=model.levels) + kl).mean()


def cases(size: str, device: torch.device) -> Iterator[Case]:
    rivals = references.rivals_of(plain_loss)
    for job in JOBS[size]:
        likelihood, data, batch, model_sizes = job
        sizes = " ".join(f"{key}={value}" for key, value in model_sizes.items())
        shape = f"{likelihood} {data.partition(' ')[0]} {'x'.join(map(str, _shape(data)))} B={batch} {sizes}"
        inputs, more = functools.partial(_inputs, job=job), {"truth": truth, "given": _noise, "batch": batch}
        yield from steps(size, "vae", shape, inputs, rivals, fastgen_loss, **more)
