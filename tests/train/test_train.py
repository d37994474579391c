"""Training: learning, measuring, progress, the files of a run, and that failures lose nothing."""

import errno
import itertools
import math
import os
import sys
import types
from dataclasses import replace

import pytest
import torch
from small_runs import QUICK, contents, gated, rows, train
from torch.utils.data import DataLoader, TensorDataset

import fastgen
from fastgen.models import Autoencoder, PixelCNN, PixelCNNPP
from fastgen.train import Settings, check_fit, images_at_once, mean_loss, read_state, unit
from fastgen.train import train as train_anywhere
from fastgen.train.batches import Data
from fastgen.train.run import Run


def test_learns_and_leaves_the_best_weights(stripes, tmp_path):
    settings = replace(QUICK, steps=80, validate_every=10, lr=0.02)
    model = gated()
    result = train(model, stripes, tmp_path, settings, progress=False)
    found = rows(tmp_path)
    validations = [row["validation_bits_per_dim"] for row in found if "validation_bits_per_dim" in row]
    assert len(validations) == 8 and result.best == min(validations) < 0.7 < validations[0]
    assert [row["step"] for row in found if "train_bits_per_dim" in row] == list(range(10, 90, 10))
    device = torch.device("cpu")
    name, factor = unit(model)
    assert name == "bits_per_dim" and not model.training
    assert mean_loss(model, stripes.validation, device) * factor == result.best
    loaded = fastgen.load(tmp_path)
    assert mean_loss(loaded, stripes.validation, device) * factor == result.best
    exact = -loaded.log_prob(stripes.validation.images.long(), stripes.validation.labels).mean() / (12 * math.log(2))
    assert abs(exact.item() - result.best) < 1e-5


def test_stops_when_time_is_out(stripes, tmp_path):
    result = train(gated(), stripes, tmp_path, replace(QUICK, max_seconds=0.0), progress=False)
    assert (result.steps, result.reason) == (1, "out of time")
    fastgen.load(tmp_path)


def test_every_epoch_shows_every_image_once(stripes):
    source = Data(stripes).train
    epochs = [
        [place for position in range(4) for place in source.places(4 * epoch + position, 5, 0).tolist()]
        for epoch in range(2)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(20)) and epochs[0] != epochs[1]
    assert sorted(source.places(0, 500, 0).tolist()) == list(range(20))


def test_learning_rate_rises_and_falls():
    settings = Settings(steps=1000, decay_steps=1000, lr=1.0, warmup=10)
    rates = [settings.learning_rate(step) for step in range(1200)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9] > 0.99
    assert all(a > b for a, b in itertools.pairwise(rates[9:1001]))
    assert rates[500] == pytest.approx(0.505) and rates[1000] == rates[1199] == pytest.approx(0.01)
    # A short run is the beginning of a longer one.
    assert Settings(steps=5).learning_rate(4) == Settings(steps=50).learning_rate(4)


def test_gradients_are_clipped_and_averages_follow(stripes, tmp_path):
    model = PixelCNN((1, 4, 3), 4, channels=4, layers=1)
    run = Run(model, Data(stripes), tmp_path, replace(QUICK, clip=1e-3, weight_decay=0.0), torch.device("cpu"))
    before = [p.detach().clone() for p in model.parameters()]
    run.train_step()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert float(run.gradient_norm) > 0.01 and norm == pytest.approx(1e-3, rel=1e-3)
    decay = min(QUICK.ema, 2 / 11)
    for old, new, average in zip(before, model.parameters(), run.average.parameters(), strict=True):
        torch.testing.assert_close(average, decay * old + (1 - decay) * new)


def test_a_full_disk_stops_the_run_and_keeps_what_was_saved(stripes, tmp_path, monkeypatch):
    train(gated(), stripes, tmp_path, replace(QUICK, steps=3), progress=False)
    before = contents(tmp_path)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        train(gated(), stripes, tmp_path, QUICK, resume=True, progress=False)
    monkeypatch.undo()
    assert contents(tmp_path) == before


