"""Each example is short, runs, and does what its first line says."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastgen import data
from fastgen.demos import examples
from fastgen.demos.examples import any_model, patch_layers, vae_loss

FOLDER = Path(examples.__file__).parent


def test_every_example_is_short_and_listed():
    names = {path.stem for path in FOLDER.glob("*.py")} - {"__init__"}
    assert names == set(re.findall(r"^(\w+)  +", examples.__doc__, re.M))
    assert all(len((FOLDER / f"{name}.py").read_text().splitlines()) <= 40 for name in names)
    tests = "".join(path.read_text() for path in Path(__file__).parents[1].rglob("test_*.py"))
    assert not [name for name in names if not re.search(rf"examples(\.| import .*\b){name}\b", tests)]


def test_any_model():
    fast, slow, explanation = any_model.main((1, 6, 7))
    assert torch.equal(fast, slow) and len(fast.unique()) == 4 and "backend" in explanation


def test_patch_layers():
    replaced, difference, losses = patch_layers.main(steps=20)
    assert replaced == 2 and difference < 1e-5 and losses[-1] < 0.5 * losses[0]


def test_pixelrnn(tmp_path):
    pytest.importorskip("sklearn")
    from fastgen.demos.examples import pixelrnn

    digits = data.load("digits")
    small = replace(digits, train=digits.train[:64], validation=digits.validation[:16], test=digits.test[:16])
    score, completed, test = pixelrnn.main(tmp_path, steps=2, digits=small, hidden_channels=4, layers=1)
    assert 0 < score.bits_per_dim < 8 and torch.equal(completed[:, :, :4], test[:8, :, :4])
    assert not torch.equal(completed[:, :, 4:], test[:8, :, 4:])


def test_vae_loss():
    history = vae_loss.main(steps=60)
    assert history[-1] < history[0] - 3
