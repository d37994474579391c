"""The demonstrations run, leave a picture, and their numbers mean what they say. Few steps: nothing is learnt well."""

import json

import pytest
import torch
from PIL import Image

from fastgen import demonstrations
from fastgen.demonstrations.__main__ import main
from fastgen.demonstrations.pictures import GAP, Axes, sheet, tiles
from fastgen.demonstrations.vae import LinearVAE
from fastgen.models import VAE

pytest.importorskip("sklearn")


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Runs one and returns its numbers, after a look at what it wrote."""
    monkeypatch.setattr("fastgen.demonstrations.likelihoods.IMPORTANCE_SAMPLES", 4)

    def run(name, **options):
        before = torch.get_rng_state()
        numbers = demonstrations.DEMONSTRATIONS[name](tmp_path / "new", **options)
        assert torch.equal(torch.get_rng_state(), before)
        with Image.open(numbers.pop("picture")) as picture:
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


def test_nothing_is_written_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    numbers = demonstrations.run_bounds(samples=2)
    assert "picture" not in numbers and not list(tmp_path.iterdir())


def test_the_command(tmp_path, capsys, monkeypatch):
    calls = []
    monkeypatch.setitem(demonstrations.DEMONSTRATIONS, "vae", lambda out, seed: calls.append((out, seed)) or {"x": 1})
    assert main(["vae", "--out", str(tmp_path), "--seed", "3"]) == 0
    assert calls == [(tmp_path, 3)] and '"x": 1' in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main(["nothing"])
    assert stopped.value.code == 2
    (tmp_path / "file").write_text("")
    assert main(["bounds", "--out", str(tmp_path / "file")]) == 2
    assert "file" in capsys.readouterr().err


def test_pictures_show_levels():
    images = torch.tensor([[[[[0.0, 4.0], [2.0, 9.0]]], [[[4.0, 4.0], [0.0, 0.0]]]]])  # one row of two, C = 1
    page = tiles(images, 5, scale=2)
    assert page.size == (8 + GAP, 4)
    assert [page.getpixel(at)[0] for at in ((0, 0), (3, 1), (0, 2), (3, 3), (5, 0), (4 + GAP, 3))] == [
        0, 255, 128, 255, 255, 0,
    ]  # fmt: skip
    assert tiles(torch.rand(2, 1, 3, 4, 5), 2, scale=1).size == (5, 2 * (4 + GAP) - GAP)
    assert sheet([("a", page), ("b", None)]).height > page.height
    axes = Axes((0, 2), (-1, 1), (200, 100))
    assert axes.place(0, -1) == (axes.left, axes.bottom) and axes.place(2, 1) == (axes.right, axes.top)


def test_a_vae_of_digits_learns(tmp_path):
    """The demonstration's model and training, briefly: a good way below a histogram of each pixel."""
    from fastgen import data
    from fastgen.demonstrations.vae import MIXTURE, fit

    digits = data.load("digits")
    model = VAE(digits.shape, 8, levels=digits.levels, **MIXTURE)
    fit(model, digits.train.images, 150)
    with torch.no_grad():
        assert model.elbo(digits.test.images).bits_per_dim.mean() < 2.6
