"""A run resumes exactly where it stopped: at its end, by a kill, by a signal. Foreign files are refused."""

import os
import pickle
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from small_runs import QUICK, autoencoder, contents, gated, rows, train, vae

import fastgen
from fastgen import checkpoint
from fastgen.models import GatedPixelCNN, PixelCNN
from fastgen.train import METRICS, STATE, read_state
from fastgen.train.run import Run

BUILD = {"gated": gated, "vae": vae, "autoencoder": autoencoder}


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
    again = train(gated(), stripes, tmp_path, replace(changed, max_seconds=1e9), resume=True, progress=True)
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
    """The run is saved at once, without finishing the validation."""
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


def test_refuses_fewer_steps_than_were_made(stripes, tmp_path):
    train(gated(), stripes, tmp_path, replace(QUICK, steps=3), progress=False)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="steps must be at least 3, which this run has reached, got 2"):
        train(gated(), stripes, tmp_path, replace(QUICK, steps=2), resume=True, progress=False)
    assert contents(tmp_path) == before
    assert train(gated(), stripes, tmp_path, replace(QUICK, steps=3), resume=True, progress=False).steps == 3


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


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weights", {}, "damaged"),
        ("weights", None, "is not a training state"),
        ("step", "3", "is not a training state"),
        ("best_weights", [1], "is not a training state"),
        ("data", {}, "is not a training state"),
    ],
)
def test_refuses_a_state_that_does_not_fit(stripes, tmp_path, name, value, message):
    train(gated(), stripes, tmp_path, replace(QUICK, steps=1), progress=False)
    torch.save({**read_state(tmp_path), name: value}, tmp_path / STATE)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"{STATE}: .*{message}"):
        train(gated(), stripes, tmp_path, QUICK, resume=True, progress=False)
    assert contents(tmp_path) == before


def test_refuses_a_state_of_which_a_bit_has_flipped(stripes, tmp_path):
    """torch.load reads it without complaint, as other weights."""
    train(gated(), stripes, tmp_path, replace(QUICK, steps=1), progress=False)
    weights = next(iter(read_state(tmp_path)["weights"].values())).numpy().tobytes()
    content = bytearray((tmp_path / STATE).read_bytes())
    content[content.index(weights)] ^= 1
    (tmp_path / STATE).write_bytes(content)
    torch.load(tmp_path / STATE, weights_only=True)
    with pytest.raises(ValueError, match=f"{STATE}: is damaged: the checksum of .* does not match"):
        train(gated(), stripes, tmp_path, QUICK, resume=True, progress=False)
