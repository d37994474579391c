"""Figures that are drawn from saved rows."""

import pytest

from benchmarks.figures import plots
from tests.benchmarks.harness.test_rows import OP, row


def test_plots_are_drawn_from_rows(tmp_path):
    pytest.importorskip("matplotlib")
    saved = [
        row(),
        row(shape="64x4096", batch=64, ms_p50=0.3, bytes=50, times_baseline=None),
        row(gpu=None, threads=2, ms_p50=None, problem="oom"),
    ]
    files = plots.draw(saved, tmp_path)
    assert sorted(file.name for file in files) == [
        f"{OP}-batch.png",
        f"{OP}-size.png",
        f"{OP}.png",
        "roofline.png",
    ]
    assert all(file.parent.name == "Imaginary-1" and file.stat().st_size > 1000 for file in files)
    with pytest.raises(ValueError, match="no saved row has a time"):
        plots.draw([row(ms_p50=None)], tmp_path)
