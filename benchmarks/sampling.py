"""Exact sampling, a batch of images, beside one forward pass of the same batch: the least that any exact sampler needs.

Analysis and first batch (which measures the rounding of the engine) are made beforehand, and not timed. The images of
all backends are compared with each other level by level. The rivals in plain PyTorch run a whole forward pass a draw:
"naive", and the same with the model compiled, whose rounding may draw another level here and there.

What is drawn takes as long whatever the images: 1x8x8 with 17 levels are digits, 3x32x32 with 256 are patches and
CIFAR-10.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import references
from benchmarks.case import Case, Rivals
from fastgen import accelerate
from fastgen.models import GatedPixelCNN, PixelCNN, PixelRNN

# The model, image, levels, further sizes, images at once.
Job = tuple[type[GatedPixelCNN] | type[PixelCNN] | type[PixelRNN], tuple[int, int, int], int, dict[str, Any], int]

TOY: list[Job] = [(GatedPixelCNN, (1, 3, 4), 3, {"channels": 4, "layers": 1}, 2)]
JOBS: dict[str, list[Job]] = {
    "toy": TOY,
    "cpu": [
        (GatedPixelCNN, (1, 8, 8), 17, {"channels": 48, "layers": 6}, 16),
        (GatedPixelCNN, (1, 28, 28), 256, {}, 16),
        (PixelCNN, (1, 28, 28), 256, {}, 16),
    ],
    "gpu": [
        (GatedPixelCNN, (1, 28, 28), 256, {}, 16),
        (GatedPixelCNN, (1, 8, 8), 17, {}, 64),
        (PixelCNN, (3, 32, 32), 256, {}, 16),
        (PixelRNN, (1, 8, 8), 17, {"hidden_channels": 16, "layers": 7}, 64),
        *((GatedPixelCNN, (1, 28, 28), 256, {}, batch) for batch in (1, 64, 256)),
    ],
}
JOBS["cpu-full"] = JOBS["cpu"] + [
    (GatedPixelCNN, (1, 32, 32), 256, {}, 16),
    (PixelCNN, (1, 32, 32), 256, {}, 16),
    (PixelCNN, (3, 32, 32), 256, {}, 4),
]
JOBS["gpu-full"] = JOBS["gpu"] + [(PixelCNN, (3, 32, 32), 256, {}, batch) for batch in (1, 64, 256)]
NAIVE_DRAWS = {"cpu": 2000, "cuda": 60_000}  # up to so many levels of a batch the naive loops are timed as well


def _inputs(device: torch.device, job: Job, backends: tuple[str, ...], modes: tuple[str, ...]) -> dict[str, Any]:
    build, shape, levels, size, batch = job
    model = build(shape, levels, **size).to(device).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand((batch, *shape), generator=generator).to(device)
    samplers = {
        backend: accelerate(model, shape, distribution=model.distribution, backend=backend) for backend in backends
    }
    for backend in backends:
        if backend != "fixed_point":
            for _ in range(2):  # the first measures the rounding, the second captures graphs
                samplers[backend].sample(batch, noise=noise)
    x = torch.randint(levels, (batch, *shape), generator=generator).to(device)
    forwards = {"": model, **{mode: references.compiled(model, mode) for mode in modes}}
    return {"model": model, "x": x, "noise": noise, "samplers": samplers, "forwards": forwards}


def one_pass(model: nn.Module, x: Tensor, **others: Any) -> Tensor:
    return model(x)


def _sample(noise: Tensor, samplers: dict[str, Any], *, backend: str, **others: Any) -> Tensor:
    return samplers[backend].sample(len(noise), noise=noise)


def _naive(model: Any, noise: Tensor, forwards: dict[str, Any], *, mode: str = "", **others: Any) -> Tensor:
    return references.sample_naively(forwards[mode], noise, model.distribution.draw)


def cases(size: str, device: torch.device) -> list[Case]:
    found = []
    cuda = device.type == "cuda"
    for job in JOBS[size]:
        build, shape, levels, of_model, batch = job
        best = "cuda_graph" if cuda else "compiled"
        backends = ("fixed_point", "eager", best)
        providers: Rivals = {"one forward pass": one_pass}
        modes: tuple[str, ...] = ()
        if batch * shape[0] * shape[1] * shape[2] <= NAIVE_DRAWS[device.type]:
            modes = ("default", "reduce-overhead") if cuda else ("default",)
            providers["naive"] = _naive
        inexact = {f"naive, compiled {mode}".removesuffix(" default"): mode for mode in modes}
        providers |= {name: functools.partial(_naive, mode=mode) for name, mode in inexact.items()}
        for backend in backends:
            providers["fastgen" if backend == best else backend] = functools.partial(_sample, backend=backend)
        sizes = "".join(f" {key}={value}" for key, value in of_model.items())
        image = "x".join(map(str, shape))
        found.append(
            Case(
                op="sampling",
                shape=f"{build.__name__} {image} levels={levels} B={batch}{sizes}",
                dtype=torch.float32,
                inputs=functools.partial(_inputs, job=job, backends=backends, modes=modes),
                providers=providers,
                truth=_naive if "naive" in providers else functools.partial(_sample, backend="fixed_point"),
                modes=("fwd",),
                exact=True,
                not_compared=frozenset({"one forward pass"}),
                inexact=frozenset(inexact),
                batch=batch,
            )
        )
    return found
