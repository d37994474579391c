"""What the host does for a call of a scan."""

import pytest
import torch

pytest.importorskip("triton")
from fastgen.kernels.lstm import diagonal as diagonal_kernels
from fastgen.kernels.lstm.choice import ScanLaunch
from fastgen.ops import diagonal_lstm, row_lstm
from tests.ops.lstm_truth import problem


def test_calls_of_one_kind_are_planned_once(device, monkeypatch):
    """By sizes, strides, dtypes, alignment, options and PyTorch's setting; the chooser is asked for each plan."""
    gates, weight, grad = problem(2, 3, 4, 3, 2, torch.float32, device)
    asked = []

    def chooser(*args, **options):
        asked.append(options)
        return ScanLaunch(4, 4, 16, 1, 4)

    def run(gates=gates, weight=weight, reverse=False, save=True):
        results = diagonal_kernels.forward(gates, weight, reverse, save=save, choice=chooser)
        return len(asked), diagonal_kernels.backward(grad, *results[1:], weight, reverse, choice=chooser) if save else 0

    first, expected = run()
    assert first == 1 and len(asked) == 2
    for _ in range(3):
        assert run()[0] == 2 and torch.equal(run()[1], expected)
    wide = torch.empty(weight.numel() + 1, device=device)[1:].view(weight.shape).copy_(weight)
    others = (
        {"gates": gates.clone(memory_format=torch.channels_last)},
        {"weight": wide},
        {"reverse": True},
        {"save": False},
    )
    for other in others:
        before = len(asked)
        assert run(**other)[0] == before + 1, other.keys()
    monkeypatch.setattr("fastgen.kernels.lstm.calls.tf32_allowed", lambda: True)
    before = len(asked)
    assert run()[0] == before + 1


@pytest.mark.parametrize("trains", [False, True])
def test_a_call_of_a_new_kind_is_checked(trains, device):
    gates, weight, _ = problem(1, 2, 3, 4, 3, torch.float32, device)
    gates.requires_grad_(trains)
    row_lstm(gates, weight, impl="triton")
    diagonal_lstm(gates, weight[..., :2], impl="triton")
    with pytest.raises(ValueError, match="odd number of taps"):
        row_lstm(gates, weight[..., :2], impl="triton")
    with pytest.raises(ValueError, match="two taps"):
        diagonal_lstm(gates, weight, impl="triton")
    with pytest.raises(ValueError, match="gates must have the shape"):
        row_lstm(gates[:, :7], weight, impl="triton")
    with pytest.raises(TypeError, match="same dtype"):
        row_lstm(gates, weight.half(), impl="triton")
