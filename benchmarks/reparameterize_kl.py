"""Reparameterization and KL of a diagonal Gaussian. Memory-bound; small latents are bound by launches."""

import functools
from typing import Any

import torch
from torch import Tensor

from benchmarks import references
from benchmarks.case import Case, Rivals, contenders
from fastgen.ops import reparameterize_kl
from fastgen.ops.reparameterize_kl import reparameterize_kl_reference

# The latents of an MLP, large ones for the bandwidth, latent maps (few long rows), those of a convolutional network.
GPU = [
    ((128, 20), torch.float32),
    ((1024, 4096), torch.float32),
    ((16, 4, 64, 64), torch.float32),
    ((256, 128), torch.float32),
]
SHAPES: dict[str, list[tuple[tuple[int, ...], torch.dtype]]] = {
    "toy": [((3, 37), torch.float32), ((3, 37), torch.bfloat16), ((1, 1025), torch.float32)],
    "cpu": [((128, 20), torch.float32), ((1024, 1024), torch.float32)],
    "cpu-full": [((128, 20), torch.float32), ((256, 128), torch.float32), ((1024, 4096), torch.float32)],
    "gpu": [*GPU, ((1024, 4096), torch.bfloat16)],
    "gpu-full": [*GPU, ((1024, 4096), torch.bfloat16), ((4096, 4096), torch.float32)],
}


def _inputs(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    mu, logvar = torch.randn(shape, device=device), torch.randn(shape, device=device) - 1
    return {name: x.to(dtype).requires_grad_() for name, x in (("mu", mu), ("logvar", logvar))}


def _noise(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The same noise for all where they are compared; while timed, each draws its own."""
    return {"eps": torch.randn_like(inputs["mu"])}


def cases(size: str, device: torch.device) -> list[Case]:
    textbook = references.reparameterize_kl_textbook
    found = []
    for shape, dtype in SHAPES[size]:
        elements, storage = torch.Size(shape).numel(), dtype.itemsize
        rivals: Rivals = {
            "eager": textbook,
            "compiled": references.compiled(textbook),
            "distributions": references.reparameterize_kl_distributions,
        }
        if device.type == "cuda":
            rivals["compiled reduce-overhead"] = references.compiled(textbook, "reduce-overhead")
        found.append(
            Case(
                op="reparameterize_kl",
                shape="x".join(map(str, shape)),
                dtype=dtype,
                inputs=functools.partial(_inputs, shape=shape, dtype=dtype),
                providers=contenders(size, device, rivals, reparameterize_kl, reparameterize_kl_reference),
                truth=reparameterize_kl_reference,
                kernels=("vae/reparameterize_kl",),
                # Read mu, logvar, write z; read dz, mu, logvar, write dmu, dlogvar; the noise is not stored.
                bytes={"fwd": 3 * storage * elements, "bwd": 5 * storage * elements, "full": 8 * storage * elements},
                given=_noise,
                batch=shape[0],
            )
        )
    return found
