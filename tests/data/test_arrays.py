"""Images in .npz files: splits, levels, and errors that name the mistake."""

import numpy as np
import pytest
import torch

from fastgen import data
from tests.data.small_images import grey


def test_npz_with_all_splits(tmp_path):
    path = tmp_path / "a.npz"
    colour = np.random.RandomState(1).randint(256, size=(6, 5, 4, 3)).astype(np.uint8)
    np.savez(
        path, x_train=colour, y_train=np.arange(6), x_test=colour[:2], y_test=np.array([0, 3]), validation=colour[1:2]
    )
    found = data.load(f"npz:{path}")
    assert found.shape == (3, 5, 4) and found.n_classes is None  # not all splits have labels
    assert torch.equal(found.train.images, torch.from_numpy(colour).permute(0, 3, 1, 2))
    assert found.test.labels.tolist() == [0, 3] and len(found.validation) == 1


def test_npz_of_one_array_is_split_by_a_fixed_rule(tmp_path):
    np.savez(tmp_path / "a.npz", images=grey(), labels=np.arange(20) % 3, levels=256)
    np.savez(tmp_path / "b.npz", anything=grey())
    found, again = data.load(f"npz:{tmp_path / 'a.npz'}"), data.load(f"npz:{tmp_path / 'b.npz'}")
    assert [len(part) for part in (found.train, found.validation, found.test)] == [16, 2, 2]
    assert found.n_classes == 3 and again.n_classes is None
    assert torch.equal(found.test.images, again.test.images)
    every = torch.cat([part.images for part in (found.train, found.validation, found.test)])
    assert {image.numpy().tobytes() for image in every} == {image.tobytes() for image in grey()}
    for part in (found.train, found.validation, found.test):
        for image, label in zip(part.images, part.labels, strict=True):
            place = [i for i, other in enumerate(grey()) if np.array_equal(other, image[0])]
            assert label == place[0] % 3


def test_bool_images_have_two_levels(tmp_path):
    np.savez(tmp_path / "a.npz", images=grey() > 100)
    found = data.load(f"npz:{tmp_path / 'a.npz'}")
    assert found.levels == 2 and found.train.images.max() == 1


@pytest.mark.parametrize(
    ("arrays", "named"),
    [
        ({"images": grey().astype(np.float32)}, "float32"),
        ({"images": grey()[..., :0]}, r"\(20, 5, 0\)"),
        ({"images": grey().reshape(4, 5, 4, 5)}, r"\(4, 5, 4, 5\)"),
        ({"images": grey() / 255}, r"in 0\.\.1: save \(images \* 255\)"),
        ({"images": grey().astype(np.int64) - 300}, r"0\.\.255"),
        ({"images": grey(), "levels": 17}, r"0\.\.16"),
        ({"images": grey(), "levels": 1}, "levels"),
        ({"images": grey(), "labels": np.arange(19)}, "labels"),
        ({"images": grey(), "labels": np.arange(20) - 1}, "labels"),
        ({"images": grey(), "labels": np.arange(20.0)}, "labels"),
        ({"images": grey(), "pictures": grey()}, "pictures"),
        ({"train": grey(), "test": grey()[:, 1:]}, "differ in shape"),
        ({"test": grey(), "validation": grey()}, "no training images"),
        ({"images": grey(2)}, "too few"),
        ({"images": np.array([None, {}], dtype=object)}, "plain arrays"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arrays_are_named(tmp_path, arrays, named):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=named) as error:
        data.load(f"npz:{tmp_path / 'a.npz'}")
    assert "a.npz" in str(error.value)


def test_bad_names_and_files(tmp_path):
    (tmp_path / "broken.npz").write_bytes(b"PK nonsense")
    for name, named in (
        ("digit", "'digit'.*digits.*npz:PATH"),
        ("npz:", "npz:"),
        (f"npz:{tmp_path}/none.npz", "no such file"),
        (f"npz:{tmp_path}/broken.npz", "broken.npz"),
        (f"folder:{tmp_path}/none", "no such folder"),
        (f"folder:{tmp_path}", "no image files"),
    ):
        with pytest.raises(ValueError, match=named):
            data.load(name)
    with pytest.raises(TypeError, match="name must be a str, got NoneType"):
        data.load(None)


@pytest.mark.parametrize(
    ("values", "levels", "expected", "note"),
    [
        ([0, 1], None, 2, "0..1 only, taken as 2"),
        ([0, 16], None, 17, "0..16 only, taken as 17"),
        ([3, 64], None, 256, ""),
        ([0, 255], None, 2, "0 and 255 only"),
        ([0, 255], 2, 2, ""),
        ([0, 255], 256, 256, ""),
        ([0, 1], 256, 256, ""),
    ],
)
def test_levels_come_from_the_images_and_say_so(tmp_path, values, levels, expected, note):
    images = np.random.RandomState(0).choice(values, size=(20, 4, 4)).astype(np.uint8)
    np.savez(tmp_path / "a.npz", images=images)
    found = data.load(f"npz:{tmp_path / 'a.npz'}", levels=levels)
    assert found.levels == expected and note in found.note and bool(note) == bool(found.note)
    every = torch.cat([part.images for part in (found.train, found.validation, found.test)])
    assert int(every.max()) == (1 if expected == 2 else values[1])


def test_a_file_that_states_its_levels_is_believed(tmp_path):
    np.savez(tmp_path / "a.npz", images=grey() % 2, levels=256)
    found = data.load(f"npz:{tmp_path / 'a.npz'}")
    assert (found.levels, found.note) == (256, "")


@pytest.mark.parametrize("channels", [2, 4])
def test_arrays_of_two_and_four_channels(tmp_path, channels):
    first = np.random.RandomState(0).randint(256, size=(20, channels, 6, 5)).astype(np.uint8)
    np.savez(tmp_path / "first.npz", train=first, test=first[:2], validation=first[:3])
    last = first.transpose(0, 2, 3, 1)
    np.savez(tmp_path / "last.npz", train=last, test=last[:2], validation=last[:3])
    for name in ("first", "last"):
        assert torch.equal(data.load(f"npz:{tmp_path / name}.npz").train.images, torch.from_numpy(first))


def test_the_content_has_a_fingerprint(tmp_path):
    labels = np.arange(20) % 3
    np.savez(tmp_path / "a.npz", images=grey(), labels=labels, levels=256)
    np.savez_compressed(tmp_path / "b.npz", images=grey(), labels=labels, levels=256)
    first, moved = (data.load(f"npz:{tmp_path / name}") for name in ("a.npz", "b.npz"))
    assert first.sha256 == moved.sha256 and first.name != moved.name
    other = grey()
    other[3, 2, 1] ^= 1
    changes = (
        {"images": other, "labels": labels},
        {"images": grey(), "labels": (labels + 1) % 3},
        {"images": grey()[::-1], "labels": labels},
    )
    for change in changes:
        np.savez(tmp_path / "b.npz", levels=256, **change)
        assert data.load(f"npz:{tmp_path / 'b.npz'}").sha256 != first.sha256


def test_a_path_is_kept_absolute(tmp_path, monkeypatch):
    np.savez(tmp_path / "a.npz", images=grey())
    monkeypatch.chdir(tmp_path)
    assert data.load("npz:a.npz").name == f"npz:{tmp_path.resolve() / 'a.npz'}"
