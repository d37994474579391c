"""What both scans promise alike: one graph, autocast, gradients, empty batches."""

import pytest
import torch

from fastgen.ops import diagonal_lstm, row_lstm
from tests.ops.lstm_truth import gradients, problem

pytestmark = pytest.mark.parametrize(("scan", "taps"), [(diagonal_lstm, 2), (row_lstm, 3)], ids=["diagonal", "row"])


def test_compiles_in_one_graph(scan, taps):
    gates, weight, grad = problem(2, 3, 3, 4, taps, torch.float32)
    compiled = torch.compile(scan, fullgraph=True, backend="aot_eager")
    for one, other in zip(gradients(compiled, gates, weight, grad), gradients(scan, gates, weight, grad), strict=True):
        torch.testing.assert_close(one, other)


def test_autocast_takes_its_dtype(scan, taps):
    gates, weight, grad = problem(2, 3, 3, 4, taps, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        hidden, grad_gates, grad_weight = gradients(scan, gates, weight, grad)
    assert hidden.dtype == torch.bfloat16
    assert grad_gates.dtype == grad_weight.dtype == torch.float32


@pytest.mark.parametrize("wanted", [0, 1])
def test_gradients_not_asked_for(wanted, scan, taps):
    gates, weight, grad = problem(1, 2, 3, 4, taps)
    expected = gradients(scan, gates, weight, grad)[1 + wanted]
    inputs = [gates, weight]
    inputs[wanted].requires_grad_()
    (found,) = torch.autograd.grad(scan(*inputs), inputs[wanted], grad)
    torch.testing.assert_close(found, expected)


def test_a_second_derivative_is_the_definitions_alone(scan, taps):
    gates, weight, _ = problem(2, 2, 3, 3, taps)
    gates.requires_grad_()

    def slope(**options):
        return torch.autograd.grad(scan(gates, weight, **options).sum(), gates, create_graph=True)[0]

    assert torch.autograd.grad(slope(impl="reference").square().sum(), gates)[0].abs().max() > 0
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(slope().square().sum(), gates)


def test_empty_batch(scan, taps):
    gates, weight, grad = problem(0, 2, 3, 4, taps)
    hidden, grad_gates, grad_weight = gradients(scan, gates, weight, grad)
    assert hidden.shape == (0, 2, 3, 4) and grad_gates.shape == gates.shape
    assert torch.equal(grad_weight, torch.zeros_like(weight))
