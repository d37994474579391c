"""What the host does for a call of a scan."""

import pytest
import torch

pytest.importorskip("triton")
from fastgen.kernels.lstm import diagonal as diagonal_kernels
from fastgen.kernels.lstm.choice import ScanLaunch
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
