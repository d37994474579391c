"""The command line: its results, and one line with exit status 2 for wrong usage or input."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import fastgen
from fastgen import cli, data
from fastgen.cli import doctor
from fastgen.cli.training import MODELS, new_model
from fastgen.models import PixelCNN
from tests.cli.commands import TINY, refused


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """npz:PATH of 40 images of 4x4 with 3 levels and 2 classes."""
    path = tmp_path_factory.mktemp("data") / "small.npz"
    random = np.random.RandomState(0)
    labels = random.randint(2, size=40)
    np.savez(
        path, images=(random.rand(40, 4, 4) * 2 + labels[:, None, None] / 2).astype(np.uint8), labels=labels, levels=3
    )
    return f"npz:{path}"


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """Runs of each kind, by name of the model; "conditional" is a conditional gated_pixelcnn."""
    root = tmp_path_factory.mktemp("runs")
    for name in ("gated_pixelcnn", "vae", "autoencoder"):
        options = ["--set", "channels=4", "--batch-size", "8"] if name != "gated_pixelcnn" else TINY
        assert (
            cli.main(["train", "--model", name, "--data", images, "--steps", "2", "--out", str(root / name), *options])
            == 0
        )
    arguments = ["train", "--model", "gated_pixelcnn", "--conditional", "--data", images, "--steps", "60", *TINY]
    arguments += ["--validate-every", "30", "--lr", "0.03"]
    assert cli.main([*arguments, "--out", str(root / "conditional")]) == 0
    return root


def test_trains_and_resumes_as_if_it_had_never_stopped(images, tmp_path, capsys):
    common = ["train", "--model", "gated_pixelcnn", "--data", images, *TINY, "--seed", "3"]
    assert cli.main([*common, "--steps", "5", "--out", str(tmp_path / "whole")]) == 0
    assert cli.main([*common, "--steps", "3", "--out", str(tmp_path / "parts")]) == 0
    assert "GatedPixelCNN with" in capsys.readouterr().out
    assert cli.main(["train", "--resume", "--steps", "5", "--device", "cpu", "--out", str(tmp_path / "parts")]) == 0
    for name in ("metrics.jsonl", "model.safetensors"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert "step 5" in capsys.readouterr().out
    model = fastgen.load(tmp_path / "parts")
    assert model.constructor_arguments()["channels"] == 4


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32)], ids=str)
def test_every_model_can_be_built_for_every_data(name, shape):
    levels = 256 if name == "pixelcnnpp" or shape[0] == 3 else 17
    split = data.Split(torch.zeros(2, *shape, dtype=torch.uint8), torch.tensor([0, 1]))
    dataset = data.Dataset("x", levels, 2, split, split, split)
    small = {"pixelcnn": 2, "gated_pixelcnn": 2, "pixelcnnpp": 1, "pixelrnn": 1}
    options = {"layers": small[name]} if name in small else {}
    options["hidden_channels" if name == "pixelrnn" else "channels"] = 3
    model = new_model(name, dataset, True, options)
    assert (model.shape, model.levels, model.n_classes) == (shape, levels, 2)
    if shape[0] == 1:
        assert torch.isfinite(model.loss(split.images.long(), split.labels))


def test_evaluate(images, trained, capsys):
    for name, expected in (
        ("gated_pixelcnn", ["bits/dim", "uniform 1.585", "histogram"]),
        ("conditional", ["bits/dim", "Bayes' rule"]),
        ("vae", ["<= ", "bits/dim"]),
        ("autoencoder", ["squared error"]),
    ):
        capsys.readouterr()
        assert cli.main(["evaluate", str(trained / name), "--data", images, "--samples", "3"]) == 0
        shown = capsys.readouterr().out
        assert all(text in shown for text in expected), shown
    dataset = data.load(images)
    run = str(trained / "gated_pixelcnn")
    assert cli.main(["evaluate", run, "--data", images, "--split", "validation", "--device", "cpu"]) == 0
    nats = -fastgen.load(trained / "gated_pixelcnn").log_prob(dataset.validation.images.long()).mean()
    assert f"{nats / (16 * np.log(2)):.3f} bits/dim" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["gated_pixelcnn", "conditional", "vae"])
def test_sample_depends_on_the_seed_alone(name, trained, tmp_path):
    def drawn(file, *options):
        arguments = ["sample", str(trained / name), "--n", "6", "--out", str(tmp_path / "new" / file), *options]
        assert cli.main(arguments) == 0
        return np.asarray(Image.open(tmp_path / "new" / file))

    first = drawn("a.png")
    assert np.array_equal(first, drawn("b.png", "--seed", "0"))
    assert not np.array_equal(first, drawn("c.png", "--seed", "1"))
    if name != "vae":
        assert np.array_equal(first, drawn("d.png", "--backend", "naive"))
    if name == "conditional":
        assert not np.array_equal(first, drawn("e.png", "--label", "1"))


@pytest.mark.parametrize("name", ["gated_pixelcnn", "conditional"])
def test_complete_keeps_the_upper_half(name, images, trained, tmp_path):
    path = tmp_path / "completions.png"
    assert cli.main(["complete", str(trained / name), "--data", images, "--n", "3", "--out", str(path)]) == 0
    sheet = np.asarray(Image.open(path))
    assert sheet.shape == (3 * 50 + 2, 6 * 50 + 2, 3)
    assert len({sheet[2:26, 2 + 50 * k : 50 + 50 * k].tobytes() for k in range(6)}) == 1
    assert len({sheet[26:50, 2 + 50 * k : 50 + 50 * k].tobytes() for k in range(6)}) > 1


def test_wrong_usage_is_one_line(images, trained, tmp_path, capsys):
    run = trained / "gated_pixelcnn"
    new = ["train", "--model", "pixelcnn", "--data", images, "--out", tmp_path / "new"]
    for arguments, named in (
        ([], "COMMAND"),
        (["trian"], "'trian'"),
        (["train", "--stps", "3"], "--stps.*--steps"),
        (["train", "--model", "pixelcnn"], "--out"),
        (["train", "--out", tmp_path / "new", "--data", images], "--model"),
        (["evaluate", run], "--data"),
        ([*new, "--steps", "many"], "'many'"),
        ([*new, "--lr", "nan"], "'nan'"),
        ([*new, "--lr", "0"], "lr"),
        ([*new, "--ema", "1.5"], "ema"),
        ([*new, "--seed", "-1"], "--seed"),
        ([*new, "--set", "channels"], "NAME=VALUE"),
        ([*new, "--set", "chanels=3"], "chanels=3.*channels"),
        ([*new, "--set", "levels=3"], "levels=3"),
        (
            ["train", "--model", "gated_pixelcnn", "--data", images, "--out", tmp_path, "--set", "dropout='x'"],
            "dropout must be .*'x'",
        ),
        ([*new, "--set", "channels=none"], "'none'"),
        (["train", "--model", "pixelcnn", "--data", "patches", "--conditional", "--out", tmp_path / "new"], "classes"),
        (["train", "--model", "pixelcnn", "--data", "digit", "--out", tmp_path / "new"], "'digit'"),
        (["train", "--model", "pixelcnnpp", "--data", images, "--out", tmp_path / "new"], "3 levels"),
        (["train", "--model", "pixelcnn", "--data", images, "--out", run], "--resume"),
        (["train", "--resume", "--out", tmp_path / "new"], r"training\.pt"),
        (["train", "--resume", "--out", run, "--set", "channels=3"], "--set"),
        (["train", "--resume", "--out", run, "--seed", "5"], "seed = 0.*5"),
        (["train", "--resume", "--out", run, "--model", "vae"], "GatedPixelCNN"),
        (["train", "--resume", "--out", run, "--data", "digits"], "shape"),
        ([*new, "--beta", "2"], "beta is a setting for a VAE"),
        ([*new, "--set", "steps=many"], "steps must be an int.*'many'"),
        ([*new, "--init-from", tmp_path / "nothing.pt"], r"nothing\.pt"),
        ([*new, "--config", tmp_path / "nothing.toml"], r"nothing\.toml"),
        ([*new, "--precision", "float8"], "float8"),
        ([*new, "--resize", "4"], "image files"),
        (["evaluate", run, "--data", "digits"], r"\(1, 8, 8\)"),
        (["evaluate", tmp_path / "nothing", "--data", images], "nothing"),
        (["sample", run, "--n", "0"], "--n"),
        (["sample", run, "--out", tmp_path / "a.gif"], r"a\.gif"),
        (["sample", run, "--label", "1", "--out", tmp_path / "a.png"], "--label"),
        (["sample", trained / "conditional", "--label", "2", "--out", tmp_path / "a.png"], r"0\.\.1"),
        (["sample", trained / "autoencoder", "--out", tmp_path / "a.png"], "Autoencoder"),
        (["sample", run, "--backend", "magic"], "magic"),
        (["sample", run, "--temperature", "-1", "--out", tmp_path / "a.png"], "temperature"),
        (["complete", trained / "vae", "--data", images, "--out", tmp_path / "a.png"], "VAE"),
        (["complete", run, "--data", images, "--n", "99", "--out", tmp_path / "a.png"], "--n 99"),
        (["complete", run, "--out", tmp_path / "a.png"], "--data or --images"),
        (["complete", run, "--images", tmp_path / "no.png", "--out", tmp_path / "a.png"], r"no\.png"),
        (["sample", trained / "vae", "--top-k", "2", "--out", tmp_path / "a.png"], "--top-k"),
        (["sample", run, "--top-p", "2", "--out", tmp_path / "a.png"], "top_p"),
        (["reconstruct", run, "--data", images, "--out", tmp_path / "a.png"], "GatedPixelCNN"),
        (["interpolate", trained / "autoencoder", "--data", images, "--out", tmp_path / "a.png"], "Autoencoder"),
    ):
        line = refused(capsys, *arguments)
        assert line.startswith("fastgen") and re.search(named, line), line
    assert not (tmp_path / "new").exists() and not (tmp_path / "a.png").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named(trained, capsys):
    assert "--device cuda" in refused(capsys, "sample", trained / "vae", "--device", "cuda")


def test_foreign_and_corrupt_runs_are_named(images, trained, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained / "gated_pixelcnn", run)
    whole = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").write_bytes(whole[:-50])
    assert "model.safetensors" in refused(capsys, "sample", run, "--out", tmp_path / "a.png")
    (run / "config.json").write_text('{"architectures": ["Bert"]}')
    assert "config.json" in refused(capsys, "evaluate", run, "--data", images)
    (run / "training.pt").write_bytes(b"PK")
    assert "training.pt" in refused(capsys, "train", "--resume", "--out", run)


def test_folders_that_cannot_be_written_are_named(images, trained, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    new = ["train", "--model", "pixelcnn", "--data", images, *TINY, "--out"]
    assert str(tmp_path / "file") in refused(capsys, *new, tmp_path / "file" / "run")
    run = trained / "gated_pixelcnn"
    assert str(tmp_path / "file") in refused(capsys, "sample", run, "--out", tmp_path / "file" / "a.png")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left" in refused(capsys, "sample", run, "--n", "1", "--out", tmp_path / "a.png")
    assert "No space left" in refused(capsys, *new, tmp_path / "run", "--steps", "2")
    assert not (tmp_path / "a.png").exists() and list((tmp_path / "run").iterdir()) == []


def test_help_of_every_command(capsys):
    for command in ("demo", "train", "evaluate", "sample", "complete", "reconstruct", "interpolate", "doctor"):
        with pytest.raises(SystemExit) as error:
            cli.main([command, "--help"])
        assert error.value.code == 0 and f"usage: fastgen {command}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert fastgen.__version__ in capsys.readouterr().out


def test_a_bug_is_not_hidden(monkeypatch, trained, tmp_path):
    monkeypatch.setattr("fastgen.checkpoint.load", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["sample", str(trained / "vae"), "--out", str(tmp_path / "a.png")])
    monkeypatch.undo()
    monkeypatch.setenv("FASTGEN_DEBUG", "1")
    with pytest.raises(ValueError, match="nothing"):
        cli.main(["sample", str(tmp_path / "nothing"), "--out", str(tmp_path / "a.png")])


def test_too_little_memory_is_one_line(monkeypatch, trained, tmp_path, capsys):
    monkeypatch.setattr("fastgen.checkpoint.load", lambda folder: torch.empty(2**60))
    line = refused(capsys, "sample", trained / "vae", "--out", tmp_path / "a.png")
    assert "out of memory, try a smaller" in line


def test_ctrl_c_of_the_real_command(images, tmp_path):
    """Starts `python -m fastgen`, sends a real signal, checks the exit status, and resumes the run."""
    arguments = ["--model", "pixelcnn", "--data", images, "--steps", "100000", "--patience", "0", *TINY]
    command = [sys.executable, "-m", "fastgen", "train", *arguments, "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step"):
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted at step" in out and "--resume" in out
    step = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert cli.main(["train", "--resume", "--steps", str(step + 3), "--out", str(tmp_path / "run")]) == 0
    assert isinstance(fastgen.load(tmp_path / "run"), PixelCNN)


# --- doctor, bench


def test_doctor(capsys):
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert f"fastgen {fastgen.__version__}" in shown and f"torch {torch.__version__}" in shown
    assert "vae.reparameterize_kl_forward_kernel: " in shown
    assert "catalogue" not in shown


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_doctor_says_why_not(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert doctor.why_no_kernels() == "" and {problem for _, problem in doctor.kernels("")} == {""}
    monkeypatch.delenv("TRITON_INTERPRET")
    reason = doctor.why_no_kernels()
    assert "no GPU" in reason and {problem for _, problem in doctor.kernels(reason)} == {"there is no GPU"}
    real = doctor.importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name == "triton" else real(name))
    assert "triton is not installed" in doctor.why_no_kernels()
    assert ("vae", "no Triton") in doctor.kernels(doctor.why_no_kernels())


def test_doctor_of_other_gpus(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "7.5" in doctor.why_no_kernels()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert doctor.why_no_kernels() == ""
    found = dict(doctor.kernels(""))
    assert found["vae.reparameterize_kl_forward_kernel"] == ""


def test_bench_runs_the_benchmarks(monkeypatch):
    calls = []
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda command, cwd: calls.append((command[1:], cwd)) or subprocess.CompletedProcess(command, 7),
    )
    assert cli.main(["bench", "reparameterize_kl", "--dry-run", "--compare", "old"]) == 7
    assert cli.main(["bench", "--help"]) == 7
    assert [call[0][2:] for call in calls] == [["reparameterize_kl", "--dry-run", "--compare", "old"], ["--help"]]
    assert calls[0][0][:2] == ["-m", "benchmarks"] and (calls[0][1] / "benchmarks" / "__main__.py").is_file()
