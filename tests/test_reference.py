"""The reference contains every public name, with shapes and errors."""

import importlib
import re

import pytest

from fastgen import models, nn, ops, reference

PAGE = reference.markdown()
TENSORS = re.compile(r"\((?:B|n|N|C|T|D|out_channels)\b[^)]*[,)]")  # the start of a shape
NAMES = {
    "fastgen": "accelerate check_causality CausalityReport NotCausalError patch save load Categorical Bernoulli "
    "LogisticMixture Gaussian GaussianMixture compress decompress",
    "fastgen.ops": "causal_mask masked_conv2d diagonal_lstm row_lstm reparameterize_kl reconstruction_nll elbo",
    "fastgen.nn": "MaskedConv2d DiagonalLSTM DiagonalBiLSTM RowLSTM GatedMaskedBlock",
    "fastgen.models": "PixelCNN GatedPixelCNN PixelCNNPP PixelRNN VAE Autoencoder",
    "fastgen.sampling": "Sampler",
    "fastgen.train": "train Settings Callback",
}


def entry(name):
    """The section of the page about a name, under the first module that has it."""
    found = re.search(rf"^### {re.escape(name)}\n(.*?)(?=^##)", PAGE + "##", re.M | re.S)
    assert found, f"{name} is not in the reference"
    return found[1]


@pytest.mark.parametrize("name", [f"{module}.{name}" for module, names in NAMES.items() for name in names.split()])
def test_every_public_name_is_there(name):
    text = entry(name)
    assert len(text) > 80
    kind = name.split(".")[1]
    if kind in ("ops", "nn", "models") or name.endswith(("accelerate", "check_causality", ".train")):
        assert TENSORS.search(text), f"{name} says no shape"
        assert "*Raises*" in text, f"{name} says no errors"


def test_all_public_names_of_the_rooms_are_there():
    for module in (ops, nn, models):
        for name in module.__all__:
            entry(f"{module.__name__}.{name}")


def test_methods_and_errors():
    sampler = entry("fastgen.sampling.Sampler")
    for name in ("sample", "decode", "params", "explain", "noise_shape", "work_ratio"):
        assert f"**{name}**" in sampler, name
    vae = entry("fastgen.models.VAE")
    for name in ("encode", "decode", "elbo", "log_prob", "sample", "interpolate", "save_pretrained", "from_pretrained"):
        assert f"**{name}**" in vae, name
    assert (
        "VAE(\n    shape: tuple[int, int, int],\n    latent_dim: int,\n    *,\n    likelihood: str = 'bernoulli',"
        in vae
    )
    assert "- `fastgen.NotCausalError`:" in entry("fastgen.accelerate")


def test_every_public_name_has_a_docstring():
    for name in reference.MODULES:
        for public, item in reference.public_names(importlib.import_module(name)).items():
            assert item.__doc__, f"{name}.{public}"


def test_the_page_is_written(tmp_path, capsys):
    for suffix in (".md", ".html"):
        reference.main([str(tmp_path / f"page{suffix}")])
    page = (tmp_path / "page.html").read_text()
    assert "<h3>fastgen.ops.masked_conv2d</h3>" in page and (tmp_path / "page.md").read_text() == PAGE
    with pytest.raises(SystemExit):
        reference.main(["--help"])
    assert "usage: python -m fastgen.reference" in capsys.readouterr().out
