"""Variants of the benchmarks' scans that are launched otherwise compute the same as the operation."""

import functools

import pytest
import torch

pytest.importorskip("triton")
from benchmarks.cases import scans
from benchmarks.harness import launches
from fastgen.ops import diagonal_lstm, row_lstm
from tests.ops.lstm_truth import gradients

TAPS = {diagonal_lstm: 2, row_lstm: 3}


@pytest.mark.parametrize("operation", TAPS)
def test_by_tiles_is_the_operation_forward_and_backward(operation):
    scan = scans.by_tiles(functools.partial(operation, impl="triton"))
    weight = torch.randn(12, 3, TAPS[operation])
    gates, grad = torch.randn(2, 12, 2, 3), torch.randn(2, 3, 2, 3)
    with launches.recorded() as launched:
        found = gradients(scan, gates, weight, grad)
    assert sorted(launched) == ["lstm_tiles_backward_kernel", "lstm_tiles_forward_kernel"]
    expected = gradients(operation, gates, weight, grad)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(scan(gates, weight), expected[0], rtol=1e-5, atol=1e-5)
