"""Reparameterization and KL of a diagonal Gaussian. Bandwidth limits it; for small latents, the cost of a launch."""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import references
from benchmarks.harness.case import Case, Rivals, contenders
from fastgen.ops import reparameterize_kl
from fastgen.ops.reparameterize_kl import reparameterize_kl_reference

# Latents of an MLP; large ones, to measure bandwidth; latent maps (few long rows); latents of a convolutional network.
GPU: list[tuple[int, ...]] = [(128, 20), (1024, 4096), (16, 4, 64, 64), (256, 128)]
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "toy": [(3, 37), (1, 1025)],
    "cpu": [(128, 20), (1024, 1024)],
    "cpu-full": [(128, 20), (256, 128), (1024, 4096)],
    "gpu": GPU,
    "gpu-full": [*GPU, (4096, 4096)],
}
HALF = [(3, 37), (1024, 4096)]  # these are measured in bfloat16 too


def inputs(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    mu, logvar = torch.randn(shape, device=device), torch.randn(shape, device=device) - 1
    return {name: x.to(dtype).requires_grad_() for name, x in (("mu", mu), ("logvar", logvar))}


def noise(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The same noise for all providers while they are compared. While they are timed, each draws its own."""
    return {"eps": torch.randn_like(inputs["mu"])}


def cases(size: str, device: torch.device) -> Iterator[Case]:
    rivals: Rivals = references.rivals_of(references.reparameterize_kl_textbook)
    rivals["distributions"] = references.reparameterize_kl_distributions
    jobs = [(shape, torch.float32) for shape in SHAPES[size]]
    jobs += [(shape, torch.bfloat16) for shape in SHAPES[size] if shape in HALF and not size.startswith("cpu")]
    for shape, dtype in jobs:
        moved = dtype.itemsize * torch.Size(shape).numel()
        yield Case(
            op="reparameterize_kl",
            shape="x".join(map(str, shape)),
            dtype=dtype,
            inputs=functools.partial(inputs, shape=shape, dtype=dtype),
            providers=contenders(size, device, rivals, reparameterize_kl, reparameterize_kl_reference),
            truth=reparameterize_kl_reference,
            # The forward reads mu and logvar and writes z; the backward reads dz, mu and logvar and writes dmu and
            # dlogvar. The noise is not stored.
            bytes=(3 * moved, 5 * moved),
            given=noise,
            batch=shape[0],
        )
