"""Images in folders and of the hub: classes, colours, sizes, and errors that name the file."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastgen import data
from tests.data.small_images import grey, write_images


def test_folder_of_classes(tmp_path):
    write_images(tmp_path / "train" / "cat", grey(4))
    write_images(tmp_path / "train" / "dog" / "small", grey(7)[4:])
    write_images(tmp_path / "test" / "dog", grey(2))
    found = data.load(f"folder:{tmp_path}")
    assert found.shape == (1, 5, 4) and found.levels == 256 and found.n_classes == 2
    assert len(found.train) == 6 and len(found.validation) == 1 and len(found.test) == 2
    assert found.test.labels.tolist() == [1, 1]
    assert torch.equal(found.test.images[:, 0], torch.from_numpy(grey(2)))
    labels = torch.cat((found.train.labels, found.validation.labels))
    assert labels.bincount().tolist() == [4, 3]


def test_folder_without_classes_in_colour(tmp_path):
    write_images(tmp_path, grey(10), ".PNG")
    Image.fromarray(np.full((5, 4, 4), 7, np.uint8), "RGBA").save(tmp_path / "z.png")
    found = data.load(f"folder:{tmp_path}")
    assert found.shape == (3, 5, 4) and found.n_classes is None
    assert len(found.train) + len(found.validation) + len(found.test) == 11


def test_bad_image_files_are_named(tmp_path):
    write_images(tmp_path, grey(3))
    (tmp_path / "x.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"x\.png"):
        data.load(f"folder:{tmp_path}")
    write_images(tmp_path, [np.zeros((9, 4), np.uint8)])
    (tmp_path / "x.png").unlink()
    with pytest.raises(ValueError, match=r"00\.png is 4x9|is 4x5 and .*00\.png is 4x9"):
        data.load(f"folder:{tmp_path}")
    write_images(tmp_path, [np.zeros((5, 4), np.uint16)])
    with pytest.raises(ValueError, match=r"00\.png has the mode I;16"):
        data.load(f"folder:{tmp_path}")


def test_hidden_files_are_passed_over(tmp_path):
    write_images(tmp_path, grey(12))
    write_images(tmp_path / "__MACOSX", grey(1))
    for name in ("._00.png", ".hidden.png"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    found = data.load(f"folder:{tmp_path}")
    assert len(found.train) == 10 and found.n_classes is None


def test_black_and_white_files_have_two_levels(tmp_path):
    write_images(tmp_path, (grey(12) > 100).astype(np.uint8) * 255)
    found = data.load(f"folder:{tmp_path}")
    assert found.levels == 2 and "0 and 255" in found.note and found.train.images.max() == 1
    assert data.load(f"folder:{tmp_path}", levels=256).levels == 256
    write_images(tmp_path, grey(12) % 2)  # dark files of 8 bits stay what they are
    assert data.load(f"folder:{tmp_path}").levels == 256


def test_what_is_transparent_is_white(tmp_path):
    pixels = np.zeros((12, 5, 4, 4), np.uint8)
    pixels[:, :2, :, 3], pixels[:, 2, :, 3] = 255, 128
    write_images(tmp_path, pixels)
    image = data.load(f"folder:{tmp_path}").train.images[0]
    assert image.shape == (3, 5, 4)
    assert (image[:, :2] == 0).all() and (image[:, 2] == 127).all() and (image[:, 3:] == 255).all()


def test_the_turn_of_a_camera_is_applied(tmp_path):
    upright = np.arange(20, dtype=np.uint8).reshape(5, 4) * 8
    exif = Image.Exif()
    exif[0x0112] = 6  # turned clockwise for display
    for number in range(12):
        Image.fromarray(np.rot90(upright).copy()).save(tmp_path / f"{number}.png", exif=exif)
    assert np.array_equal(data.load(f"folder:{tmp_path}").train.images[0, 0], upright)


def test_mixed_sizes_are_made_one(tmp_path):
    for number, (height, width) in enumerate([(8, 12), (10, 6), (6, 6)] * 4):
        Image.fromarray(np.full((height, width), 9 * number, np.uint8)).save(tmp_path / f"{number:02}.png")
    with pytest.raises(ValueError, match="--resize N --crop N"):
        data.load(f"folder:{tmp_path}")
    with pytest.raises(ValueError, match=r"00\.png is 12x8, too small for crop=9"):
        data.load(f"folder:{tmp_path}", crop=9)
    found = data.load(f"folder:{tmp_path}", resize=6, crop=6)
    assert found.shape == (1, 6, 6) and found.loading == {"resize": 6, "crop": 6}
    every = torch.cat([part.images for part in (found.train, found.validation, found.test)]).flatten(1)
    assert sorted(every[:, 0].tolist()) == [9 * number for number in range(12)]
    assert (every == every[:, :1]).all()
    # A crop alone takes the middle.
    image = np.arange(48, dtype=np.uint8).reshape(6, 8)
    for number in range(12):
        Image.fromarray(image).save(tmp_path / f"{number:02}.png")
    assert np.array_equal(data.load(f"folder:{tmp_path}", crop=4).train.images[0, 0], image[1:5, 2:6])


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("digits", {"resize": 4}, "resize is for image files"),
        ("digits", {"levels": 16}, "levels must be 17"),
        ("npz:x", {"crop": 4}, "crop is for image files"),
        ("folder:x", {"levels": 1}, "levels must be an int in 2..256, got 1"),
        ("folder:x", {"resize": 0}, "resize must be an int >= 1"),
    ],
)
def test_options_that_do_not_apply_are_named(name, options, named):
    with pytest.raises(ValueError, match=named):
        data.load(name, **options)


def test_hub_reads_local_files(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    write_images(tmp_path / "images" / "train" / "cat", grey(8))
    write_images(tmp_path / "images" / "train" / "dog", grey(4))
    write_images(tmp_path / "images" / "test" / "dog", grey(2))
    write_images(tmp_path / "images" / "test" / "cat", grey(1))
    found = data.load(f"hf:{tmp_path / 'images'}")
    assert found.shape == (1, 5, 4) and found.n_classes == 2
    assert [len(part) for part in (found.train, found.validation, found.test)] == [11, 1, 3]
    assert sorted(found.test.labels.tolist()) == [0, 1, 1]
    assert torch.equal(found.test.images[found.test.labels == 1][:, 0], torch.from_numpy(grey(2)))
    with pytest.raises(ValueError, match="cannot be loaded"):
        data.load(f"hf:{tmp_path / 'nothing'}")
