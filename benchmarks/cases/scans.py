"""What the benchmarks of the diagonal LSTM and of the Row LSTM share: sizes, inputs, cases and variants of the
launch."""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.case import Case, Rivals, contenders

Scan = Callable[..., Any]
# (B, h, N): h hidden units on N x N maps.
SIZES: dict[str, list[tuple[int, int, int]]] = {
    "toy": [(2, 4, 5)],
    "cpu": [(16, 16, 28)],
    "cpu-full": [(16, 16, 28), (16, 64, 32)],
    "gpu": [(16, 16, 28), (16, 64, 32), (16, 128, 32), (64, 128, 32), (16, 64, 64)],
    "gpu-full": [(batch, units, n) for n in (32, 64) for units in (16, 32, 64, 128) for batch in (16, 64)],
}


def inputs(device: torch.device, sizes: tuple[int, int, int, int], taps: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """sizes: batch, hidden units, height, width."""
    batch, units, height, width = sizes
    gates = torch.randn(batch, 4 * units, height, width, device=device).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(4 * units, units, taps, device=device) / (taps * units) ** 0.5
    return {"gates": gates.to(dtype).requires_grad_(), "weight": weight.to(dtype).requires_grad_()}


def cases_of(
    size: str,
    device: torch.device,
    operation: Scan,
    definition: Scan,
    rivals: Callable[[int, int, torch.dtype], Rivals],
    taps: int,
    landmark: str = "",
    suffix: str = "",
) -> Iterator[Case]:
    """A case for each size and dtype.

    Args:
        operation, definition: fastgen's operation and its definition in PyTorch.
        rivals: function of (units, n, dtype) that returns the rivals. The first is a loop, which is also captured in a
            CUDA graph on a GPU.
        taps: taps of the recurrent weight.
        landmark: name of the rival that is a landmark, if any.
        suffix: end of the text of the size.
    """
    for batch, units, n in SIZES[size]:
        for dtype in [torch.float32] if size.startswith("cpu") else [torch.float32, torch.bfloat16]:
            providers = rivals(units, n, dtype)
            providers["CUDA graph of the eager loop"] = graph_captured(next(iter(providers.values())))
            providers["fastgen, CUDA graph"] = graph_captured(operation)
            providers["fastgen, by tiles"] = by_tiles(operation)
            # For each pixel the forward reads 4h gates and writes h. The backward reads 4h activations, the gradient of
            # h and h cells in float32, and writes 4h gradients.
            pixels, storage = batch * n * n, dtype.itemsize
            flops = 2 * taps * 4 * units**2 * pixels
            yield Case(
                op=operation.__name__,
                shape=f"B={batch} h={units} {n}x{n}{suffix}",
                dtype=dtype,
                inputs=functools.partial(inputs, sizes=(batch, units, n, n), taps=taps, dtype=dtype),
                providers=contenders(size, device, providers, operation, operation),
                truth=definition,
                landmarks=frozenset({landmark}),
                batch=batch,
                bytes=(5 * units * storage * pixels, (9 * units * storage + 4 * units) * pixels),
                flops=(flops, 2 * flops),
            )


def graph_captured(call: Scan) -> Scan:
    """The scan with its launches in CUDA graphs, forward and backward, which are captured at the first call."""
    graphs: dict[bool, Scan] = {}  # by whether gradients are recorded

    def captured(*tensors: Tensor) -> Tensor:
        training = torch.is_grad_enabled()
        if not training:
            tensors = tuple(tensor.detach() for tensor in tensors)
        if training not in graphs:
            graphs[training] = torch.cuda.make_graphed_callables(call, tensors)
        return graphs[training](*tensors)

    return lambda gates, weight: captured(gates, weight)


@contextmanager
def tiles() -> Iterator[None]:
    """Inside, all scans are launched by tiles, the variant that fastgen chooses for many units."""
    from unittest import mock

    from fastgen.kernels.lstm import choice, diagonal, row

    with ExitStack() as stack:
        for module in (diagonal, row):
            stack.enter_context(mock.patch.object(module, "choose", choice.scan_by_tiles))
        yield


class ByTiles(torch.autograd.Function):
    """A scan by tiles whose backward also runs by tiles: it is launched inside `tiles`, too."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, weight: Tensor, operation: Scan) -> Tensor:
        ctx.inner = (gates.detach().requires_grad_(), weight.detach().requires_grad_())
        with torch.enable_grad(), tiles():
            ctx.out = operation(*ctx.inner)
        return ctx.out.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with tiles():
            return *torch.autograd.grad(ctx.out, ctx.inner, grads, retain_graph=True), None


def by_tiles(operation: Scan) -> Scan:
    """The scan launched by tiles, forward and backward."""

    def scan(gates: Tensor, weight: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return ByTiles.apply(gates, weight, operation)
        with tiles():
            return operation(gates, weight)

    return scan
