"""The diagonal LSTM over a map: H + W - 1 dependent steps, so bound by the time of a step, not by rates."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import references
from benchmarks.case import Case, Rivals, contenders
from benchmarks.scan_launches import diagonal_scans
from fastgen.nn import DiagonalBiLSTM
from fastgen.ops import diagonal_lstm
from fastgen.ops.diagonal_lstm import diagonal_lstm_cell, diagonal_lstm_reference

Sizes = dict[str, list[tuple[int, int, int]]]
# (B, h, N): h hidden units on N x N maps.
SIZES: Sizes = {
    "toy": [(2, 4, 5)],
    "cpu": [(16, 16, 28)],
    "cpu-full": [(16, 16, 28), (16, 64, 32)],
    "gpu": [(16, 16, 28), (16, 64, 32), (16, 128, 32), (64, 128, 32), (16, 64, 64)],
    "gpu-full": [(batch, units, n) for n in (32, 64) for units in (16, 32, 64, 128) for batch in (16, 64)],
}


def inputs(device: torch.device, batch: int, units: int, n: int, taps: int, dtype: torch.dtype) -> dict[str, Tensor]:
    gates = torch.randn(batch, 4 * units, n, n, device=device).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(4 * units, units, taps, device=device) / (taps * units) ** 0.5
    return {"gates": gates.to(dtype).requires_grad_(), "weight": weight.to(dtype).requires_grad_()}


def floor(batch: int, units: int, n: int, taps: int, storage: int) -> dict[str, Any]:
    """Read 4h gates a pixel, write h; the backward reads the gates' activations, cells and dh, and writes 4h."""
    pixels = batch * n * n
    fwd, bwd = 5 * units * storage * pixels, (9 * units * storage + 4 * units) * pixels
    flops = 2 * taps * 4 * units**2 * pixels
    return {
        "bytes": {"fwd": fwd, "bwd": bwd, "full": fwd + bwd},
        "flops": {"fwd": flops, "bwd": 2 * flops, "full": 3 * flops},
    }


def dtypes(size: str) -> list[torch.dtype]:
    return [torch.float32] if size.startswith("cpu") else [torch.float32, torch.bfloat16]


def graph_captured(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same with its launches in a CUDA graph, forward and backward; captured at the first call, for its tensors."""
    made: dict[bool, Any] = {}

    def evaluation(gates: Tensor, weight: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call(gates, weight)  # what is compiled or chosen at the first call cannot be captured
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call(gates, weight)

        def replay(gates: Tensor, weight: Tensor) -> Tensor:
            graph.replay()
            return out

        return replay

    def captured(gates: Tensor, weight: Tensor) -> Tensor:
        training = torch.is_grad_enabled()
        if training not in made:
            if training:
                made[training] = torch.cuda.make_graphed_callables(call, (gates, weight))
            else:
                made[training] = evaluation(gates, weight)
        return made[training](gates, weight)

    return captured


def on_a_gpu(
    device: torch.device,
    rivals: Rivals,
    loop: Callable[..., Tensor],
    operation: Callable[..., Tensor],
    scans: Callable[[], Mapping[str, Callable[..., Tensor]]],
) -> Rivals:
    """The rivals, on a GPU with the loop in a CUDA graph, and fastgen's launches in one; its other launches (the time
    of one replay of those stands in their rows)."""
    if device.type != "cuda":
        return rivals
    captured = {"CUDA graph of the eager loop": graph_captured(loop), "fastgen, CUDA graph": graph_captured(operation)}
    return {**rivals, **captured, **{f"fastgen, {name}": scan for name, scan in scans().items()}}


def pixel_by_pixel(gates: Tensor, weight: Tensor) -> Tensor:
    """Each pixel a matrix product of its own: what the definition's diagonals save on a CPU."""
    batch, channels, height, width = gates.shape
    outside = gates.new_zeros(batch, channels // 4)
    cell = outside.float()
    above = [outside] * width
    rows = []
    for i in range(height):
        left, cell = outside, torch.zeros_like(cell)
        for j in range(width):
            left, cell = diagonal_lstm_cell(gates[:, :, i, j], weight, above[j], left, cell)
            above[j] = left
        rows.append(torch.stack(above, 2))
    return torch.stack(rows, 2)


def cases(size: str, device: torch.device) -> list[Case]:
    found = []
    for batch, units, n in SIZES[size]:
        for dtype in dtypes(size):
            rivals: Rivals = {
                "eager, skewed": references.diagonal_lstm_skewed,
                "compiled, skewed": references.compiled(references.diagonal_lstm_skewed),
                "eager, by diagonals": diagonal_lstm_reference,
            }
            if device.type == "cpu":
                rivals["eager, by pixels"] = pixel_by_pixel
            rivals = on_a_gpu(device, rivals, references.diagonal_lstm_skewed, diagonal_lstm, diagonal_scans)
            landmark = "cuDNN LSTM of equal length" if device.type == "cuda" else "nn.LSTM of equal length"
            if size != "toy":
                rivals[landmark] = references.lstm_of_equal_length(2 * n - 1, units, device, dtype)
            found.append(
                Case(
                    op="diagonal_lstm",
                    shape=f"B={batch} h={units} {n}x{n}",
                    dtype=dtype,
                    inputs=functools.partial(inputs, batch=batch, units=units, n=n, taps=2, dtype=dtype),
                    providers=contenders(size, device, rivals, diagonal_lstm, diagonal_lstm),
                    truth=diagonal_lstm_reference,
                    kernels=("lstm/diagonal",),
                    not_compared=frozenset({landmark}),
                    batch=batch,
                    **floor(batch, units, n, 2, dtype.itemsize),
                )
            )
        found.append(layer_case(size, device, batch, units, n))
    return found


def layer_inputs(device: torch.device, batch: int, units: int, n: int, dtype: torch.dtype) -> dict[str, Any]:
    layer = DiagonalBiLSTM(2 * units, units, mask_type="B").to(device, dtype)
    x = torch.randn(batch, 2 * units, n, n, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    return {"x": x.requires_grad_(), "layer": layer, "plain": references.plain(layer)}


def plain_layer(x: Tensor, layer: nn.Module, plain: nn.Module) -> Tensor:
    return plain(x)


def fastgen_layer(x: Tensor, layer: nn.Module, plain: nn.Module) -> Tensor:
    return layer(x)


def layer_case(size: str, device: torch.device, batch: int, units: int, n: int) -> Case:
    """A Diagonal BiLSTM with its input-to-state convolutions: both directions, at the same time on a GPU."""
    dtype = torch.bfloat16 if size.startswith("gpu") else torch.float32
    providers: Rivals = {"eager, skewed": plain_layer}
    if device.type == "cuda":  # two unrolled loops: a CPU would compile for longer than all of its benchmarks take
        providers["compiled, skewed"] = references.compiled(plain_layer)
    return Case(
        op="diagonal_bilstm",
        shape=f"B={batch} h={units} {n}x{n}",
        dtype=dtype,
        inputs=functools.partial(layer_inputs, batch=batch, units=units, n=n, dtype=dtype),
        providers={**providers, "fastgen": fastgen_layer},
        truth=plain_layer,
        kernels=("lstm/diagonal", "masked_conv2d"),
        batch=batch,
    )
