"""Data sets by name: their shapes, their splits that do not overlap, and downloads."""

import gzip
import hashlib
import io
import tarfile

import numpy as np
import pytest
import torch

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
    """Each patch is found in its photograph, and the splits cover disjoint columns."""
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
    """With file:// URLs, which the same code reads as URLs of the network."""
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
