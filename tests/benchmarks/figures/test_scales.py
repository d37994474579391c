import dataclasses

import pytest
from PIL import Image

from benchmarks.figures import digits, scales
from benchmarks.harness import rows
from fastgen.models import VAE, PixelCNN
from fastgen.train import Settings

pytest.importorskip("matplotlib")


def test_a_row_for_each_side_and_batch_and_a_picture_of_them(tmp_path):
    found = list(scales.measure((3, 4), (1, 2)))
    assert [(row["side"], row["batch"]) for row in found] == [(3, 1), (3, 2), (4, 1), (4, 2)]
    assert all(row["work_ratio"] == pytest.approx(1, abs=0.2) and row["sample_s"] > 0 for row in found)
    rows.save(found, tmp_path / "rows.jsonl")
    assert rows.read(tmp_path / "rows.jsonl") == found
    assert Image.open(scales.draw(found, tmp_path / "scales.png")).width > 1000


def test_models_of_digits(tmp_path):
    pytest.importorskip("sklearn")
    models = [
        (PixelCNN, {"channels": 2, "layers": 1}),
        (VAE, {"latent_dim": 2, "likelihood": "categorical", "channels": 2}),
    ]
    found = list(digits.measure(models, dataclasses.replace(digits.SETTINGS, steps=1, decay_steps=1)))
    assert [(row["model"], row["exact"]) for row in found] == [("PixelCNN", True), ("VAE", False)]
    assert all(2 < row["bits_per_dim"] < 8 and row["parameters"] > 0 for row in found)
    assert Image.open(digits.draw(found, tmp_path / "digits.png")).width > 500


def test_the_pictures_are_of_the_rows_that_are_saved():
    for module in (scales, digits):
        assert module.PICTURE.exists() and len(rows.read(module.ROWS)) > 5
    assert isinstance(digits.SETTINGS, Settings) and {row["steps"] for row in rows.read(digits.ROWS)} == {600}
