"""Exact sampling, a batch of images, beside one forward pass of the same batch: the least that any exact sampler needs.

Analysis and first batch (which measures the rounding of the engine) are made beforehand, and not timed. The images of
all backends are compared with each other level by level.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.case import Case, Rivals
from fastgen import accelerate
from fastgen.models import GatedPixelCNN, PixelCNN

# The model, image, levels, further sizes, images at once.
Job = tuple[type[GatedPixelCNN] | type[PixelCNN], tuple[int, int, int], int, dict[str, int], int]

TOY: list[Job] = [(GatedPixelCNN, (1, 3, 4), 3, {"channels": 4, "layers": 1}, 2)]
JOBS: dict[str, list[Job]] = {
    "toy": TOY,
    "cpu": [
        (GatedPixelCNN, (1, 8, 8), 17, {"channels": 48, "layers": 6}, 16),
        (GatedPixelCNN, (1, 28, 28), 256, {}, 16),
        (PixelCNN, (1, 28, 28), 256, {}, 16),
    ],
    "gpu": [(GatedPixelCNN, (1, 28, 28), 256, {}, batch) for batch in (1, 16, 64, 256)],
}
JOBS["cpu-full"] = JOBS["cpu"] + [
    (GatedPixelCNN, (1, 32, 32), 256, {}, 16),
    (PixelCNN, (1, 32, 32), 256, {}, 16),
    (PixelCNN, (3, 32, 32), 256, {}, 4),
]
JOBS["gpu-full"] = JOBS["gpu"] + [(PixelCNN, (3, 32, 32), 256, {}, batch) for batch in (1, 16, 64, 256)]
NAIVE_FORWARDS = 100  # up to so many draws an image the naive loop is timed as well


def _inputs(device: torch.device, job: Job, backends: tuple[str, ...]) -> dict[str, Any]:
    build, shape, levels, size, batch = job
    model = build(shape, levels, **size).to(device).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand((batch, *shape), generator=generator).to(device)
    samplers = {
        backend: accelerate(model, shape, distribution=model.distribution, backend=backend) for backend in backends
    }
    for backend in backends:
        if backend not in ("naive", "fixed_point"):
            for _ in range(2):  # the first measures the rounding, the second captures graphs
                samplers[backend].sample(batch, noise=noise)
    x = torch.randint(levels, (batch, *shape), generator=generator).to(device)
    return {"model": model, "x": x, "noise": noise, "samplers": samplers}


def one_pass(model: nn.Module, x: Tensor, noise: Tensor, samplers: dict[str, Any]) -> Tensor:
    return model(x)


def _sample(model: nn.Module, x: Tensor, noise: Tensor, samplers: dict[str, Any], *, backend: str) -> Tensor:
    return samplers[backend].sample(len(noise), noise=noise)


def cases(size: str, device: torch.device) -> list[Case]:
    found = []
    for job in JOBS[size]:
        build, shape, levels, of_model, batch = job
        few = shape[0] * shape[1] * shape[2] <= NAIVE_FORWARDS
        backends = ("fixed_point", "eager", *(("cuda_graph",) if device.type == "cuda" else ()))
        backends = ("naive", *backends) if few else backends
        providers: Rivals = {"one forward pass": one_pass}
        for backend in backends:
            name = "fastgen" if backend == ("cuda_graph" if device.type == "cuda" else "eager") else backend
            providers[name] = functools.partial(_sample, backend=backend)
        sizes = "".join(f" {key}={value}" for key, value in of_model.items())
        image = "x".join(map(str, shape))
        found.append(
            Case(
                op="sampling",
                shape=f"{build.__name__} {image} levels={levels} B={batch}{sizes}",
                dtype=torch.float32,
                inputs=functools.partial(_inputs, job=job, backends=backends),
                providers=providers,
                truth=functools.partial(_sample, backend=backends[0]),
                modes=("fwd",),
                exact=True,
                not_compared=frozenset({"one forward pass"}),
                batch=batch,
            )
        )
    return found
