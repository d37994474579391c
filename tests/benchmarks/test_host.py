"""The host's time for a call, measured with a mocked driver."""

import os
import subprocess
import sys

import pytest

from benchmarks import host
from benchmarks.harness import machine, rows

pytest.importorskip("triton")


FEW = """
import sys
from benchmarks import __main__, host
host.WARM = host.CALLS = host.TURNS = 2
sys.exit(__main__.main(["host", "--results", sys.argv[1]]))
"""


def test_every_operation_has_a_row_with_its_launches(tmp_path):
    """In a new process, whose kernels do not run in the interpreter, with few calls."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", FEW, str(tmp_path)]
    done = subprocess.run(command, cwd=machine.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {(row["op"], row["shape"], row["mode"]): row for row in rows.load(tmp_path)}
    assert len(found) == 2 * len(host.cases())
    for (op, _, mode), row in found.items():
        assert 1 < row["host_us"] < 1e6 and row["provider"] == host.PROVIDER and row["ms_p50"] is None
        assert row["kernels"] and row["kernel_sha256"] and row["threads"] == 1, (op, mode)
        assert row["launches"] >= (2 if mode == "full" else 1) and row["launched"]
    one, many = (found["diagonal_lstm", f"2x{units}x8x8", "fwd"]["launches"] for units in (16, 128))
    assert one == many == 1  # so that PixelRNN's 12 layers of 128 units launch 24 scans


def test_kernels_in_the_interpreter_are_refused():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), host.mocked():
        pass
