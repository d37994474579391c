"""The benchmarks' scans with other launches: they must be the operation, or a comparison says nothing."""

import functools

import pytest
import torch

pytest.importorskip("triton")
from benchmarks.cases.scan_launches import diagonal_scans, row_scans
from fastgen.ops import diagonal_lstm, row_lstm
from tests.ops.lstm_truth import gradients

SCANS = {"diagonal": (diagonal_scans, 2, diagonal_lstm), "row": (functools.partial(row_scans, 3), 3, row_lstm)}


@pytest.mark.parametrize("kind", SCANS)
@pytest.mark.parametrize("name", ["one launch by tiles"])
def test_are_the_operation_forward_and_backward(kind, name):
    make, taps, operation = SCANS[kind]
    scan = make()[name].keywords["scan"]
    gates, weight, grad = torch.randn(2, 12, 2, 3), torch.randn(12, 3, taps), torch.randn(2, 3, 2, 3)
    found, expected = (gradients(call, gates, weight, grad) for call in (scan, operation))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scan(gates, weight), expected[0], rtol=1e-5, atol=1e-5)
