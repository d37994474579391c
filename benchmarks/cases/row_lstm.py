"""The Row LSTM over a map: one dependent step for each row."""

from collections.abc import Iterator

import torch

from benchmarks.cases import references, scans
from benchmarks.harness.case import Case, Rivals
from fastgen.ops import row_lstm
from fastgen.ops.row_lstm import row_lstm_reference

TAPS = 3


def cases(size: str, device: torch.device) -> Iterator[Case]:
    def rivals(units: int, n: int, dtype: torch.dtype) -> Rivals:
        loop = references.row_lstm_convolutions
        return {"eager, convolutions": loop, "compiled, convolutions": references.compiled(loop)}

    return scans.cases_of(size, device, row_lstm, row_lstm_reference, rivals, TAPS, suffix=f" k={TAPS}")