def test_a_loss_that_is_not_finite_is_reported(stripes, tmp_path):
    model = gated()
    with torch.no_grad():
        model.head[2].bias[0] = math.nan
    for every, step in ((50, 10), (2, 2)):
        with pytest.raises(FloatingPointError, match=f"nan at step {step}:"):
            train(model, stripes, tmp_path, replace(QUICK, steps=20, validate_every=every), progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("validated", [True, False])
@pytest.mark.parametrize(("steps", "broken"), [(7, 6), (12, 7)])  # at the end of the run, at a scheduled validation
def test_a_state_that_is_not_finite_does_not_replace_the_one_before(validated, steps, broken, stripes, tmp_path):
    data = stripes if validated else DataLoader(TensorDataset(stripes.train.images, stripes.train.labels), batch_size=8)
    settings = replace(QUICK, steps=steps, validate_every=4)
    with pytest.raises(FloatingPointError, match=r"is (not finite|nan) at step [78]"):
        train(gated(), data, tmp_path, settings, schedule=lambda s: math.nan if s >= broken else 1e-3, progress=False)
    state = read_state(tmp_path)
    assert state["step"] == 4
    assert all(weight.isfinite().all() for name in ("weights", "best_weights") for weight in state[name].values())
    assert all(weight.isfinite().all() for weight in fastgen.load(tmp_path).parameters())


def test_wrong_devices_are_named(stripes, tmp_path):
    for device in ("zzz", "cuda:99"):
        with pytest.raises(ValueError, match=f"device must be one that torch finds, got '{device}'"):
            train(gated(), stripes, tmp_path, QUICK, device=device)
    assert not list(tmp_path.iterdir())


def test_model_and_data_must_fit(stripes):
    for model, named in (
        (PixelCNN((1, 4, 4), 4, channels=4, layers=1), r"shape \(1, 4, 3\).*--resize N"),
        (PixelCNN((1, 4, 3), 5, channels=4, layers=1), "4 levels, the model has 5"),
        (PixelCNNPP((1, 4, 3), channels=4, layers=1, n_mix=1), "256"),
        (PixelCNN((1, 4, 3), 4, channels=4, layers=1, n_classes=1), "1 classes"),
    ):
        with pytest.raises(ValueError, match=named):
            check_fit(model, stripes)
    unlabelled = replace(stripes, n_classes=None)
    check_fit(PixelCNN((1, 4, 3), 4, channels=4, layers=1), unlabelled)
    with pytest.raises(ValueError, match="none"):
        check_fit(gated(), unlabelled)


def test_scores_fewer_images_at_once_where_they_are_large():
    assert images_at_once(gated()) == 256
    assert 10 < images_at_once(PixelCNN((3, 32, 32), 256, channels=3, layers=1)) < 100
    assert images_at_once(Autoencoder((3, 300, 300), 2, channels=1, hidden=1, network="mlp")) == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 0), ("batch_size", 0), ("warmup", -1), ("decay_steps", 0), ("validate_every", 0), ("patience", -1)]
    + [("lr", 0.0), ("lr", math.nan), ("clip", 0.0), ("weight_decay", -1.0), ("ema", 1.0), ("seed", -1)]
    + [("lr", "0.1"), ("beta", None), ("ema", "0.9"), ("max_seconds", "60")]
    + [("max_seconds", math.nan), ("max_seconds", -1.0), ("steps", True), ("seed", False), ("lr", True)],
)
def test_bad_settings_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        Settings(**{field: value})


def test_progress_is_shown(stripes, tmp_path, capsys):
    train(gated(), stripes, tmp_path, replace(QUICK, steps=6), progress=True)
    shown = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in shown] == ["step 3 of 6", "step 6 of 6"]


def test_tensorboard_where_installed(stripes, tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def close(self):
            written.append("closed")

        def add_scalar(self, name, value, step):
            written.append((name, step))

        def add_image(self, name, pixels, step, dataformats):
            written.append((name, pixels.shape, step, dataformats))

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    train(gated(), stripes, tmp_path, replace(QUICK, steps=3, samples=4), progress=False)
    picture = ("samples", (2 * 50 + 2, 2 * 38 + 2, 3), 3, "HWC")
    assert written == [(str(tmp_path / "tensorboard"), 1), picture, ("validation_bits_per_dim", 3), "closed"]
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["step-0000003.png"]


@pytest.mark.gpu
def test_trains_on_a_gpu(stripes, tmp_path):
    train_anywhere(gated(), stripes, tmp_path / "whole", QUICK, progress=False, device="cuda")
    train_anywhere(gated(), stripes, tmp_path / "parts", replace(QUICK, steps=4), progress=False, device="cuda")
    train_anywhere(gated(), stripes, tmp_path / "parts", QUICK, resume=True, progress=False, device="cuda")
    assert rows(tmp_path / "parts")[-1] == pytest.approx(rows(tmp_path / "whole")[-1], rel=1e-3)
