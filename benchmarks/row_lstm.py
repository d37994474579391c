"""The Row LSTM over a map: one dependent step a row."""

import functools

import torch

from benchmarks import references
from benchmarks.case import Case, Rivals, contenders
from benchmarks.diagonal_lstm import Sizes, dtypes, floor, inputs, on_a_gpu
from fastgen.ops import row_lstm
from fastgen.ops.row_lstm import row_lstm_reference

TAPS = 3
# (B, h, N): h hidden units on N x N maps.
SIZES: Sizes = {
    "toy": [(2, 4, 5)],
    "cpu": [(16, 16, 28)],
    "cpu-full": [(16, 16, 28), (16, 64, 32)],
    "gpu": [(16, 16, 28), (16, 64, 32), (16, 128, 32), (64, 128, 32), (16, 64, 64)],
    "gpu-full": [(batch, units, n) for n in (32, 64) for units in (16, 32, 64, 128) for batch in (16, 64)],
}


def cases(size: str, device: torch.device) -> list[Case]:
    found = []
    for batch, units, n in SIZES[size]:
        for dtype in dtypes(size):
            rival = references.row_lstm_convolutions
            rivals: Rivals = {"eager, convolutions": rival, "compiled, convolutions": references.compiled(rival)}
            rivals = on_a_gpu(device, rivals, rival, row_lstm)
            found.append(
                Case(
                    op="row_lstm",
                    shape=f"B={batch} h={units} {n}x{n} k={TAPS}",
                    dtype=dtype,
                    inputs=functools.partial(inputs, batch=batch, units=units, n=n, taps=TAPS, dtype=dtype),
                    providers=contenders(size, device, rivals, row_lstm, row_lstm),
                    truth=row_lstm_reference,
                    kernels=("row_lstm",),
                    batch=batch,
                    **floor(batch, units, n, TAPS, dtype.itemsize),
                )
            )
    return found
