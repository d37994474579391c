"""Weights of other runs and from foreign files: loaded if they fit, otherwise refused by name."""

import functools
from dataclasses import replace

import pytest
import torch
from small_runs import QUICK, Own, dataset, train

from fastgen.models import GatedPixelCNN, PixelCNN
from fastgen.weights import load_weights


def test_weights_of_many_kinds(tmp_path):
    build = functools.partial(GatedPixelCNN, (1, 4, 3), 4, channels=4, layers=2)
    source = build()
    state = source.state_dict()
    kinds = {
        "plain": state,
        "ddp": {f"module.{name}": value for name, value in state.items()},
        "compiled": {"model": {f"_orig_mod.module.{name}": value for name, value in state.items()}},
        "a compiled part": {name.replace("blocks.", "blocks._orig_mod."): value for name, value in state.items()},
        "lightning": {"epoch": 3, "state_dict": {f"model.{name}": value for name, value in state.items()}},
        "masks": {**state, "blocks.0.horizontal.mask": torch.ones(1)},
        "other names": {f"w{number}": value for number, value in enumerate(state.values())},
    }
    for name, content in kinds.items():
        torch.save(content, tmp_path / "w.pt")
        model = build()
        note = load_weights(model, tmp_path / "w.pt")
        assert ("taken in order" in note) == (name == "other names")
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items()), name


def test_weights_that_do_not_fit_are_refused(tmp_path):
    model = GatedPixelCNN((1, 4, 3), 4, channels=4, layers=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = model.state_dict()
    first = next(iter(state))
    for content, named in (
        ({**state, "more": torch.zeros(1)}, "unknown .'more'"),
        ({name: value for name, value in state.items() if name != first}, "missing"),
        ({**state, first: torch.zeros(7)}, "shape"),
        ([1, 2], "holds a list"),
        ({"a": 1}, "no tensors"),
        (Own(), "more than tensors"),
    ):
        torch.save(content, tmp_path / "w.pt")
        with pytest.raises(ValueError, match=named):
            load_weights(model, tmp_path / "w.pt")
    (tmp_path / "w.safetensors").write_bytes(b"nonsense")
    for name in ("w.safetensors", "nothing.pt"):
        with pytest.raises(ValueError, match=name):
            load_weights(model, tmp_path / name)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_init_from_is_where_a_run_starts(tmp_path):
    torch.manual_seed(0)
    build = functools.partial(PixelCNN, (1, 4, 3), 4, channels=4, layers=1)
    first = build()
    train(first, dataset(), tmp_path / "a", replace(QUICK, steps=30))
    second = build()
    train(second, dataset(), tmp_path / "b", replace(QUICK, steps=1, lr=1e-12), init_from=tmp_path / "a")
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="init_from is for a new run"):
        train(build(), dataset(), tmp_path / "b", QUICK, init_from=tmp_path / "a", resume=True)


def test_from_pretrained_looks_on_the_hub_where_there_is_no_folder(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    model = PixelCNN((1, 4, 3), 4, channels=4, layers=1)
    model.save_pretrained(tmp_path / "cache")
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        if name != "somebody/pixels":
            raise OSError("no network")
        return str(tmp_path / "cache")

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    found = PixelCNN.from_pretrained("somebody/pixels")
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in model.state_dict().items())
    assert asked == [("somebody/pixels", ["model.safetensors", "config.json"])]
    with pytest.raises(ValueError, match="somebody/else: no such folder, and not to be had from the hub"):
        PixelCNN.from_pretrained("somebody/else")
    with pytest.raises(ValueError, match="no such folder"):
        PixelCNN.from_pretrained(tmp_path / "nothing")
    assert len(asked) == 2
