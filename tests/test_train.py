"""Training: exact resumption, early stopping, interrupts, and nothing lost when something fails."""

import errno
import itertools
import json
import math
import os
import pickle
import signal
import sys
import types
from dataclasses import replace
from functools import partial

import pytest
import torch

import fastgen
from fastgen.data import Dataset, Split
from fastgen.models import VAE, Autoencoder, GatedPixelCNN, PixelCNN, PixelCNNPP
from fastgen.train import METRICS, STATE, Settings, check_fit, images_at_once, mean_loss, read_state, unit
from fastgen.train import train as train_anywhere
from fastgen.train.run import Run

train = partial(train_anywhere, device="cpu")  # where the same run gives the same bits
QUICK = Settings(steps=7, batch_size=8, lr=0.01, warmup=2, validate_every=3, ema=0.5)


@pytest.fixture(scope="module")
def stripes():
    """Images of two classes: rows of 3, 0, 3, 0 and of 0, 3, 0, 3, with a little noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 2
    images = (torch.arange(4).view(1, 1, 4, 1) + labels.view(-1, 1, 1, 1)) % 2 * 3
    images = images.repeat(1, 1, 1, 3)
    images[torch.rand(images.shape, generator=generator) < 0.05] = 1
    every = Split(images.to(torch.uint8), labels)
    return Dataset("stripes", 4, 2, every[:20], every[20:30], every[30:])


def gated():
    torch.manual_seed(1)
    return GatedPixelCNN((1, 4, 3), 4, channels=6, layers=2, dropout=0.3, n_classes=2)


def vae():
    torch.manual_seed(1)
    return VAE((1, 4, 3), 2, likelihood="categorical", levels=4, channels=4, hidden=8)


def autoencoder():
    torch.manual_seed(1)
    return Autoencoder((1, 4, 3), 2, levels=4, channels=4, hidden=8)


BUILD = {"gated": gated, "vae": vae, "autoencoder": autoencoder}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rows(folder):
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def same(first, second):
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_resumed_run_equals_one_that_never_stopped(name, stop, stripes, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(BUILD[name](), stripes, whole, replace(QUICK, steps=12), progress=False)
    train(BUILD[name](), stripes, parts, replace(QUICK, steps=stop), progress=False)
    torch.rand(3)  # other use of the random numbers in between changes nothing
    train(BUILD[name](), stripes, parts, replace(QUICK, steps=12), resume=True, progress=False)
    assert contents(parts)[METRICS] == contents(whole)[METRICS]
    assert contents(parts)["model.safetensors"] == contents(whole)["model.safetensors"]
    first, second = read_state(parts), read_state(whole)
    assert first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)


def test_a_killed_run_goes_on_from_its_last_save(stripes, tmp_path, monkeypatch):
    train(gated(), stripes, tmp_path / "whole", QUICK, progress=False)
    step = Run.train_step

    def dies(self):
        if self.step == 5:
            raise RuntimeError("power cut")
        step(self)

    monkeypatch.setattr(Run, "train_step", dies)
    with pytest.raises(RuntimeError, match="power cut"):
        train(gated(), stripes, tmp_path / "parts", QUICK, progress=False)
    monkeypatch.undo()
    assert read_state(tmp_path / "parts")["step"] == 3
    fastgen.load(tmp_path / "parts")
    train(gated(), stripes, tmp_path / "parts", QUICK, resume=True, progress=False)
    assert contents(tmp_path / "parts")[METRICS] == contents(tmp_path / "whole")[METRICS]
    assert contents(tmp_path / "parts")["model.safetensors"] == contents(tmp_path / "whole")["model.safetensors"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", [2, 4])
def test_an_interrupt_saves_after_the_step(number, at, stripes, tmp_path, monkeypatch):
    train(gated(), stripes, tmp_path / "whole", QUICK, progress=False)
    step = Run.train_step

    def interrupted(self):
        if self.step == at - 1:
            os.kill(os.getpid(), number)
        step(self)

    before = signal.getsignal(number)
    monkeypatch.setattr(Run, "train_step", interrupted)
    result = train(gated(), stripes, tmp_path / "parts", QUICK, progress=False)
    monkeypatch.undo()
    assert (result.steps, result.reason) == (at, "interrupted")
    assert signal.getsignal(number) is before
    fastgen.load(tmp_path / "parts")
    result = train(gated(), stripes, tmp_path / "parts", QUICK, resume=True, progress=False)
    assert result.reason == "finished"
    assert contents(tmp_path / "parts")[METRICS] == contents(tmp_path / "whole")[METRICS]


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


def test_stops_without_improvement_and_stays_stopped(stripes, tmp_path, monkeypatch):
    worse = iter(range(100))
    monkeypatch.setattr(Run, "_validation", lambda self: float(next(worse)))
    settings = replace(QUICK, steps=60, validate_every=2, patience=3)
    result = train(gated(), stripes, tmp_path, settings, progress=False)
    assert (result.steps, result.reason, result.best) == (8, "no improvement", 0)
    again = train(gated(), stripes, tmp_path, settings, resume=True, progress=False)
    assert (again.steps, again.reason) == (8, "no improvement")
    unlimited = train(gated(), stripes, tmp_path / "b", replace(settings, patience=0, steps=10), progress=False)
    assert unlimited.reason == "finished"


def test_stops_when_time_is_out(stripes, tmp_path):
    result = train(gated(), stripes, tmp_path, replace(QUICK, max_seconds=0.0), progress=False)
    assert (result.steps, result.reason) == (1, "out of time")
    fastgen.load(tmp_path)


def test_every_epoch_shows_every_image_once(stripes, tmp_path):
    run = Run(gated(), stripes, tmp_path, replace(QUICK, batch_size=5), torch.device("cpu"))
    epochs = []
    for epoch in range(2):
        seen = []
        for position in range(4):
            run.step = 4 * epoch + position
            seen += run._indices().tolist()
        epochs.append(seen)
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(20)) and epochs[0] != epochs[1]
    run = Run(gated(), stripes, tmp_path, replace(QUICK, batch_size=500), torch.device("cpu"))
    assert sorted(run._indices().tolist()) == list(range(20))


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
    run = Run(model, stripes, tmp_path, replace(QUICK, clip=1e-3, weight_decay=0.0), torch.device("cpu"))
    before = [p.detach().clone() for p in model.parameters()]
    run.train_step()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert float(run.gradient_norm) > 0.01 and norm == pytest.approx(1e-3, rel=1e-3)
    decay = min(QUICK.ema, 2 / 11)
    for old, new, average in zip(before, model.parameters(), run.average.parameters(), strict=True):
        torch.testing.assert_close(average, decay * old + (1 - decay) * new)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lr": 0.02}, "lr = 0.01"),
        ({"seed": 5}, "seed = 0"),
        ({"data": "other"}, "data = stripes"),
        ({"model": PixelCNN}, "class = GatedPixelCNN"),
        ({"layers": 3}, "arguments"),
    ],
    ids=str,
)
def test_refuses_to_resume_another_run(change, named, stripes, tmp_path):
    train(gated(), stripes, tmp_path, replace(QUICK, steps=1), progress=False)
    before = contents(tmp_path)
    model, data, settings = gated(), stripes, QUICK
    if "data" in change:
        data = replace(stripes, name="other")
    elif "model" in change:
        model = PixelCNN((1, 4, 3), 4, channels=6, layers=2)
    elif "layers" in change:
        model = GatedPixelCNN((1, 4, 3), 4, channels=6, layers=3, dropout=0.3, n_classes=2)
    else:
        settings = replace(QUICK, **change)
    with pytest.raises(ValueError, match=named):
        train(model, data, tmp_path, settings, resume=True, progress=False)
    assert contents(tmp_path) == before


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("evil",))


def test_refuses_a_foreign_state_without_running_it(stripes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=STATE):
        read_state(tmp_path)
    torch.save({"format": "fastgen training state 1", "x": Evil()}, tmp_path / "evil.pt")
    torch.save({"a": 1}, tmp_path / "other.pt")
    train(gated(), stripes, tmp_path / "run", replace(QUICK, steps=1), progress=False)
    whole = (tmp_path / "run" / STATE).read_bytes()
    for content in (b"", b"x" * 50, pickle.dumps(Evil(), 2), whole[:-500], *map(read, ("evil.pt", "other.pt"))):
        (tmp_path / "run" / STATE).write_bytes(content)
        with pytest.raises(ValueError, match=STATE):
            train(gated(), stripes, tmp_path / "run", QUICK, resume=True, progress=False)
    assert not (tmp_path / "evil").exists()


def read(name):
    with open(name, "rb") as file:
        return file.read()


def test_refuses_a_damaged_state(stripes, tmp_path):
    train(gated(), stripes, tmp_path, replace(QUICK, steps=1), progress=False)
    state = read_state(tmp_path)
    del state["weights"]
    torch.save(state, tmp_path / STATE)
    with pytest.raises(ValueError, match="damaged"):
        train(gated(), stripes, tmp_path, QUICK, resume=True, progress=False)


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


def test_model_and_data_must_fit(stripes):
    for model, named in (
        (PixelCNN((1, 4, 4), 4, channels=4, layers=1), r"shape \(1, 4, 3\)"),
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
    + [("lr", 0.0), ("lr", math.nan), ("clip", 0.0), ("weight_decay", -1.0), ("ema", 1.0), ("seed", -1)],
)
def test_bad_settings_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        Settings(**{field: value})


def test_progress_is_shown(stripes, tmp_path, capsys):
    train(gated(), stripes, tmp_path, replace(QUICK, steps=6))
    shown = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in shown] == ["step 3 of 6", "step 6 of 6"]


def test_tensorboard_where_installed(stripes, tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def __enter__(self):
            return self

        def __exit__(self, *error):
            written.append("closed")

        def add_scalar(self, name, value, step):
            written.append((name, step))

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    train(gated(), stripes, tmp_path, replace(QUICK, steps=3), progress=False)
    assert written == [(str(tmp_path / "tensorboard"), 1), ("validation_bits_per_dim", 3), "closed"]


@pytest.mark.gpu
def test_trains_on_a_gpu(stripes, tmp_path):
    train_anywhere(gated(), stripes, tmp_path / "whole", QUICK, progress=False, device="cuda")
    train_anywhere(gated(), stripes, tmp_path / "parts", replace(QUICK, steps=4), progress=False, device="cuda")
    train_anywhere(gated(), stripes, tmp_path / "parts", QUICK, resume=True, progress=False, device="cuda")
    assert rows(tmp_path / "parts")[-1] == pytest.approx(rows(tmp_path / "whole")[-1], rel=1e-3)
