"""`fastgen.save` and `fastgen.load`: exact and atomic; foreign and damaged files are refused."""

import errno
import json
import os
import pickle

import pytest
import safetensors.torch
import torch

import fastgen
from fastgen.models import VAE, Autoencoder, GatedPixelCNN, PixelCNN, PixelCNNPP, PixelRNN

MODELS = {
    "pixelcnn": lambda: PixelCNN((1, 4, 4), 3, channels=4, layers=1),
    "gated": lambda: GatedPixelCNN((3, 4, 5), 4, channels=4, layers=2, n_classes=3, dropout=0.5),
    "plusplus": lambda: PixelCNNPP((1, 4, 4), channels=4, layers=1, n_mix=2, weight_norm=True),
    "vae": lambda: VAE((1, 4, 4), 2, likelihood="categorical", levels=3, channels=4, hidden=8),
    "autoencoder": lambda: Autoencoder((1, 4, 4), latent_dim=2, levels=3, channels=4, hidden=8),
    "rnn": lambda: PixelRNN((1, 4, 4), 3, kind="row_lstm", hidden_channels=4, layers=1),
    "bfloat16": lambda: PixelCNN((1, 4, 4), 3, channels=4, layers=1).bfloat16(),
}


@pytest.fixture
def saved(tmp_path):
    fastgen.save(MODELS["pixelcnn"](), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("name", MODELS)
def test_comes_back_as_it_was(name, tmp_path):
    model = MODELS[name]()
    folder = tmp_path / "a" / "b"
    fastgen.save(model, folder)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    before = torch.get_rng_state()
    loaded = fastgen.load(folder)
    assert torch.equal(before, torch.get_rng_state())
    assert type(loaded) is type(model) and not loaded.training
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert state[key].dtype == value.dtype and torch.equal(state[key], value)
    x = torch.randint(model.levels, (2, *model.shape))
    condition = None if model.n_classes is None else torch.tensor([0, 2])
    torch.manual_seed(7)
    loss = model.eval().loss(x, condition)
    torch.manual_seed(7)
    assert torch.equal(loaded.loss(x, condition), loss)
    assert all(p.requires_grad for p in loaded.parameters())
    fastgen.save(loaded, folder)  # over the old files, from a loaded model
    assert fastgen.load(folder).constructor_arguments() == loaded.constructor_arguments()


def test_the_configuration_can_be_read(saved):
    config = json.loads((saved / "config.json").read_text())
    assert config["class"] == "PixelCNN"
    assert config["arguments"] == {"shape": [1, 4, 4], "levels": 3, "channels": 4, "layers": 1}
    assert config["versions"]["fastgen"] == fastgen.__version__ and config["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("kind", [PixelCNN, GatedPixelCNN])
@pytest.mark.parametrize("asked", [{}, {"channels": 128}, {"channels": 100}, {"channels": 129}])
def test_files_of_colour_models_from_before_channels_filled_blocks_load(kind, asked, tmp_path):
    """Their files hold the number of channels that was asked for, which was rounded up to a multiple of the colours."""
    count = -(-asked.get("channels", 128) // 3) * 3
    model = kind((3, 4, 4), 3, channels=count, layers=1)
    arguments = {"shape": [3, 4, 4], "levels": 3, "layers": 1, **asked}
    model.__dict__["_built_with"] = ((), arguments)
    fastgen.save(model, tmp_path)
    loaded = fastgen.load(tmp_path)
    assert loaded.head[1].weight.shape == model.head[1].weight.shape
    fastgen.save(loaded, tmp_path)
    assert fastgen.load(tmp_path).constructor_arguments()["channels"] == count


def test_files_of_colour_models_say_the_channels_that_were_built(tmp_path):
    model = GatedPixelCNN((3, 4, 4), 3, layers=1)
    assert model.head[1].in_channels == 192
    fastgen.save(model, tmp_path)
    assert fastgen.load(tmp_path).head[1].in_channels == 192
    small = PixelCNN((3, 4, 4), 3, channels=8, layers=1)
    assert small.head[1].in_channels == 18 and small.constructor_arguments()["channels"] == 9


def test_a_copied_model_can_be_saved(tmp_path):
    model = MODELS["gated"]()
    for number, copy in enumerate((torch.nn.Module.to(model, torch.float64), pickle.loads(pickle.dumps(model)))):
        fastgen.save(copy, tmp_path / str(number))
        assert fastgen.load(tmp_path / str(number)).n_classes == 3


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff" * 100, pickle.dumps({"a": 1}), None], ids=repr)
def test_refuses_a_foreign_file(saved, name, content):
    if content is None:
        (saved / name).unlink()
    else:
        (saved / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        fastgen.load(saved)


def test_refuses_every_truncation_and_every_flipped_byte(saved):
    path = saved / "model.safetensors"
    whole = path.read_bytes()
    for length in range(0, len(whole), 997):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            fastgen.load(saved)
    for place in range(0, len(whole), 499):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            fastgen.load(saved)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"class": "Resnet"}, "unknown class 'Resnet'"),
        ({"class": "Tensor"}, "unknown class 'Tensor'"),
        ({"class": None}, "class"),
        ({"format": "another"}, "format"),
        ({"arguments": {"shape": [1, 4, 4], "levels": 3, "channels": 4, "layers": 2}}, "another model"),
        ({"arguments": {"shape": [1, 4, 4], "colour": "red"}}, "another model"),
        ({"arguments": []}, "arguments"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses_a_changed_configuration(saved, change, named):
    path = saved / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=named):
        fastgen.load(saved)


def consistent(saved, arguments, tensors):
    """Two files that agree, as a forger would write them."""
    config = {"format": "fastgen model 1", "class": "PixelCNN", "arguments": arguments}
    (saved / "config.json").write_text(json.dumps(config))
    from fastgen.checkpoint import _checksum

    seal = json.dumps({**config, "sha256": _checksum(tensors)})
    safetensors.torch.save_file(tensors, saved / "model.safetensors", {"fastgen": seal})


def test_refuses_weights_that_do_not_fit(saved):
    arguments = {"shape": [1, 4, 4], "levels": 3, "channels": 4, "layers": 1}
    tensors = safetensors.torch.load_file(saved / "model.safetensors")
    consistent(saved, arguments, tensors)
    fastgen.load(saved)
    for changed, named in (
        ({**tensors, "head.2.bias": torch.zeros(4)}, "shape"),
        ({**tensors, "head.2.bias": torch.zeros(3, dtype=torch.int32)}, "int32"),
        ({**tensors, "surprise": torch.zeros(1)}, "surprise"),
        ({key: value for key, value in tensors.items() if key != "head.2.bias"}, r"head\.2\.bias"),
    ):
        consistent(saved, arguments, changed)
        with pytest.raises(ValueError, match=named):
            fastgen.load(saved)
    consistent(saved, {**arguments, "colour": "red"}, tensors)
    with pytest.raises(ValueError, match="colour"):
        fastgen.load(saved)
    safetensors.torch.save_file(tensors, saved / "model.safetensors")
    with pytest.raises(ValueError, match="not written by"):
        fastgen.load(saved)


def test_refuses_what_is_no_folder(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        fastgen.load(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file"):
        fastgen.load(tmp_path / "file")
    with pytest.raises(ValueError, match=r"config\.json"):
        fastgen.load(tmp_path)


def test_saves_only_its_own_models(tmp_path):
    class Mine(PixelCNN):
        pass

    for model in (torch.nn.Linear(1, 1), Mine((1, 4, 4), 3, channels=4, layers=1)):
        with pytest.raises(TypeError, match=type(model).__name__):
            fastgen.save(model, tmp_path / "model")
    odd = PixelCNN((1, 4, 4), 3, channels=4, layers=1, n_classes=None)
    odd.__dict__["_built_with"] = (((1, 4, 4), 3), {"n_classes": torch.tensor(1)})
    with pytest.raises(TypeError, match="n_classes"):
        fastgen.save(odd, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_full_disk_loses_nothing(saved, monkeypatch, fails):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    real = getattr(os, fails)

    def full(first, *rest):
        if fails == "fsync" and os.fstat(first).st_size > 1000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if fails == "replace":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(first, *rest)

    monkeypatch.setattr(os, fails, full)
    with pytest.raises(OSError, match="No space left"):
        fastgen.save(MODELS["plusplus"](), saved)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    fastgen.load(saved)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_an_error_names_the_file_and_not_its_temporary_name(saved, monkeypatch):
    import builtins

    real = builtins.open
    monkeypatch.setattr(
        builtins, "open", lambda path, *mode: real("/dev/full" if str(path).endswith(".tmp") else path, *mode)
    )
    with pytest.raises(OSError, match=r"model\.safetensors'$"):
        fastgen.save(MODELS["pixelcnn"](), saved)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "model"):
        with pytest.raises(ValueError, match=r"folder must be a folder, .*file is a file"):
            fastgen.save(MODELS["pixelcnn"](), folder)
        with pytest.raises(ValueError, match=r"folder must be a folder, .*file is a file"):
            MODELS["pixelcnn"]().save_pretrained(folder)
