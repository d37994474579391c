"""Negative log-likelihoods of images: Bernoulli, Gaussian, softmax over 256 levels, mixture of logistics."""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.cases import references
from benchmarks.harness.case import Case, Rivals, contenders
from fastgen.ops import reconstruction_nll
from fastgen.ops.reconstruction_nll import reconstruction_nll_reference

RIVALS = {
    "bernoulli": references.bernoulli_nll,
    "gaussian": references.gaussian_nll,
    "categorical": references.categorical_nll,
    "logistic_mixture": references.logistic_mixture_nll,
}
# Further rivals: torch.distributions, and torch's own loss if the first rival does not use it.
OTHERS: dict[str, Rivals] = {
    "bernoulli": {"distributions": references.bernoulli_nll_distributions},
    "gaussian": {
        "distributions": references.gaussian_nll_distributions,
        "F.gaussian_nll_loss": references.gaussian_nll_torch,
    },
    "categorical": {"distributions": references.categorical_nll_distributions},
    "logistic_mixture": {},
}
Image = tuple[int, ...]  # (B, C, H, W)
CPU: list[tuple[str, Image]] = [("bernoulli", (256, 1, 28, 28))]
CPU += [("categorical", (8, 3, 32, 32)), ("logistic_mixture", (8, 3, 32, 32))]
IMAGES: dict[str, list[tuple[str, Image]]] = {
    "toy": [(likelihood, (2, 3, 3, 5)) for likelihood in RIVALS],
    "cpu": CPU,
    "cpu-full": CPU,
    "gpu": [
        ("bernoulli", (256, 1, 28, 28)),
        ("gaussian", (256, 3, 32, 32)),
        *((likelihood, (64, 3, 32, 32)) for likelihood in ("categorical", "logistic_mixture")),
    ],
    "gpu-full": [
        (likelihood, (batch, 3, side, side)) for likelihood in RIVALS for side in (32, 64) for batch in (64, 256)
    ],
}


def inputs(device: torch.device, likelihood: str, image: Image, dtype: torch.dtype) -> dict[str, Tensor]:
    batch, channels, height, width = image
    per_pixel = {"bernoulli": channels, "gaussian": 2 * channels, "logistic_mixture": 100 if channels == 3 else 30}
    sizes = (256, channels) if likelihood == "categorical" else (per_pixel[likelihood],)
    params = torch.randn(batch, *sizes, height, width, device=device)
    if (
        likelihood == "logistic_mixture"
    ):  # log-scales as in a trained model: wider than a level, narrower than the range
        params[:, 10:].view(batch, channels, -1, 10, height, width)[:, :, 1] -= 3
    target = torch.randint(2 if likelihood == "bernoulli" else 256, image, device=device, dtype=torch.uint8)
    if likelihood == "gaussian":
        target = target.float() / 127.5 - 1
    return {"params": params.to(dtype).requires_grad_(), "target": target}


def cases(size: str, device: torch.device) -> Iterator[Case]:
    dtypes = [torch.float32, torch.bfloat16] if size.startswith("gpu") else [torch.float32]
    for likelihood, image in IMAGES[size]:
        operation = functools.partial(reconstruction_nll, likelihood=likelihood)
        definition = functools.partial(reconstruction_nll_reference, likelihood=likelihood)
        for dtype in dtypes:
            case_inputs = functools.partial(inputs, likelihood=likelihood, image=image, dtype=dtype)
            params, target = (x.numel() * x.dtype.itemsize for x in case_inputs(torch.device("meta")).values())
            rivals = {**references.rivals_of(RIVALS[likelihood]), **OTHERS[likelihood]}
            yield Case(
                op="reconstruction_nll",
                shape=f"{likelihood} {'x'.join(map(str, image))}",
                dtype=dtype,
                inputs=case_inputs,
                providers=contenders(size, device, rivals, operation, definition),
                truth=definition,
                # The backward reads the parameters again and writes their gradient.
                bytes=(params + target, 2 * params + target),
                batch=image[0],
            )
