"""The Row LSTM over a map: one dependent step a row."""

import functools

import torch

from benchmarks import references
from benchmarks.case import Case, Rivals, contenders
from benchmarks.diagonal_lstm import SIZES, dtypes, floor, inputs, on_a_gpu
from benchmarks.scan_launches import row_scans
from fastgen.ops import row_lstm
from fastgen.ops.row_lstm import row_lstm_reference

TAPS = 3


def cases(size: str, device: torch.device) -> list[Case]:
    found = []
    for batch, units, n in SIZES[size]:
        for dtype in dtypes(size):
            rival = references.row_lstm_convolutions
            rivals: Rivals = {"eager, convolutions": rival, "compiled, convolutions": references.compiled(rival)}
            rivals = on_a_gpu(device, rivals, rival, row_lstm, functools.partial(row_scans, TAPS))
            found.append(
                Case(
                    op="row_lstm",
                    shape=f"B={batch} h={units} {n}x{n} k={TAPS}",
                    dtype=dtype,
                    inputs=functools.partial(inputs, batch=batch, units=units, n=n, taps=TAPS, dtype=dtype),
                    providers=contenders(size, device, rivals, row_lstm, row_lstm),
                    truth=row_lstm_reference,
                    kernels=("lstm/row",),
                    batch=batch,
                    **floor(batch, units, n, TAPS, dtype.itemsize),
                )
            )
    return found
