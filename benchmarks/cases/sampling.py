"""Exact sampling, a batch of images, beside one forward pass of the same batch: the least that any exact sampler needs.

Analysis and first batch (which measures the rounding of the engine) belong to the comparison, and are not timed. The
images of all backends are compared level by level with those of "naive" or, for large batches, of "fixed_point". The
rivals in plain PyTorch run a whole forward pass a draw; all are alike, so that one is timed, and the row says so.

Weights are scaled so that logits differ as those of a trained model do: where they hardly do, rounding never changes a
draw, and nothing has ever to be drawn again.
"""

import functools
import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases.references import compiled
from benchmarks.harness.case import Case, Rivals
from fastgen import accelerate
from fastgen.models import GatedPixelCNN, PixelCNN, PixelRNN

# The model, image, levels, further sizes, images at once.
Job = tuple[type[GatedPixelCNN] | type[PixelCNN] | type[PixelRNN], tuple[int, int, int], int, dict[str, Any], int]

CPU: list[Job] = [
    (GatedPixelCNN, (1, 8, 8), 17, {"channels": 48, "layers": 6}, 16),
    *((build, (1, 28, 28), 256, {}, 16) for build in (GatedPixelCNN, PixelCNN)),
]
GPU: list[Job] = [
    *((GatedPixelCNN, (1, 28, 28), 256, {}, batch) for batch in (16, 256)),
    (GatedPixelCNN, (1, 8, 8), 17, {}, 64),
    (PixelCNN, (3, 32, 32), 256, {}, 16),
    (PixelRNN, (1, 8, 8), 17, {"hidden_channels": 16, "layers": 7}, 64),
    *((GatedPixelCNN, (1, 28, 28), 256, {}, batch) for batch in (1, 64)),
]
JOBS: dict[str, list[Job]] = {
    "toy": [(GatedPixelCNN, (1, 2, 2), 3, {"channels": 4, "layers": 1}, 2)],
    "cpu": CPU,
    "cpu-full": [
        *CPU,
        *((build, (1, 32, 32), 256, {}, 16) for build in (GatedPixelCNN, PixelCNN)),
        (PixelCNN, (3, 32, 32), 256, {}, 4),
    ],
    "gpu": GPU,
    "gpu-full": GPU + [(PixelCNN, (3, 32, 32), 256, {}, batch) for batch in (1, 64, 256)],
}
NAIVE_DRAWS = {"cpu": 2000, "cuda": 60_000}  # a batch of up to so many levels is compared with naive sampling
PRODUCT = "as many multiply-adds in one product"
COLUMNS = 256  # of that
SPREAD = 2.0  # standard deviation of a pixel's logits


def spread_of(logits: Tensor) -> float:
    """Standard deviation over the levels, dim 1, in the mean of all places."""
    return logits.float().std(1).mean().item()


@torch.no_grad()
def scale(model: nn.Module, x: Tensor) -> None:
    """Scales the parameters of the model's last layer, so that its logits spread by SPREAD."""
    ran: list[nn.Module] = []
    layers = [layer for layer in model.modules() if isinstance(getattr(layer, "weight", None), nn.Parameter)]
    hooks = [layer.register_forward_hook(lambda layer, *_: ran.append(layer)) for layer in layers]
    factor = SPREAD / spread_of(model(x))
    for hook in hooks:
        hook.remove()
    for parameter in ran[-1].parameters(recurse=False):
        parameter.mul_(factor)


def _inputs(device: torch.device, job: Job) -> dict[str, Any]:
    build, shape, levels, size, batch = job
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand((batch, *shape), generator=generator).to(device)
    x = torch.randint(levels, (batch, *shape), generator=generator).to(device)
    model = build(shape, levels, **size).to(device).eval().requires_grad_(False)
    scale(model, x[:8])
    # Made at the first call: each backend that is asked for analyses the model once.
    sampler = functools.cache(lambda name: accelerate(model, shape, distribution=model.distribution, backend=name))
    factors = functools.cache(lambda: _factors(sampler, batch, device))
    return {"model": model, "x": x, "noise": noise, "sampler": sampler, "factors": factors}


def one_pass(model: nn.Module, x: Tensor, **others: Any) -> Tensor:
    return model(x)


def _sample(noise: Tensor, sampler: Any, *, backend: str, **others: Any) -> Tensor:
    return sampler(backend).sample(len(noise), noise=noise)


def _one_draw(model: Any, noise: Tensor, **others: Any) -> Tensor:
    """The first of the C * H * W draws, as most code draws them: for each, a whole forward pass."""
    levels = torch.zeros_like(noise, dtype=torch.long)
    params = model(levels)[..., 0, 0]
    levels[:, 0, 0, 0] = model.distribution.draw(params, noise[..., 0, 0], 0, levels[:, :0, 0, 0])
    return levels


def _factors(sampler: Any, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two matrices whose product takes as many multiply-adds as the steps of a batch."""
    found = re.search(r"(\S+) million multiply-adds an image", sampler("auto").explain())
    rows = 1 if found is None else max(1, round(float(found[1]) * 1e6 * batch / COLUMNS**2))
    return torch.rand(rows, COLUMNS, device=device), torch.rand(COLUMNS, COLUMNS, device=device)


def _one_product(factors: Any, **others: Any) -> Tensor:
    """What the processor's own matrix product takes for as many multiply-adds: over it, the machine's share of that."""
    return torch.mm(*factors())


def _about(provider: str, inputs: dict[str, Any], backends: dict[str, str]) -> dict[str, Any]:
    """What the sampler says of itself: passes, images drawn again, launches."""
    if provider not in backends:
        return {}
    sampler = inputs["sampler"](backends[provider])
    stats = getattr(sampler, "stats", None)
    return {"work_ratio": sampler.work_ratio, "stats": stats if stats is None else {**vars(stats)}}


def cases(size: str, device: torch.device) -> Iterator[Case]:
    cuda = device.type == "cuda"
    for job in JOBS[size]:
        build, shape, levels, of_model, batch = job
        draws = math.prod(shape)
        backends = {"fastgen": "auto", "fastgen, persistent": "persistent"}
        if size != "gpu":
            backends = {"fixed_point": "fixed_point", **backends, "eager": "eager"}
        providers: Rivals = {"one forward pass": one_pass, PRODUCT: _one_product, "naive": _one_draw}
        providers |= {name: functools.partial(_sample, backend=backend) for name, backend in backends.items()}
        providers["naive, compiled"] = compiled(_one_draw, "reduce-overhead" if cuda else None)
        sizes = "".join(f" {key}={value}" for key, value in of_model.items())
        truth = "naive" if batch * draws <= NAIVE_DRAWS[device.type] else "fixed_point"
        yield Case(
            op="sampling",
            shape=f"{build.__name__} {'x'.join(map(str, shape))} levels={levels} B={batch}{sizes}",
            dtype=torch.float32,
            inputs=functools.partial(_inputs, job=job),
            providers=providers,
            truth=functools.partial(_sample, backend=truth),
            modes=("fwd",),
            exact=True,
            landmarks=frozenset({"one forward pass", PRODUCT}),
            share={"naive": 1 / draws, "naive, compiled": 1 / draws},
            about=functools.partial(_about, backends=backends),
            batch=batch,
        )
