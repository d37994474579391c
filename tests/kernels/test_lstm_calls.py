"""What the host does for a call of a scan."""

import json
import os
import subprocess
import sys

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


WHOLE_MODEL = """
import collections, json, sys
from unittest import mock
import torch
from benchmarks.host import mocked
from fastgen.models import PixelRNN

model = PixelRNN((1, 6, 6), levels=2, hidden_channels=128, layers=12, head_channels=32)
for module in ("nn.masked_conv", "ops.masked_conv2d", "ops._lstm"):
    mock.patch.object(sys.modules[f"fastgen.{module}"], "uses_triton", lambda impl, x: True).start()
with mocked() as launched:
    model(torch.zeros(2, 1, 6, 6, dtype=torch.long))
print(json.dumps(collections.Counter(launched)))
"""


def test_launches_of_a_whole_model():
    """PixelRNN of 12 layers of 128 units: one launch for each of its 24 scans, two for each of its 39 convolutions.

    In a new process, whose kernels do not run in the interpreter; launches are mocked.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", WHOLE_MODEL]
    launched = json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    scans = {name: count for name, count in launched.items() if name.startswith("lstm")}
    assert scans == {"lstm_tiles_forward_kernel": 24}
    assert sum(launched.values()) <= 24 + 2 * 39
