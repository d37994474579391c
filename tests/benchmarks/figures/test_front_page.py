import json

import pytest
import torch
from PIL import Image

from benchmarks.figures import front_page
from fastgen.plots import image_grid

pytest.importorskip("matplotlib")


def test_the_picture_holds_its_numbers(tmp_path):
    numbers = {"date": "2030-01-02", "device": "cpu", "threads": 1, "sampling_batch": 4, "naive_seconds": 6.0}
    numbers |= {"fast_seconds": 0.1, "samples_identical": True, "versions": {"torch": "9"}, "test_accuracy": 0.5}
    image_grid(torch.randint(3, (4, 1, 5, 5)), 3, tmp_path / "samples.png", columns=2)
    (tmp_path / "report.json").write_text(json.dumps(numbers))
    written = front_page.draw(tmp_path, tmp_path / "new" / "front.png")
    kept = json.loads(Image.open(written).text["Description"])
    assert kept == {key: value for key, value in numbers.items() if key != "test_accuracy"}
    (tmp_path / "report.json").write_text(json.dumps({**numbers, "samples_identical": False}))
    with pytest.raises(ValueError, match="differ"):
        front_page.draw(tmp_path, tmp_path / "front.png")
