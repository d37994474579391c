"""`fastgen compress` and `decompress` return the same images, also with a class-conditional model."""

import re
import sys

import constriction  # noqa: F401 (without it this file is not collected)
import numpy as np
import pytest
import torch
from PIL import Image

import fastgen
from fastgen import cli, data, models
from fastgen.cli.compression import other_codecs
from tests.cli.commands import refused


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """npz:PATH of 40 images of 4x4 with 3 levels and 2 classes."""
    path = tmp_path_factory.mktemp("data") / "small.npz"
    random = np.random.RandomState(0)
    np.savez(path, images=random.randint(3, size=(40, 4, 4)), labels=random.randint(2, size=40), levels=3)
    return f"npz:{path}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for name, n_classes in (("plain", None), ("conditional", 2)):
        fastgen.save(models.GatedPixelCNN((1, 4, 4), 3, channels=4, layers=1, n_classes=n_classes), root / name)
    fastgen.save(models.VAE((1, 4, 4), 2, levels=3, channels=4), root / "vae")
    return root


@pytest.mark.parametrize("name", ["plain", "conditional"])
def test_the_very_images_come_back(name, runs, images, tmp_path, capsys):
    file, test = tmp_path / "new" / "images.fg", data.load(images).test
    assert cli.main(["compress", str(runs / name), "--data", images, "--out", str(file)]) == 0
    shown = capsys.readouterr().out
    rows = {line[:38].strip(): line[38:].split() for line in shown.splitlines()}
    assert "4 test images" in shown and "PNG, optimized, one picture" in rows
    size = file.stat().st_size
    assert int(rows["fastgen (decoded again: identical)"][0]) == size - (20 if name == "conditional" else 0)
    model = fastgen.load(runs / name)
    nats = -model.log_prob(test.images.long(), test.labels if name == "conditional" else None).detach().sum()
    assert float(rows["the model's -log2 p(x)"][1]) == pytest.approx(float(nats) / (64 * np.log(2)), abs=6e-4)
    assert cli.main(["decompress", str(runs / name), str(file), "--out", str(tmp_path / "a.npz")]) == 0
    with np.load(tmp_path / "a.npz") as found:
        assert np.array_equal(found["images"], test.images.numpy())
        assert "labels" not in found or np.array_equal(found["labels"], test.labels.numpy())
    assert cli.main(["decompress", str(runs / name), str(file), "--out", str(tmp_path / "folder")]) == 0
    pictures = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "folder").iterdir())]
    assert np.array_equal(np.stack(pictures), np.rint(test.images[:, 0].numpy() * 127.5))


def test_a_part_of_a_split(runs, images, tmp_path):
    out = ["--out", str(tmp_path / "a")]
    assert cli.main(["compress", str(runs / "plain"), "--data", images, "--split", "train", "--n", "5", *out]) == 0
    found = fastgen.decompress(fastgen.load(runs / "plain"), (tmp_path / "a").read_bytes())
    assert torch.equal(found, data.load(images).train.images[:5].long())


def test_wrong_usage_is_one_line(runs, images, tmp_path, capsys, monkeypatch):
    plain, conditional, out = runs / "plain", runs / "conditional", ["--out", tmp_path / "x"]
    files = {}
    for run in (plain, conditional):
        files[run] = tmp_path / f"{run.name}.fg"
        assert cli.main(["compress", str(run), "--data", images, "--out", str(files[run])]) == 0
    short = tmp_path / "short"
    short.write_bytes(files[plain].read_bytes()[:-3])
    shorter = tmp_path / "shorter"
    shorter.write_bytes(files[conditional].read_bytes()[:18])
    torch.manual_seed(5)
    fastgen.save(models.GatedPixelCNN((1, 4, 4), 3, channels=4, layers=1), tmp_path / "other")
    capsys.readouterr()
    for arguments, named in (
        (["compress", plain, *out], "--data"),
        (["compress", plain, "--data", images], "--out"),
        (["compress", plain, "--data", images, "--out", tmp_path], "folder"),
        (["compress", plain, "--data", images, "--n", "9", *out], "--n 9"),
        (["compress", runs / "vae", "--data", images, *out], "VAE"),
        (["decompress", plain, "--out", tmp_path / "x"], "FILE"),
        (["decompress", plain, tmp_path / "nothing", *out], "nothing"),
        (["decompress", plain, short, *out], "short: is truncated"),
        (["decompress", conditional, shorter, *out], "shorter: is truncated"),
        (["decompress", conditional, files[plain], *out], "foreign"),
        (["decompress", plain, files[conditional], *out], "foreign"),
        (["decompress", tmp_path / "other", files[plain], *out], "other weights"),
    ):
        line = refused(capsys, *arguments)
        assert line.startswith("fastgen") and re.search(named, line), line
    monkeypatch.setitem(sys.modules, "constriction", None)
    assert "fastgen[compress]" in refused(capsys, "compress", plain, "--data", images, "--out", tmp_path / "y")


def test_other_codecs_are_lossless_sizes():
    """Noise takes at least its entropy; images that picture files cannot hold give an empty dict."""
    noise = torch.randint(256, (5, 3, 8, 8))
    assert all(count > noise.numel() for count in other_codecs(noise, 256).values())
    grey = other_codecs(torch.randint(17, (5, 1, 8, 8)), 17)
    assert grey["PNG, optimized, one picture"] < grey["PNG, optimized, one file per image"]
    assert other_codecs(torch.zeros(5, 2, 8, 8), 4) == other_codecs(torch.zeros(5, 1, 8, 8), 65536) == {}
