"""A VQ-VAE and its prior: the demonstration with few steps, and the codebook compared with hand calculations."""

import pytest
import torch

from fastgen import demos
from fastgen.demos.code_prior import DECAY, VQVAE, Prior

pytest.importorskip("sklearn")


def test_the_demonstration(tmp_path):
    numbers = demos.perform("code_prior", tmp_path, codes=8, steps=25)
    assert (tmp_path / "code_prior.png").exists()
    assert numbers["identical"] and numbers["work_ratio"] < 1.2 and numbers["speedup"] > 1
    assert numbers["uniform"] == 3 and numbers["prior"] < numbers["histogram"] < 3.1
    assert 1 < numbers["codes_used"] <= 8


def test_codes_are_the_nearest_vectors():
    model = VQVAE(codes=5, channels=4, dimensions=2).eval()
    codes = model.encode(torch.rand(2, 3, 8, 12) * 2 - 1)
    assert codes.shape == (2, 2, 3) and codes.dtype == torch.long
    features = model.encoder(torch.zeros(1, 3, 8, 8))
    distances = (features.movedim(1, -1).unsqueeze(-2) - model.codebook).square().sum(-1)
    assert torch.equal(model.encode(torch.zeros(1, 3, 8, 8)), distances.argmin(-1))
    assert model.decode(codes).shape == (2, 3, 8, 12)


def test_the_codebook_follows_its_features():
    model = VQVAE(codes=3, channels=4, dimensions=1)
    model.codebook.copy_(torch.tensor([[0.0], [1.0], [9.0]]))
    model.counts.copy_(torch.tensor([1.0, 2.0, 0.0]))
    model._update_codebook(torch.tensor([[0.2], [1.4], [1.6]]), torch.tensor([0, 1, 1]))
    decayed = torch.tensor([1.0, 2.0]) * DECAY
    expected = (decayed * torch.tensor([0.0, 1.0]) + (1 - DECAY) * torch.tensor([0.2, 3.0])) / (
        decayed + (1 - DECAY) * torch.tensor([1.0, 2.0])
    )
    torch.testing.assert_close(model.codebook[:2, 0], expected)
    assert float(model.codebook[2, 0]) in torch.tensor([0.2, 1.4, 1.6]).tolist()  # it was chosen by none


def test_the_encoder_learns_through_the_codes(monkeypatch):
    """Even without a commitment loss, since the decoder's gradient passes straight through the codes."""
    monkeypatch.setattr("fastgen.demos.code_prior.COMMITMENT", 0.0)
    model = VQVAE(codes=3, channels=4, dimensions=2)
    model.loss(torch.rand(2, 3, 8, 8)).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.encoder.parameters() if parameter.dim() > 1)


def test_the_prior_sees_codes_before_and_the_whole_thumbnail():
    prior, codes, thumbnail = Prior(5, 8, 2).eval(), torch.randint(5, (1, 4, 4)), torch.randn(1, 3, 2, 2)
    with torch.no_grad():
        before = prior(codes, thumbnail)
        other = codes.clone()
        other[0, 2, 1] = (codes[0, 2, 1] + 1) % 5
        changed = (prior(other, thumbnail) != before).any(1)[0].flatten()
        assert not changed[: 2 * 4 + 2].any() and changed[2 * 4 + 2 :].any()
        assert (prior(codes, thumbnail + 1) != before).any(1).all()
