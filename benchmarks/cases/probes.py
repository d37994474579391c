"""The cost of steps that do almost nothing: a node of a CUDA graph, a barrier between programs, an instruction of the
sampler. The times in a row are those of one step."""

import functools
import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.case import INTERPRETED, Case, Rivals

TOY = 3
PARTS = {"toy": TOY, "cpu": TOY, "cpu-full": TOY, "gpu": 1000, "gpu-full": 1000}
ROWS = 16  # of a product: the least that tensor cores compute
WIDTHS = {"toy": (16,), "gpu": (128, 256), "gpu-full": (64, 128, 256)}


def kernels() -> Any:
    """The module of the kernels, imported late: it needs Triton."""
    return importlib.import_module("benchmarks.cases.probe_kernels")


def _programs(device: torch.device) -> int:
    """One program for each multiprocessor, so that all run at the same time; in the interpreter, which runs programs
    one after the other, a single one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def add_ones(x: Tensor, parts: int) -> Tensor:
    for _ in range(parts):
        x = x + 1
    return x


def pass_around(x: Tensor, parts: int) -> Tensor:
    """In every part, each program takes its neighbour's value and adds one."""
    for _ in range(parts):
        x = x.roll(-1) + 1
    return x


def products(x: Tensor, weights: Tensor, parts: int) -> Tensor:
    """A chain of products: x (rows, K) times each of the weights (n, K, K) in turn."""
    for part in range(parts):
        x = (x.double() @ weights[part % len(weights)].double()).relu().to(x.dtype)
    return x


def add_ones_by_kernels(x: Tensor, parts: int) -> Tensor:
    out, add_one = x.clone(), kernels().add_one
    for _ in range(parts):
        add_one[(1,)](out, SIZE=len(x), num_warps=1)
    return out


def pass_around_in_one_launch(x: Tensor, parts: int) -> Tensor:
    out, arrived = torch.stack((x, torch.empty_like(x))), torch.zeros(1, dtype=torch.int32, device=x.device)
    together = {"launch_cooperative_grid": True} if x.is_cuda and torch.version.hip is None else {}
    kernels().pass_to_the_neighbour[(len(x),)](out, arrived, parts, len(x), num_warps=4, **together)
    return out[parts % 2]


def products_in_one_program(x: Tensor, weights: Tensor, parts: int) -> Tensor:
    out = x.clone()
    options = {"ROWS": len(x), "K": x.shape[1], "DISTINCT": len(weights), "num_warps": 4, "num_stages": 1}
    kernels().instructions[(1,)](out, weights, parts, **options)
    return out


def _counters(device: torch.device, count: int | None, parts: int) -> dict[str, Any]:
    return {"x": torch.arange(count or _programs(device), dtype=torch.float32, device=device), "parts": parts}


def _factors(device: torch.device, width: int, parts: int, dtype: torch.dtype) -> dict[str, Any]:
    """24 weights, which together fit into the L2 cache but not into L1. They are scaled so that values neither grow nor
    vanish."""
    weights = torch.randn(24, width, width, device=device) * (2 / width) ** 0.5
    return {"x": torch.rand(ROWS, width, device=device).to(dtype), "weights": weights.to(dtype), "parts": parts}


def cases(size: str, device: torch.device) -> Iterator[Case]:
    parts, cuda = PARTS[size], device.type == "cuda"
    half = torch.bfloat16 if cuda else torch.float32  # Triton's interpreter multiplies bfloat16 wrongly

    def probe(shape: str, dtype: torch.dtype, inputs: Any, plain: Any, kernel: Any, **more: Any) -> Case:
        providers: Rivals = {"eager": plain, "fastgen" if cuda else f"fastgen, {INTERPRETED}": kernel}
        share = dict.fromkeys(providers, parts)
        return Case("probes", shape, dtype, inputs, providers, plain, modes=("fwd",), share=share, **more)

    counters = functools.partial(_counters, count=32, parts=parts)
    around = functools.partial(_counters, count=None, parts=parts)
    yield probe(f"{parts} launches, one after the other", torch.float32, counters, add_ones, add_ones_by_kernels)
    yield probe(f"{parts} barriers between all", torch.float32, around, pass_around, pass_around_in_one_launch)
    for width in WIDTHS.get(size, WIDTHS["toy"]):
        shape = f"{parts} products {ROWS}x{width} by {width}x{width} in one program"
        factors = functools.partial(_factors, width=width, parts=parts, dtype=half)
        yield probe(shape, half, factors, products, products_in_one_program, flops=(2 * ROWS * width**2, 0))
