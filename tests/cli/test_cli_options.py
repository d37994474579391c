"""The command line: configuration files, initial weights, kinds of output, the user's own images and masks."""

import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import fastgen
from fastgen import cli, data
from fastgen.cli import bench
from fastgen.models import PixelCNN
from fastgen.train import read_state
from tests.cli.commands import TINY, refused, run


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A file of 40 images of 4x4 with 3 levels and 2 classes."""
    path = tmp_path_factory.mktemp("data") / "small.npz"
    random = np.random.RandomState(0)
    np.savez(path, images=random.randint(3, size=(40, 4, 4)).astype(np.uint8), labels=np.arange(40) % 2, levels=3)
    return path


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for name, options in (
        ("pixelcnn", TINY),
        ("gated_pixelcnn", [*TINY, "--conditional"]),
        ("vae", ["--set", "channels=4", "--batch-size", "8", "--device", "cpu"]),
    ):
        run("train", "--model", name, "--data", f"npz:{images}", "--steps", 2, "--out", root / name, *options)
    return root


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def test_an_empty_out_is_refused(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for command in ("sample", "complete", "train"):
        with pytest.raises(SystemExit) as exit_:
            cli.main([command, *([str(trained / "pixelcnn")] if command != "train" else []), "--out", ""])
        assert exit_.value.code == 2 and "--out is empty" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# --- train


def test_a_run_can_be_repeated_from_the_configuration_that_it_leaves(images, tmp_path):
    options = ["--steps", 4, "--lr", 0.02, "--seed", 3, "--conditional", "--samples", 2]
    first = ["train", "--model", "gated_pixelcnn", "--data", f"npz:{images}", *TINY, "--set", "dropout=0.25", *options]
    run(*first, "--out", tmp_path / "a")
    run("train", "--config", tmp_path / "a" / "train.toml", "--out", tmp_path / "b", "--device", "cpu")
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert (tmp_path / "a" / "train.toml").read_bytes() == (tmp_path / "b" / "train.toml").read_bytes()
    assert [path.name for path in (tmp_path / "b" / "samples").iterdir()] == ["step-0000002.png", "step-0000004.png"]
    # The command line has the last word.
    run("train", f"--config={tmp_path / 'a' / 'train.toml'}", "--no-conditional", "--set", "channels=6", "--out",
        tmp_path / "c", "--device", "cpu", "--samples", 0)  # fmt: skip
    model = fastgen.load(tmp_path / "c")
    assert model.n_classes is None and model.constructor_arguments()["channels"] == 6
    assert model.constructor_arguments()["dropout"] == 0.25


def test_a_configuration_says_what_is_wrong_with_it(tmp_path, capsys):
    path = tmp_path / "a.toml"
    for text, named in (("model = ", "not a TOML file"), ("steps = [1, 2]", "steps must be a string, a number")):
        path.write_text(text)
        assert named in refused(capsys, "train", "--config", path, "--out", tmp_path / "run")
    path.write_text('model = "pixelcnn"\nstepz = 3\n')
    with pytest.raises(SystemExit):
        cli.main(["train", "--config", str(path), "--out", str(tmp_path / "run")])
    assert "did you mean --steps" in capsys.readouterr().err


def test_settings_can_be_set_by_name(images, tmp_path):
    new = ["train", "--model", "vae", "--data", f"npz:{images}", "--device", "cpu", "--set", "channels=4"]
    run(*new, "--set", "steps=3", "--beta", 2, "--set", "beta_warmup=2", "--free-bits", 0.1, "--out", tmp_path / "run")
    settings = read_state(tmp_path / "run")["settings"]
    assert [settings[name] for name in ("steps", "beta", "beta_warmup", "free_bits")] == [3, 2.0, 2, 0.1]


def test_init_from(images, trained, tmp_path, capsys):
    """From a run, with its model; from a state dict of a wrapped model; from safetensors with other names."""
    new = [
        "train",
        "--data",
        f"npz:{images}",
        "--steps",
        1,
        "--lr",
        1e-12,
        "--set",
        "weight_decay=0",
        "--device",
        "cpu",
    ]
    before = fastgen.load(trained / "pixelcnn").state_dict()
    run(*new, "--init-from", trained / "pixelcnn", "--out", tmp_path / "a")
    torch.save({"state_dict": {f"module.{name}": value for name, value in before.items()}}, tmp_path / "w.pt")
    other = {f"net.{number:02}": value for number, value in enumerate(before.values())}
    safetensors.torch.save_file(other, tmp_path / "w.safetensors")
    for number, source in enumerate(("w.pt", "w.safetensors")):
        capsys.readouterr()
        run(*new, "--model", "pixelcnn", *TINY, "--init-from", tmp_path / source, "--out", tmp_path / str(number))
        assert ("taken in order" in capsys.readouterr().out) == (number == 1)
    for name in ("a", "0", "1"):
        model = fastgen.load(tmp_path / name)
        assert isinstance(model, PixelCNN)
        for key, value in model.state_dict().items():
            torch.testing.assert_close(value, before[key], rtol=0, atol=1e-9)
    larger = [*new, "--model", "pixelcnn", "--set", "layers=2", "--out", tmp_path / "b", "--init-from"]
    assert "does not fit PixelCNN" in refused(capsys, *larger, tmp_path / "w.pt")
    assert "--model is needed" in refused(capsys, *new, "--out", tmp_path / "b", "--init-from", tmp_path / "w.pt")


def test_levels_are_told_and_can_be_asked_for(tmp_path, capsys):
    path = tmp_path / "binary.npz"
    np.savez(path, images=np.random.RandomState(0).randint(2, size=(40, 4, 4)).astype(np.uint8))
    new = ["train", "--model", "pixelcnn", "--data", f"npz:{path}", "--steps", 1, *TINY, "--out"]
    run(*new, tmp_path / "a")
    assert "images hold 0..1 only, taken as 2 levels" in capsys.readouterr().out
    assert fastgen.load(tmp_path / "a").levels == 2
    run(*new, tmp_path / "b", "--levels", 5)
    run("train", "--resume", "--out", tmp_path / "b", "--steps", 2, "--device", "cpu")
    run("evaluate", tmp_path / "b", "--data", f"npz:{path}", "--device", "cpu")
    assert "uniform 2.322" in capsys.readouterr().out


def test_a_run_resumes_from_any_folder_but_not_with_other_images(images, tmp_path, monkeypatch, capsys):
    content = images.read_bytes()
    (tmp_path / "mine.npz").write_bytes(content)
    monkeypatch.chdir(tmp_path)
    run("train", "--model", "pixelcnn", "--data", "npz:mine.npz", "--out", "run", "--steps", 2, *TINY)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    resume = ["train", "--resume", "--out", tmp_path / "run", "--device", "cpu", "--steps"]
    run(*resume, 3)
    (tmp_path / "mine.npz").rename(tmp_path / "moved.npz")
    assert "mine.npz" in refused(capsys, *resume, 4)
    run(*resume, 4, "--data", "npz:../moved.npz")
    with np.load(tmp_path / "moved.npz") as file:
        arrays = dict(file)
    arrays["images"] = arrays["images"][:, ::-1]
    np.savez(tmp_path / "moved.npz", **arrays)
    assert "other images" in refused(capsys, *resume, 5)


def test_pixelcnnpp_says_what_to_take_instead(tmp_path, capsys):
    line = refused(capsys, "train", "--model", "pixelcnnpp", "--data", "digits", "--out", tmp_path / "run")
    assert "17 levels" in line and "--model gated_pixelcnn" in line


# --- sample


def drawn(trained, name, out, *options):
    run("sample", trained / name, "--n", 6, "--out", out, "--device", "cpu", *options)


def test_sample_as_arrays_and_as_files(trained, tmp_path):
    drawn(trained, "gated_pixelcnn", tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as file:
        assert file["images"].shape == (6, 1, 4, 4) and int(file["levels"]) == 3
        assert file["labels"].tolist() == [0, 1] * 3
        levels = file["images"]
    direct = fastgen.load(trained / "gated_pixelcnn").sample(6, seed=0, condition=torch.arange(6) % 2)
    assert np.array_equal(levels, direct.numpy())
    drawn(trained, "gated_pixelcnn", tmp_path / "many")
    files = sorted((tmp_path / "many").iterdir())
    assert [path.name for path in files] == [f"{number}.png" for number in range(6)]
    for path, image in zip(files, levels, strict=True):
        assert np.array_equal(np.asarray(Image.open(path)), np.round(image[0] * 127.5).astype(np.uint8))
    # What was drawn can be scored: it is a data set.
    assert data.load(f"npz:{tmp_path / 'a.npz'}").levels == 3


def test_top_k_and_top_p(trained, tmp_path):
    for options, mode in (((), False), (("--top-k", 1), True), (("--top-p", 1e-6), True)):
        drawn(trained, "pixelcnn", tmp_path / "a.npz", *options)
        with np.load(tmp_path / "a.npz") as file:
            same = (file["images"] == file["images"][:1]).all()
        assert same == mode


def test_many_samples_are_paged(trained, tmp_path, capsys):
    run("sample", trained / "vae", "--n", 900, "--out", tmp_path / "s.png", "--device", "cpu")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s-1.png", "s-2.png", "s-3.png"]
    assert "s-1.png to s-3.png" in capsys.readouterr().out


# --- complete, reconstruct, interpolate


def tile(sheet, row, column):
    return sheet[2 + 50 * row : 50 + 50 * row, 2 + 50 * column : 50 + 50 * column][6::12, 6::12, 0]


def test_complete_images_and_a_mask_of_ones_own(trained, tmp_path, capsys):
    levels = np.random.RandomState(0).randint(3, size=(2, 4, 4)).astype(np.uint8)
    for number, image in enumerate(levels):
        Image.fromarray(np.round(image * 127.5).astype(np.uint8)).save(tmp_path / f"{number}.png")
    np.save(tmp_path / "images.npy", levels)
    keep = np.eye(4, dtype=np.uint8)
    Image.fromarray(keep * 255).save(tmp_path / "mask.png")
    np.save(tmp_path / "mask.npy", keep.astype(bool))
    common = ["complete", trained / "pixelcnn", "--device", "cpu", "--out", tmp_path / "out.png"]
    sheets = []
    for source, mask in (("images.npy", "mask.npy"), ("images.npy", "mask.png")):
        run(*common, "--images", tmp_path / source, "--mask", tmp_path / mask)
        sheets.append(np.asarray(Image.open(tmp_path / "out.png")))
    assert np.array_equal(*sheets)
    for row in range(2):
        shown = np.round(levels[row] * 127.5)
        assert np.array_equal(tile(sheets[0], row, 0), shown)
        for column in range(2, 6):
            assert (tile(sheets[0], row, column) == shown)[keep == 1].all()
        assert any((tile(sheets[0], row, column) != shown).any() for column in range(2, 6))
    run(*common, "--images", tmp_path / "1.png")
    assert np.array_equal(tile(np.asarray(Image.open(tmp_path / "out.png")), 0, 0), np.round(levels[1] * 127.5))
    np.save(tmp_path / "mask.npy", np.ones((3, 4)))
    assert "4 rows of 4 pixels" in refused(
        capsys, *common, "--images", tmp_path / "1.png", "--mask", tmp_path / "mask.npy"
    )
    np.save(tmp_path / "images.npy", levels + 1)
    assert "levels 0..2" in refused(capsys, *common, "--images", tmp_path / "images.npy")
    conditional = ["complete", trained / "gated_pixelcnn", "--images", tmp_path / "1.png", "--device", "cpu"]
    assert "--label is needed" in refused(capsys, *conditional, "--out", tmp_path / "out.png")
    run(*conditional, "--label", 1, "--out", tmp_path / "out.png")


def test_reconstruct_and_interpolate(images, trained, tmp_path):
    common = [trained / "vae", "--data", f"npz:{images}", "--device", "cpu", "--n"]
    run("reconstruct", *common, 3, "--out", tmp_path / "r.png")
    sheet = np.asarray(Image.open(tmp_path / "r.png"))
    test = data.load(f"npz:{images}").test.images[:3, 0].numpy()
    assert sheet.shape == (2 * 50 + 2, 3 * 50 + 2, 3)
    assert all(np.array_equal(tile(sheet, 0, column), np.round(test[column] * 127.5)) for column in range(3))
    run("interpolate", *common, 1, "--steps", 5, "--out", tmp_path / "i.png")
    assert np.asarray(Image.open(tmp_path / "i.png")).shape == (52, 5 * 50 + 2, 3)


# --- the rest


def test_a_gaussian_is_scored_as_it_is_trained_by_the_probabilities_of_levels(images, tmp_path, capsys):
    new = ["train", "--model", "vae", "--data", f"npz:{images}", "--steps", 1, "--device", "cpu", "--set", "channels=4"]
    run(*new, "--set", "likelihood=gaussian", "--out", tmp_path / "run")
    capsys.readouterr()
    run("evaluate", tmp_path / "run", "--data", f"npz:{images}", "--device", "cpu", "--samples", 2)
    shown = capsys.readouterr().out
    assert "density" not in shown and shown.count("bits/dim") == 2


def test_bench_help_without_a_checkout(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "fastgen" / "cli" / "bench.py"))
    run("bench", "--help")
    assert "usage: fastgen bench" in capsys.readouterr().out
    assert "source checkout" in refused(capsys, "bench", "masked_conv2d")


def test_a_missing_apple_gpu_is_named(trained, capsys):
    if torch.backends.mps.is_available():
        pytest.skip("there is an Apple GPU")
    assert "--device mps" in refused(capsys, "sample", trained / "vae", "--device", "mps")


def test_toml_without_a_reader(monkeypatch, tmp_path, capsys):
    for name in ("tomllib", "tomli"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "pip install tomli" in refused(capsys, "train", "--config", tmp_path / "a.toml", "--out", tmp_path / "run")
