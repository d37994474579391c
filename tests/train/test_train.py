"""Training: exact resumption, early stopping, interrupts, and nothing lost when something fails."""

import errno
import itertools
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import types
from dataclasses import replace
from functools import partial

import pytest
import torch

import fastgen
from fastgen import checkpoint
from fastgen.data import Dataset, Split
from fastgen.models import VAE, Autoencoder, GatedPixelCNN, PixelCNN, PixelCNNPP
from fastgen.train import METRICS, STATE, Settings, check_fit, images_at_once, mean_loss, read_state, unit
from fastgen.train import train as train_anywhere
from fastgen.train.batches import Data
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
    monkeypatch.setattr(Run, "measure", lambda self, stop=None: float(next(worse)))
    settings = replace(QUICK, steps=60, validate_every=2, patience=3)
    result = train(gated(), stripes, tmp_path, settings, progress=False)
    assert (result.steps, result.reason, result.best) == (8, "no improvement", 0)
    again = train(gated(), stripes, tmp_path, settings, resume=True, progress=False)
    assert (again.steps, again.reason) == (8, "no improvement")
    unlimited = train(gated(), stripes, tmp_path / "b", replace(settings, patience=0, steps=10), progress=False)
    assert unlimited.reason == "finished"


@pytest.mark.parametrize("change", [{"patience": 0}, {"patience": 5}, {"lr": 0.001}, {"steps": 70}], ids=str)
def test_a_run_that_stopped_early_goes_on_where_a_setting_is_new(change, stripes, tmp_path, monkeypatch, capsys):
    worse = iter(range(100))
    monkeypatch.setattr(Run, "measure", lambda self, stop=None: float(next(worse)))
    settings = replace(QUICK, steps=60, validate_every=2, patience=3, decay_steps=60)
    train(gated(), stripes, tmp_path, settings, progress=False)
    changed = replace(settings, **change)
    capsys.readouterr()
    again = train(gated(), stripes, tmp_path, replace(changed, max_seconds=1e9), resume=True)
    name, value = next(iter(change.items()))
    old = getattr(settings, name)
    assert f"resumed at step 8 with {name} {old} -> {value}" in capsys.readouterr().out
    assert again.steps == {"patience": 8 + 2 * value if value else 60, "lr": 14, "steps": 14}[name]
    saved = read_state(tmp_path)["settings"]
    assert saved[name] == value


def test_the_learning_rate_may_change_on_resume(stripes, tmp_path):
    train(gated(), stripes, tmp_path, replace(QUICK, steps=3), progress=False)
    train(gated(), stripes, tmp_path, replace(QUICK, steps=10, lr=0.02), resume=True, progress=False)
    rates = [row["learning_rate"] for row in rows(tmp_path) if "learning_rate" in row]
    assert rates == [replace(QUICK, lr=0.02).learning_rate(9)]


def test_the_same_images_from_another_place_resume(stripes, tmp_path):
    train(gated(), stripes, tmp_path, replace(QUICK, steps=3), progress=False)
    moved = replace(stripes, name="npz:elsewhere")
    train(gated(), moved, tmp_path, QUICK, resume=True, progress=False)
    assert read_state(tmp_path)["data"]["name"] == "npz:elsewhere"


def test_leftovers_of_killed_runs_are_cleared(stripes, tmp_path):
    train(gated(), stripes, tmp_path, replace(QUICK, steps=3), progress=False)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = [f".{STATE}.{number}.tmp" for number in (dead.pid, os.getpid(), os.getppid())]
    for name in (*left, "mine.tmp", ".hidden"):
        (tmp_path / name).touch()
    train(gated(), stripes, tmp_path, replace(QUICK, steps=3), resume=True, progress=False)
    assert {path.name for path in tmp_path.iterdir()} - {STATE, METRICS, "model.safetensors", "config.json"} == {
        left[2],  # of a process that lives
        "mine.tmp",
        ".hidden",
    }


@pytest.mark.parametrize("moment", ["validation", "save", "last validation"])
def test_a_signal_during_a_validation_or_a_save(moment, stripes, tmp_path, monkeypatch):
    """Nothing is lost, and the rest of the validation is not waited for."""
    monkeypatch.setattr("fastgen.train.measure.images_at_once", lambda model: 2)
    train(gated(), stripes, tmp_path / "whole", replace(QUICK, steps=8), progress=False)
    at = {"validation": 6, "save": 6, "last validation": 8}[moment]
    loss, encode, signalled = GatedPixelCNN.loss, checkpoint.encode, []
    scored = []  # batches of validations, by the step

    def signal_once(step):
        if step == at and not signalled:
            signalled.append(step)
            os.kill(os.getpid(), signal.SIGTERM)

    def loss_then(self, *batch):
        found = loss(self, *batch)
        if moment != "save" and not self.training:
            scored.append(Steps.seen)
            signal_once(Steps.seen)
        return found

    def encode_then(*given):
        if moment == "save":
            signal_once(Steps.seen)
        return encode(*given)

    class Steps:
        seen = 0

        def on_step(self, run):
            Steps.seen = run.step

    monkeypatch.setattr(GatedPixelCNN, "loss", loss_then)
    monkeypatch.setattr(checkpoint, "encode", encode_then)
    result = train(gated(), stripes, tmp_path / "parts", replace(QUICK, steps=8), progress=False, callbacks=[Steps()])
    monkeypatch.undo()
    monkeypatch.setattr("fastgen.train.measure.images_at_once", lambda model: 2)
    assert signalled and result.steps == at
    assert moment == "save" or (scored.count(3) == 5 and scored.count(at) == 1)
    assert result.reason == ("finished" if moment == "last validation" else "interrupted")
    assert read_state(tmp_path / "parts")["step"] == at
    fastgen.load(tmp_path / "parts")
    train(gated(), stripes, tmp_path / "parts", replace(QUICK, steps=8), resume=True, progress=False)
    assert contents(tmp_path / "parts")[METRICS] == contents(tmp_path / "whole")[METRICS]
    assert contents(tmp_path / "parts")["model.safetensors"] == contents(tmp_path / "whole")["model.safetensors"]


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


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch_size": 9}, "batch_size = 8"),
        ({"seed": 5}, "seed = 0"),
        ({"beta": 2.0}, "beta"),
        ({"data": "other"}, r"other images than stripes \(was stripes\)"),
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
        data = replace(stripes, train=stripes.train[torch.arange(20).flip(0)])
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
