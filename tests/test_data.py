"""Every source of images: shapes, levels, splits that do not overlap, and errors that name what is wrong."""

import gzip
import hashlib
import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from fastgen import data
from fastgen.data import sources


def test_digits_are_split_as_stated():
    digits = data.load("digits")
    assert (digits.name, digits.shape, digits.levels, digits.n_classes) == ("digits", (1, 8, 8), 17, 10)
    assert [len(part) for part in (digits.train, digits.validation, digits.test)] == [1350, 150, 297]
    from sklearn.datasets import load_digits

    every = torch.cat([part.images for part in (digits.train, digits.validation, digits.test)])
    assert every.dtype == torch.uint8
    assert np.array_equal(every[:, 0].numpy(), load_digits().images)
    assert np.array_equal(digits.test.labels.numpy(), load_digits().target[1500:])


def test_patches_of_different_splits_do_not_overlap():
    """Each patch is looked up in its photograph; the columns that the splits cover are disjoint."""
    patches = data.load("patches")
    assert (patches.shape, patches.levels, patches.n_classes) == ((3, 32, 32), 256, None)
    assert "danielbuechele" in patches.attribution and "vultilion" in patches.attribution
    from sklearn.datasets import load_sample_images

    photographs = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in load_sample_images().images]
    columns = {}
    for name, part in (("train", patches.train), ("validation", patches.validation), ("test", patches.test)):
        columns[name] = set()
        assert len(part) > 50
        for patch in (part.images[0], part.images[len(part) // 2], part.images[-1]):
            places = [
                (int(j), p.shape)
                for p in photographs
                for i, j in zip(*torch.where((p[:, :-31, :-31] == patch[:, :1, :1]).all(0)), strict=True)
                if torch.equal(p[:, i : i + 32, j : j + 32], patch)
            ]
            assert len(places) == 1
            columns[name] |= set(range(places[0][0], places[0][0] + 32))
    assert max(columns["train"]) < min(columns["validation"])
    assert max(columns["validation"]) < min(columns["test"])


# --- arrays


def grey(n=20, levels=256):
    return np.random.RandomState(0).randint(levels, size=(n, 5, 4)).astype(np.uint8)


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


# --- image files


def write_images(folder, images, suffix=".png"):
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:02}{suffix}")


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


# --- downloads


def idx(array):
    return gzip.compress(bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes())


@pytest.fixture
def mnist_files():
    images = np.random.RandomState(0).randint(256, size=(30, 28, 28)).astype(np.uint8)
    labels = (np.arange(30) % 10).astype(np.uint8)
    contents = [idx(images), idx(labels), idx(images[:5]), idx(labels[:5])]
    return images, dict(zip(sources.MNIST_MD5, contents, strict=True))


def test_mnist_from_its_files(tmp_path, monkeypatch, mnist_files):
    monkeypatch.setenv("FASTGEN_DATA", str(tmp_path))
    images, files = mnist_files
    (tmp_path / "mnist").mkdir()
    for name, content in files.items():
        (tmp_path / "mnist" / name).write_bytes(content)
    found = data.load("mnist")
    assert found.shape == (1, 28, 28) and found.levels == 256 and found.n_classes == 10
    assert [len(part) for part in (found.train, found.validation, found.test)] == [27, 3, 5]
    assert torch.equal(found.test.images[:, 0], torch.from_numpy(images[:5]))
    assert found.test.labels.tolist() == [0, 1, 2, 3, 4]
    for damaged in (files["t10k-images-idx3-ubyte.gz"][:-20], b"PK", idx(images)[:-4], gzip.compress(b"\0\0\x09\1")):
        (tmp_path / "mnist" / "t10k-images-idx3-ubyte.gz").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte\.gz is damaged"):
            data.load("mnist")


def test_a_download_is_checked_and_kept(tmp_path, monkeypatch, mnist_files):
    """Over file:// URLs: the same code as over the network."""
    _, files = mnist_files
    monkeypatch.setenv("FASTGEN_DATA", str(tmp_path / "cache"))
    server = tmp_path / "server"
    server.mkdir()
    monkeypatch.setattr(sources, "MNIST_URL", server.as_uri() + "/")
    with pytest.raises(OSError, match=r"train-images-idx3-ubyte\.gz cannot be downloaded"):
        data.load("mnist")
    for name, content in files.items():
        (server / name).write_bytes(content)
    with pytest.raises(ValueError, match="MD5"):
        data.load("mnist")
    assert not list((tmp_path / "cache").rglob("*.gz"))
    sums = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(sources, "MNIST_MD5", sums)
    first = data.load("mnist")
    for name in files:
        (server / name).unlink()
    assert torch.equal(data.load("mnist").train.images, first.train.images)


def test_cifar10_from_its_archive(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTGEN_DATA", str(tmp_path))
    (tmp_path / "cifar10").mkdir()
    path = tmp_path / "cifar10" / sources.CIFAR10_FILE
    records = np.random.RandomState(0).randint(256, size=(24, 3073)).astype(np.uint8)
    records[:, 0] %= 10
    batches = {"data_batch_1.bin": records[:10], "data_batch_2.bin": records[10:20], "test_batch.bin": records[20:]}
    with tarfile.open(path, "w:gz") as archive:
        for name, part in {**batches, "readme.html": records[:1]}.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = part.size
            archive.addfile(member, io.BytesIO(part.tobytes()))
    found = data.load("cifar10")
    assert found.shape == (3, 32, 32) and found.n_classes == 10
    assert [len(part) for part in (found.train, found.validation, found.test)] == [18, 2, 4]
    assert found.test.labels.tolist() == records[20:, 0].tolist()
    assert found.test.images[1, 2, 3, 4] == records[21, 1 + 2 * 1024 + 3 * 32 + 4]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cifar-10-binary\.tar\.gz is damaged"):
        data.load("cifar10")
