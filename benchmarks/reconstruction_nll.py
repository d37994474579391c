"""Negative log-likelihoods of images: Bernoulli, Gaussian, softmax over 256 levels, mixture of logistics."""

import functools

import torch
from torch import Tensor

from benchmarks import references
from benchmarks.case import Case, Rivals, contenders
from fastgen.ops import reconstruction_nll
from fastgen.ops.reconstruction_nll import reconstruction_nll_reference

# Modules of the kernels package.
KERNELS = {
    "bernoulli": "likelihood/pointwise",
    "gaussian": "likelihood/pointwise",
    "categorical": "likelihood/categorical",
    "logistic_mixture": "likelihood/mixture",
}
RIVALS = {
    "bernoulli": references.bernoulli_nll,
    "gaussian": references.gaussian_nll,
    "categorical": references.categorical_nll,
    "logistic_mixture": references.logistic_mixture_nll,
}
OTHERS: dict[
    str, Rivals
] = {  # the same by torch.distributions, and by torch's own loss where that is not what the first rival is
    "bernoulli": {"distributions": references.bernoulli_nll_distributions},
    "gaussian": {
        "distributions": references.gaussian_nll_distributions,
        "F.gaussian_nll_loss": references.gaussian_nll_torch,
    },
    "categorical": {"distributions": references.categorical_nll_distributions},
    "logistic_mixture": {},
}
# (B, C, H, W) images; the parameters follow from the likelihood.
Image = tuple[int, ...]
CONFIGURATIONS: dict[str, list[tuple[str, Image]]] = {
    "toy": [(likelihood, (2, 3, 3, 5)) for likelihood in RIVALS],
    "cpu": [
        ("bernoulli", (256, 1, 28, 28)),
        ("categorical", (8, 3, 32, 32)),
        ("logistic_mixture", (8, 3, 32, 32)),
    ],
    "gpu": [
        ("bernoulli", (256, 1, 28, 28)),
        ("gaussian", (256, 3, 32, 32)),
        ("categorical", (64, 3, 32, 32)),
        ("logistic_mixture", (64, 3, 32, 32)),
    ],
    "gpu-full": [
        (likelihood, (batch, 3, side, side)) for likelihood in RIVALS for side in (32, 64) for batch in (64, 256)
    ],
}


def _parameters(likelihood: str, image: Image) -> tuple[int, ...]:
    batch, channels, height, width = image
    if likelihood == "categorical":
        return (batch, 256, channels, height, width)
    per_pixel = {"bernoulli": channels, "gaussian": 2 * channels, "logistic_mixture": 100}[likelihood]
    return (batch, per_pixel, height, width)


def likelihood_inputs(device: torch.device, likelihood: str, image: Image, dtype: torch.dtype) -> dict[str, Tensor]:
    params = torch.randn(_parameters(likelihood, image), device=device)
    if likelihood == "logistic_mixture":  # log-scales of a trained model; wider than a pixel, narrower than the range
        params[:, 10:].view(image[0], 3, 3, 10, *image[2:])[:, :, 1] -= 3
    top = {"bernoulli": 2, "gaussian": 256}.get(likelihood, 256)
    target = torch.randint(top, image, device=device, dtype=torch.uint8)
    if likelihood == "gaussian":
        return {"params": params.to(dtype).requires_grad_(), "target": target.float() / 127.5 - 1}
    return {"params": params.to(dtype).requires_grad_(), "target": target}


def cases(size: str, device: torch.device) -> list[Case]:
    dtypes = [torch.float32, torch.bfloat16] if size in ("toy", "gpu-full") else [torch.float32]
    found = []
    for likelihood, image in CONFIGURATIONS.get(size, CONFIGURATIONS[size.removesuffix("-full")]):
        for dtype in dtypes:
            rival = RIVALS[likelihood]
            rivals: Rivals = {"eager": rival, "compiled": references.compiled(rival), **OTHERS[likelihood]}
            if device.type == "cuda":
                rivals["compiled reduce-overhead"] = references.compiled(rival, "reduce-overhead")
            params = torch.Size(_parameters(likelihood, image)).numel() * dtype.itemsize
            target = torch.Size(image).numel() * (4 if likelihood == "gaussian" else 1)
            found.append(
                Case(
                    op="reconstruction_nll",
                    shape=f"{likelihood} {'x'.join(map(str, image))}",
                    dtype=dtype,
                    inputs=functools.partial(likelihood_inputs, likelihood=likelihood, image=image, dtype=dtype),
                    providers=contenders(
                        size,
                        device,
                        rivals,
                        functools.partial(reconstruction_nll, likelihood=likelihood),
                        functools.partial(reconstruction_nll_reference, likelihood=likelihood),
                    ),
                    truth=functools.partial(reconstruction_nll_reference, likelihood=likelihood),
                    kernels=(KERNELS[likelihood],),
                    # The backward reads the parameters again and writes their gradient.
                    bytes={"fwd": params + target, "bwd": 2 * params + target, "full": 3 * params + 2 * target},
                    batch=image[0],
                )
            )
    return found
