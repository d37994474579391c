"""`fastgen demo` writes the files that it promises. Few steps: little is learnt."""

import json

import numpy as np
import pytest
import torch

import fastgen
from fastgen import cli, data
from fastgen.demos import digits as demo
from fastgen.train import Settings

pytest.importorskip("sklearn")


@pytest.fixture
def small(monkeypatch):
    digits = data.load("digits")
    small = data.Dataset("digits", 17, 10, digits.train[:40], digits.validation[:10], digits.test[:16])
    monkeypatch.setattr(data, "load", lambda name: small)
    monkeypatch.setattr(demo, "SETTINGS", Settings(steps=12, batch_size=20, validate_every=6, lr=0.01))
    monkeypatch.setattr(demo, "SIZES", {"channels": 6, "layers": 2})
    monkeypatch.setattr(demo, "SAMPLES", 1)
    monkeypatch.setattr(demo, "REPEATS", 1)
    monkeypatch.setattr(demo, "VAE_STEPS", 5)
    return small


def test_demo_leaves_what_it_promises(tmp_path, small, capsys):
    assert cli.main(["demo", "--out", str(tmp_path / "demo"), "--device", "cpu"]) == 0
    files = {path.name for path in (tmp_path / "demo").iterdir()}
    assert files >= {"samples.png", "completions.png", "curves.png", "metrics.jsonl", "model.safetensors"}
    assert files >= {"config.json", "report.md", "report.html", "report.json", "vae.png"}
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert report["samples_identical"] is True and report["speedup_vs_naive"] > 0 and report["device"] == "cpu"
    assert report["versions"]["torch"] == torch.__version__ and report["seconds"] > 0
    assert report["uniform_bits_per_dim"] == pytest.approx(4.087, abs=5e-4)
    assert report["vae"]["bits_per_dim"]["importance"] > 0
    model = fastgen.load(tmp_path / "demo")
    nats = -model.log_prob(small.test.images.long(), small.test.labels).mean().item()
    assert report["test_bits_per_dim"] == pytest.approx(nats / (64 * np.log(2)))
    text = (tmp_path / "demo" / "report.md").read_text()
    assert f"{report['test_bits_per_dim']:.3f}" in text and "identical, pixel for pixel" in text
    page = (tmp_path / "demo" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == text.count("![") == 3 + report["curves"]
    assert f"{report['fast_seconds']:.3f}" in page and "<table>" in page
    assert "identical, pixel for pixel" in capsys.readouterr().out


def test_a_second_demo_starts_anew_and_spares_what_is_no_demo(tmp_path, small, capsys):
    command = ["demo", "--out", str(tmp_path), "--device", "cpu"]
    (tmp_path / "training.pt").write_text("somebody's")
    assert cli.main(command) == 2 and "holds a run already" in capsys.readouterr().err
    (tmp_path / "training.pt").unlink()
    for seed in ("1", "2"):
        assert cli.main([*command, "--seed", seed]) == 0
        assert json.loads((tmp_path / "report.json").read_text())["seed"] == int(seed)
