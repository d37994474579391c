"""Pictures show the right pixels in the right places, and are written atomically."""

import errno
import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fastgen import plots


def pixels(path):
    return np.asarray(Image.open(path))


def test_a_grid_shows_every_pixel_in_its_place(tmp_path):
    images = torch.randint(4, (5, 1, 3, 2))
    plots.image_grid(images, 4, tmp_path / "a.png", columns=2)
    sheet, scale = pixels(tmp_path / "a.png"), 16
    assert sheet.shape == (3 * (48 + 2) + 2, 2 * (32 + 2) + 2, 3)
    for index in range(5):
        top, left = 2 + index // 2 * 50, 2 + index % 2 * 34
        tile = sheet[top : top + 48, left : left + 32]
        expected = (images[index, 0].double() * 85).numpy().repeat(scale, 0).repeat(scale, 1)
        assert (tile == expected[..., None]).all()
    assert (sheet[102:150, 36:68] == 255).all()  # there is no sixth image


def test_colours_hidden_parts_and_names(tmp_path):
    images = torch.randint(256, (2, 3, 64, 60))
    hidden = torch.zeros(1, 1, 64, 1, dtype=torch.bool)
    hidden[:, :, 40:] = True
    plots.image_grid(images, 256, tmp_path / "a.png", columns=1, hidden=hidden, row_names=["one", "two"])
    sheet = pixels(tmp_path / "a.png")
    left = sheet.shape[1] - 62
    for index, top in enumerate((2, 68)):
        tile = sheet[top : top + 64, left : left + 60]
        assert np.array_equal(tile[:40], images[index, :, :40].permute(1, 2, 0).numpy())
        assert (tile[40:] == plots.HIDDEN).all()
        assert (sheet[top : top + 64, :left] < 200).any()  # the name


def test_floats_are_limited_to_the_range(tmp_path):
    plots.image_grid(torch.tensor([-5.0, 1.5, 99.0]).view(1, 1, 1, 3), 4, tmp_path / "a.png", columns=1)
    assert pixels(tmp_path / "a.png")[10, [2 + 8, 2 + 24, 2 + 40], 0].tolist() == [0, 128, 255]


def test_other_numbers_of_channels_stand_side_by_side(tmp_path):
    images = torch.tensor([[0, 1], [1, 0]]).view(1, 2, 1, 2).expand(2, 2, 3, 2)
    plots.image_grid(images, 2, tmp_path / "a.png", columns=1, hidden=torch.tensor([False, True]).view(2, 1, 1, 1))
    sheet = pixels(tmp_path / "a.png")
    assert sheet.shape == (2 * 50 + 2, 2 + 64 + 2, 3)
    assert sheet[20, [2 + 8, 2 + 24, 2 + 40, 2 + 56], 0].tolist() == [0, 255, 255, 0]
    assert (sheet[70, 2:66] == plots.HIDDEN).all()


def test_many_images_are_paged(tmp_path, monkeypatch):
    images = torch.arange(1000).view(-1, 1, 1, 1).expand(-1, 1, 4, 4) % 7
    pages = plots.image_pages(images, 7, tmp_path / "a.png", columns=10)
    assert [page.name for page in pages] == ["a-1.png", "a-2.png", "a-3.png"]
    shown = map(pixels, pages)
    seen = [page[top + 10, 12::50, 0] for page in shown for top in range(2, len(page) - 2, 50)]
    shades = torch.round(torch.arange(1000) % 7 * (255 / 6))
    assert np.concatenate(seen).tolist() == shades.tolist()
    assert plots.image_pages(images[:9], 7, tmp_path / "c.png", columns=3) == [tmp_path / "c.png"]
    monkeypatch.setattr(plots, "PAGE_PIXELS", 60 * 60)
    large = torch.zeros(5, 1, 50, 50, dtype=torch.uint8)  # of which two would be more than a page holds
    assert len(plots.image_pages(large, 2, tmp_path / "b.png", columns=1)) == 5


def test_bad_arguments_are_named(tmp_path):
    images = torch.zeros(2, 1, 4, 4)
    for wrong, named in (
        (lambda: plots.image_grid(images, 2, tmp_path / "a.jpg", columns=1), r"a\.jpg"),
        (lambda: plots.image_grid(images[0], 2, tmp_path / "a.png", columns=1), "shape"),
        (lambda: plots.image_grid(images[:0], 2, tmp_path / "a.png", columns=1), "shape"),
        (lambda: plots.image_grid(images, 2, tmp_path / "a.png", columns=1, row_names=["x"]), "row_names"),
        (lambda: plots.image_grid(images, 2, tmp_path / "a.png", columns=0), "columns"),
        (lambda: plots.image_grid(images, 1, tmp_path / "a.png", columns=1), "levels must be >= 2, got 1"),
        (lambda: plots.curves([], tmp_path / "a.pdf"), r"a\.pdf"),
    ):
        with pytest.raises(ValueError, match=named):
            wrong()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_keeps_the_old_picture(tmp_path, monkeypatch):
    plots.image_grid(torch.zeros(1, 1, 4, 4), 2, tmp_path / "a.png", columns=1)
    before = (tmp_path / "a.png").read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        plots.image_grid(torch.ones(1, 1, 4, 4), 2, tmp_path / "a.png", columns=1)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == before


ROWS = [
    {"step": 10, "train_bits_per_dim": 3.0, "learning_rate": 0.1},
    {"step": 20, "train_bits_per_dim": 2.0, "learning_rate": 0.1},
    {"step": 20, "validation_bits_per_dim": 2.5},
]


def test_curves(tmp_path):
    assert plots.curves(ROWS, tmp_path / "a.png", lines={"uniform": 4.0})
    sheet = pixels(tmp_path / "a.png")
    assert sheet.shape[0] > 300 and sheet.min() < 100


def test_curves_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not plots.curves(ROWS, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
