"""The demonstrations run and write a picture; their numbers mean what is documented. Few steps: little is learnt."""

import importlib
import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from fastgen import cli, data, demos
from fastgen.demos.bounds import LinearVAE
from fastgen.demos.common import digits_vae, fit
from fastgen.demos.pictures import Axes, rows_of, sheet
from fastgen.plots import GAP

pytest.importorskip("sklearn")


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Runs a demonstration, checks the files that it writes, and returns its numbers."""
    for module in ("bayes", "outliers"):
        monkeypatch.setattr(f"fastgen.demos.{module}.IMPORTANCE_SAMPLES", 4)

    def run(name, **options):
        before = torch.get_rng_state()
        numbers = demos.perform(name, tmp_path / "new", **options)
        assert torch.equal(torch.get_rng_state(), before)
        with Image.open(tmp_path / "new" / f"{name}.png") as picture:
            assert picture.width > 300 and len(set(picture.convert("L").getdata())) > 10
        assert json.loads((tmp_path / "new" / f"{name}.json").read_text()) == numbers
        return numbers

    return run


def test_autoencoder(written):
    numbers = written("autoencoder", steps=60)
    assert numbers["error"] < numbers["error_of_mean"]
    accuracy = numbers["accuracy"]
    assert list(accuracy) == ["10", "100", "1350"]
    for name in ("features", "pixels"):
        assert 0.1 < accuracy["10"][name]["mean"] < accuracy["1350"][name]["mean"] < 1


def test_vae(written):
    numbers = written("vae", steps=40)
    assert numbers["nats"]["importance"] < numbers["nats"]["elbo"]
    assert numbers["bits_per_dim"]["histogram"] == pytest.approx(2.366, abs=2e-3)
    assert sum(numbers["kl_per_dimension"]) == pytest.approx(numbers["kl"], rel=1e-3)
    assert numbers["reconstruction"] + numbers["kl"] == pytest.approx(numbers["nats"]["elbo"], rel=1e-4)


def test_latent_map(written):
    numbers = written("latent_map", steps=30)
    assert 0.05 < numbers["neighbours"] < 1


def test_bounds(written):
    numbers = written("bounds", samples=16)
    bounds = list(numbers["importance"].values())
    assert bounds == sorted(bounds) and bounds[-1] < numbers["log_p"]
    assert numbers["elbo"] == pytest.approx(bounds[0], abs=0.1) and numbers["elbo"] < bounds[1]


def test_the_linear_vae_is_a_fit_to_its_images():
    """Its covariance has the variances of the data, and its log p is the limit of the importance-weighted bound."""
    images = torch.randn(500, 1, 2, 3).double() * torch.arange(1.0, 7).view(1, 1, 2, 3)
    model = LinearVAE(images, 3)
    covariance = model.weight @ model.weight.T + model.noise * torch.eye(6)
    torch.testing.assert_close(covariance.trace(), torch.cov(images.flatten(1).T).trace())
    x = images[:2]
    torch.testing.assert_close(model.log_prob(x, 20_000), model.exact_log_prob(x), atol=0.05, rtol=0)


def test_bayes(written):
    numbers = written("bayes", steps=60)
    assert 0.2 < numbers["accuracy"] <= 1 and numbers["nats"] < 64 * 2.83  # nats of even levels


def test_outliers(written):
    numbers = written("outliers", steps=60)
    for score in ("unlikely", "likelihood ratio", "typicality"):
        assert numbers["rejected"][score]["digits"] < 0.3
        assert set(numbers["auroc"][score]) == set(numbers["rejected"][score]) - {"digits"}
    assert numbers["auroc"]["unlikely"]["noise"] > 0.9


def test_the_command(tmp_path, capsys, monkeypatch):
    calls = []
    monkeypatch.setattr(demos, "perform", lambda name, folder, seed: calls.append((name, folder, seed)) or {"x": 1})
    assert cli.main(["demo", "vae", "--out", "here", "--seed", "3"]) == 0
    assert calls == [("vae", "here", 3)] and '"x": 1' in capsys.readouterr().out
    assert cli.main(["demo", "vae", "--device", "mps"]) == 2 and "--device" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        cli.main(["demo", "nothing"])
    assert stopped.value.code == 2


def test_every_demonstration_is_there_and_a_bad_folder_is_known_first(tmp_path):
    for name in demos.DEMOS:
        assert callable(importlib.import_module(f"fastgen.demos.{name}").run)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file"):
        demos.perform("bounds", tmp_path / "file")


def test_training_is_that_of_the_library_and_keeps_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    digits = data.load("digits")
    fit(digits_vae(digits), replace(digits, train=digits.train[:64]), 1)
    assert not list(tmp_path.iterdir())


def test_pictures_show_levels():
    images = torch.tensor([[[[[0.0, 4.0], [2.0, 9.0]]], [[[4.0, 4.0], [0.0, 0.0]]]]])  # one row of two, C = 1
    page = rows_of(images, 5)
    side = (page.height - 2 * GAP) // 2  # of a pixel
    places = [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (2, 1)]  # column and row of a pixel
    shown = [page.getpixel((GAP * (1 + x // 2) + x * side + side // 2, GAP + y * side + side // 2)) for x, y in places]
    assert [pixel[0] for pixel in shown] == [0, 255, 128, 255, 255, 0]
    assert sheet(("a", page), ("b", None)).height > page.height
    axes = Axes((0, 2), (-1, 1), (200, 100))
    assert axes.place(0, -1) == (axes.left, axes.bottom) and axes.place(2, 1) == (axes.right, axes.top)


def test_a_vae_of_digits_learns():
    """The demonstration's model after few steps is better than histograms of the pixels, though not yet good."""
    digits = data.load("digits")
    model = digits_vae(digits)
    fit(model, digits, 150)
    with torch.no_grad():
        assert model.elbo(digits.test.images).bits_per_dim.mean() < 2.6
