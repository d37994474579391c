"""The smallest case of a benchmark: eight squares, and providers that compute them wrongly."""

import torch

from benchmarks.harness.case import Case


def square(x):
    return x * x


def out_of_memory(x):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")


def case(providers, shape="8", **options):
    """A case of squares with the baseline "eager" and these providers."""
    return Case(
        op="square",
        shape=shape,
        dtype=torch.float32,
        inputs=lambda device: {"x": torch.linspace(1, 2, 8, device=device).requires_grad_()},
        providers={"eager": square, **providers},
        truth=square,
        bytes=(64, 0),
        batch=8,
        **options,
    )
