"""Exact sampling of a batch of images. The baseline is one forward pass of the batch, the least work of any exact
sampler.

Analysis and the first batch, which measures the rounding of the engine, are part of the comparison and not timed. The
images of all backends must equal those of "naive" or, for large batches, of "fixed_point". The rivals in plain PyTorch
run a whole forward pass for each draw. All draws take the same time, so that one draw is timed and the row's times are
extrapolated.

Weights are scaled so that logits spread as in a trained model. With nearly equal logits, rounding would never change a
draw, and no image would have to be drawn again.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases.references import compiled
from benchmarks.cases.transformer_prior import TransformerPrior
from benchmarks.harness.case import Case, Rivals
from fastgen import Categorical, accelerate
from fastgen.models import GatedPixelCNN, PixelCNN, PixelCNNPP, PixelRNN


def plus_plus(shape: tuple[int, int, int], levels: int, **size: Any) -> PixelCNNPP:
    """The levels of a mixture of logistics are always 256."""
    return PixelCNNPP(shape, **size)


plus_plus.__name__ = "PixelCNNPP"
# The model, shape of an image, number of levels, further arguments, number of images.
Job = tuple[Callable[..., Any], tuple[int, int, int], int, dict[str, Any], int]

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
BATCHES = (16, 256, 1, 1024, 4096)
MODELS: list[tuple[Callable[..., Any], tuple[int, int, int], int, dict[str, Any]]] = [
    *((build, (1, 28, 28), levels, {}) for build in (GatedPixelCNN, PixelCNN) for levels in (256, 2)),
    (PixelCNN, (3, 32, 32), 256, {}),
    (PixelRNN, (1, 28, 28), 2, {"hidden_channels": 16, "layers": 7}),
    (plus_plus, (3, 32, 32), 256, {}),
    (TransformerPrior, (1, 16, 16), 512, {}),
]
EVERY: list[Job] = [(*model, batch) for batch in BATCHES for model in MODELS]
JOBS: dict[str, list[Job]] = {
    "toy": [
        (GatedPixelCNN, (1, 2, 2), 3, {"channels": 4, "layers": 1}, 2),
        (PixelCNN, (3, 2, 1), 3, {"channels": 3, "layers": 1}, 2),
        (PixelRNN, (1, 2, 2), 2, {"hidden_channels": 2, "layers": 1}, 2),
        (plus_plus, (3, 4, 4), 256, {"channels": 4, "layers": 1, "n_mix": 2}, 2),
        (TransformerPrior, (1, 2, 2), 3, {"width": 4, "layers": 1, "heads": 2}, 2),
    ],
    "cpu": CPU,
    "cpu-full": [
        *CPU,
        *((build, (1, 32, 32), 256, {}, 16) for build in (GatedPixelCNN, PixelCNN)),
        (PixelCNN, (3, 32, 32), 256, {}, 4),
    ],
    "gpu": GPU,
    "gpu-full": GPU + [(PixelCNN, (3, 32, 32), 256, {}, 64)] + [job for job in EVERY if job not in GPU],
}
NAIVE_DRAWS = {"cpu": 2000, "cuda": 60_000}  # batches of up to this many levels are compared with naive sampling
PRODUCT = "as many multiply-adds in one product"
COLUMNS = 256  # of the factors of PRODUCT
SPREAD = 2.0  # standard deviation of a pixel's logits


def spread_of(logits: Tensor) -> float:
    """Standard deviation of logits (B, K, ...) over the levels, averaged over all places."""
    return logits.float().std(1).mean().item()


@torch.no_grad()
def scale(model: nn.Module, x: Tensor) -> None:
    """Scales the parameters of the model's last layer so that the spread of the logits becomes SPREAD."""
    layers_in_order: list[nn.Module] = []
    layers = [layer for layer in model.modules() if isinstance(getattr(layer, "weight", None), nn.Parameter)]
    hooks = [layer.register_forward_hook(lambda layer, *_: layers_in_order.append(layer)) for layer in layers]
    factor = SPREAD / spread_of(model(x))
    for hook in hooks:
        hook.remove()
    for parameter in layers_in_order[-1].parameters(recurse=False):
        parameter.mul_(factor)


