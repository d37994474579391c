"""`fastgen classify` and `score`."""

import csv
import re

import numpy as np
import pytest
import torch
from PIL import Image

import fastgen
from fastgen import cli, data, models
from tests.cli.commands import refused


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """npz:PATH of 60 images of 6x5 with 3 levels and 2 classes."""
    path = tmp_path_factory.mktemp("data") / "small.npz"
    random = np.random.RandomState(0)
    labels = random.randint(2, size=60)
    np.savez(path, images=(random.rand(60, 6, 5) * 2 + labels[:, None, None] / 2).astype(int), labels=labels, levels=3)
    return f"npz:{path}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    for name, n_classes in (("plain", None), ("conditional", 2)):
        fastgen.save(models.GatedPixelCNN((1, 6, 5), 3, channels=4, layers=1, n_classes=n_classes), root / name)
    fastgen.save(models.VAE((1, 6, 5), 2, levels=3, channels=4, likelihood="categorical"), root / "vae")
    fastgen.save(models.Autoencoder((1, 6, 5), 2, levels=3, channels=4), root / "autoencoder")
    return root


@pytest.mark.parametrize("name", ["plain", "conditional", "vae"])
def test_score(name, runs, images, tmp_path, capsys):
    path = tmp_path / "new" / "scores.csv"
    arguments = ["score", str(runs / name), "--data", images, "--steps", "3", "--samples", "4", "--maps", "3"]
    assert cli.main([*arguments, "--out", str(path)]) == 0
    shown = capsys.readouterr().out
    rows = list(csv.DictReader(path.open()))
    test = data.load(images).test
    assert [int(row["label"]) for row in rows] == test.labels.tolist()
    bits = np.array([float(row["bits_per_dim"]) for row in rows])
    nats = np.array([float(row["log_p_nats"]) for row in rows])
    np.testing.assert_allclose(bits, -nats / (30 * np.log(2)), rtol=1e-4)
    assert f"{bits.mean():.3f} bits/dim" in shown
    if name == "plain":
        np.testing.assert_allclose(
            nats, fastgen.load(runs / name).log_prob(test.images.long()).detach().numpy(), rtol=1e-4
        )
    assert path.with_suffix(".png").exists() == (name != "vae")
    if name != "vae":
        sheet = np.asarray(Image.open(path.with_suffix(".png")))
        assert sheet.shape[0] == 4 * (6 * 8 + 2) + 2
        left = sheet.shape[1] - 3 * (5 * 8 + 2)  # of the first image: the least likely
        first = sheet[2 : 2 + 48 : 8, left : left + 40 : 8, 0]
        assert np.array_equal(first, np.rint(test.images[nats.argmin(), 0].numpy() * 127.5))
    table = [
        line.split() for line in shown.splitlines() if line.startswith(("inverted", "shuffled", "noise", "letters"))
    ]
    assert len(table) == 4 and all(0 <= float(value) <= 1 for row in table for value in row[1:])


def test_score_with_a_background_of_its_own_is_zero_ratio(runs, images, tmp_path):
    run, path = str(runs / "plain"), tmp_path / "scores.csv"
    assert cli.main(["score", run, "--data", images, "--background", run, "--out", str(path), "--split", "train"]) == 0
    rows = list(csv.DictReader(path.open()))
    assert len(rows) == 48 and {float(row["likelihood_ratio_nats"]) for row in rows} == {0.0}


def test_classify(runs, images, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "reliability.png"
    run = str(runs / "conditional")
    assert cli.main(["classify", run, "--data", images, "--steps", "60", "--out", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "GatedPixelCNN by Bayes' rule" in shown and "discriminative network" in shown
    accuracy = re.findall(r"([\d.]+)% right", shown)
    assert cli.main(["evaluate", run, "--data", images]) == 0
    assert f"{accuracy[0]}% right" in capsys.readouterr().out
    assert len(set(Image.open(path).convert("L").getdata())) > 10
    sizes = [int(size.replace(",", "")) for size in re.findall(r"\(([\d,]+) parameters\)", shown)]
    assert 0.7 < sizes[0] / sizes[1] < 1.4


def test_wrong_usage_is_one_line(runs, images, tmp_path, capsys):
    out = ["--out", tmp_path / "a.csv"]
    for arguments, named in (
        (["classify", runs / "plain", "--data", images], "class-conditional"),
        (["classify", runs / "conditional"], "--data"),
        (["classify", runs / "conditional", "--data", images, "--out", tmp_path / "a.gif"], r"a\.gif"),
        (["score", runs / "plain", "--data", images], "--out"),
        (["score", runs / "plain", "--data", images, "--out", tmp_path / "a.txt"], r"a\.txt.*\.csv"),
        (["score", runs / "plain", "--data", images, "--rate", "2", *out], "--rate"),
        (["score", runs / "autoencoder", "--data", images, *out], "Autoencoder"),
        (["score", runs / "plain", "--data", images, "--background", runs / "vae", *out], "--background.*VAE"),
        (["score", runs / "plain", "--data", images, "--background", tmp_path / "no", *out], "no such folder"),
    ):
        line = refused(capsys, *arguments)
        assert line.startswith("fastgen") and re.search(named, line), line
    assert not (tmp_path / "a.csv").exists()
