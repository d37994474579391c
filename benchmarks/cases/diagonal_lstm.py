"""The diagonal LSTM over a map: H + W - 1 dependent steps. The latency of a step limits it, not bandwidth or
arithmetic."""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import references, scans
from benchmarks.harness.case import Case, Rivals
from fastgen.nn import DiagonalBiLSTM
from fastgen.ops import diagonal_lstm
from fastgen.ops.diagonal_lstm import diagonal_lstm_cell, diagonal_lstm_reference


def pixel_by_pixel(gates: Tensor, weight: Tensor) -> Tensor:
    """The diagonal LSTM with a matrix product for each pixel; the definition computes a diagonal at once."""
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


def cases(size: str, device: torch.device) -> Iterator[Case]:
    cuda = device.type == "cuda"
    landmark = "cuDNN LSTM of equal length" if cuda else "nn.LSTM of equal length"

    def rivals(units: int, n: int, dtype: torch.dtype) -> Rivals:
        loop = references.diagonal_lstm_skewed
        providers: Rivals = {"eager, skewed": loop, "compiled, skewed": references.compiled(loop)}
        providers["eager, by diagonals"] = diagonal_lstm_reference
        if not cuda:
            providers["eager, by pixels"] = pixel_by_pixel
        if size != "toy":
            providers[landmark] = references.lstm_of_equal_length(2 * n - 1, units, device, dtype)
        return providers

    yield from scans.cases_of(size, device, diagonal_lstm, diagonal_lstm_reference, rivals, 2, landmark)
    yield from (_layer(size, device, *sizes) for sizes in scans.SIZES[size])


def _layer_inputs(device: torch.device, batch: int, units: int, n: int, dtype: torch.dtype) -> dict[str, Any]:
    layer = DiagonalBiLSTM(2 * units, units, mask_type="B").to(device, dtype)
    x = torch.randn(batch, 2 * units, n, n, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    return {"x": x.requires_grad_(), "layer": layer, "plain": references.plain(layer)}


def _plain(x: Tensor, layer: nn.Module, plain: nn.Module) -> Tensor:
    return plain(x)


def _fastgen(x: Tensor, layer: nn.Module, plain: nn.Module) -> Tensor:
    return layer(x)


def _layer(size: str, device: torch.device, batch: int, units: int, n: int) -> Case:
    """A Diagonal BiLSTM with its input-to-state convolutions. On a GPU both directions run at the same time."""
    dtype = torch.bfloat16 if size.startswith("gpu") else torch.float32
    providers: Rivals = {"eager, skewed": _plain}
    if device.type == "cuda":  # on a CPU, compiling two unrolled loops takes longer than all other benchmarks
        providers["compiled, skewed"] = references.compiled(_plain)
    return Case(
        op="diagonal_bilstm",
        shape=f"B={batch} h={units} {n}x{n}",
        dtype=dtype,
        inputs=functools.partial(_layer_inputs, batch=batch, units=units, n=n, dtype=dtype),
        providers={**providers, "fastgen": _fastgen},
        truth=_plain,
        batch=batch,
    )