def _inputs(device: torch.device, job: Job) -> dict[str, Any]:
    build, shape, levels, size, batch = job
    generator = torch.Generator().manual_seed(0)
    model = build(shape, levels, **size).to(device).eval().requires_grad_(False)
    noise = torch.rand(model.distribution.noise_shape(batch, shape), generator=generator).to(device)
    x = torch.randint(levels, (batch, *shape), generator=generator).to(device)
    if isinstance(model.distribution, Categorical):
        scale(model, x[:8])
    # Each backend analyses the model once, when it is first used.
    sampler = functools.cache(lambda name: accelerate(model, shape, distribution=model.distribution, backend=name))
    factors = functools.cache(lambda: _factors(sampler, batch, device))
    return {"model": model, "x": x, "noise": noise, "sampler": sampler, "factors": factors}


def one_pass(model: nn.Module, x: Tensor, **others: Any) -> Tensor:
    return model(x)


def _sample(noise: Tensor, sampler: Any, *, backend: str, **others: Any) -> Tensor:
    return sampler(backend).sample(len(noise), noise=noise)


def channels_of_a_pass(build: Any, shape: tuple[int, int, int]) -> int:
    """How many channels of a pixel are drawn of one output: all of a mixture, which orders the colours itself."""
    return shape[0] if build is plus_plus else 1


def _one_draw(model: Any, x: Tensor, noise: Tensor, *, channels: int, **others: Any) -> Tensor:
    """The first draws by the usual loop, which runs a whole forward pass for every so many channels."""
    levels = torch.zeros_like(x)
    params = model(levels)[..., 0, 0]
    for channel in range(channels):
        before = levels[:, :channel, 0, 0]
        levels[:, channel, 0, 0] = model.distribution.draw(params, noise[..., 0, 0], channel, before)
    return levels


def _factors(sampler: Any, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two matrices whose product takes as many multiply-adds as sampling the batch; (1, COLUMNS) if the backend does
    not state the number."""
    stated = re.search(r"(\S+) million multiply-adds an image", sampler("auto").explain())
    rows = 1 if stated is None else max(1, round(float(stated[1]) * 1e6 * batch / COLUMNS**2))
    return torch.rand(rows, COLUMNS, device=device), torch.rand(COLUMNS, COLUMNS, device=device)


def _one_product(factors: Any, **others: Any) -> Tensor:
    """torch's matrix product with as many multiply-adds as sampling: how fast the processor could be."""
    return torch.mm(*factors())


def _about(provider: str, inputs: dict[str, Any], backends: dict[str, str]) -> dict[str, Any]:
    """Further fields of the row: the sampler's work ratio and statistics."""
    if provider not in backends:
        return {}
    sampler = inputs["sampler"](backends[provider])
    stats = getattr(sampler, "stats", None)
    return {"work_ratio": sampler.work_ratio, "stats": stats if stats is None else {**vars(stats)}}


def cases(size: str, device: torch.device) -> Iterator[Case]:
    cuda = device.type == "cuda"
    for job in JOBS[size]:
        build, shape, levels, arguments, batch = job
        draws, channels = math.prod(shape), channels_of_a_pass(build, shape)
        one_draw = functools.partial(_one_draw, channels=channels)
        backends = {"fastgen": "auto", "fastgen, persistent": "persistent"}
        if size != "gpu":
            backends = {"fixed_point": "fixed_point", **backends, "eager": "eager"}
        providers: Rivals = {"one forward pass": one_pass, PRODUCT: _one_product, "naive": one_draw}
        providers |= {name: functools.partial(_sample, backend=backend) for name, backend in backends.items()}
        providers["naive, compiled"] = compiled(one_draw, "reduce-overhead" if cuda else None)
        sizes = "".join(f" {key}={value}" for key, value in arguments.items())
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
            share=dict.fromkeys(("naive", "naive, compiled"), channels / draws),
            about=functools.partial(_about, backends=backends),
            batch=batch,
        )
