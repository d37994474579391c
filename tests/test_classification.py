"""Calibration compared with hand calculations, and a discriminative network of a given size."""

import math

import pytest
import torch

from fastgen import data
from fastgen.classification import BINS, Classifier, calibration, classifier_of_size
from fastgen.demos.common import fit


def test_calibration_by_hand():
    """Two images with a confidence of 0.95, one of them right, and one with 0.55, which is right."""
    p = torch.tensor([[0.95, 0.05], [0.95, 0.05], [0.45, 0.55]])
    found = calibration(p.log(), torch.tensor([0, 1, 1]))
    assert found.accuracy == pytest.approx(2 / 3)
    assert found.nats == pytest.approx(-(math.log(0.95) + math.log(0.05) + math.log(0.55)) / 3, rel=1e-6)
    assert found.error == pytest.approx((2 * abs(0.5 - 0.95) + abs(1 - 0.55)) / 3, rel=1e-6)
    assert found.images.tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 0, 2] and BINS == 10
    assert found.right[[5, 9]].tolist() == [1, 0.5] and found.right[0].isnan()
    assert found.confidence[9] == pytest.approx(0.95)
    assert "66.7% right" in str(found)


def test_calibration_of_draws_from_the_probabilities_themselves():
    logits = torch.randn(20_000, 4) * 2
    labels = torch.distributions.Categorical(logits=logits).sample()
    assert calibration(logits.log_softmax(1), labels).error < 0.015
    assert calibration((3 * logits).log_softmax(1), labels).error > 0.1


def test_certainty_falls_into_the_last_bin_and_wrong_sizes_are_named():
    certain = torch.tensor([[0.0, -math.inf]])
    assert calibration(certain, torch.tensor([0])).images.tolist() == [0] * 9 + [1]
    for log_probs, labels in ((certain, torch.zeros(2, dtype=torch.long)), (certain[:0], torch.zeros(0))):
        with pytest.raises(ValueError, match="labels"):
            calibration(log_probs, labels)


@pytest.mark.parametrize("parameters", [900, 20_000, 123_456])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 2, 5)], ids=str)
def test_size(parameters, shape):
    def size(channels):
        return sum(p.numel() for p in Classifier(shape, 17, 10, channels=channels).parameters())

    model = classifier_of_size(parameters, shape, 17, 10)
    channels = model.first.out_channels
    found = size(channels)
    assert all(
        abs(found - parameters) <= abs(size(other) - parameters) for other in (channels - 1, channels + 1) if other
    )
    log_probs = model.eval()(torch.randint(17, (3, *shape)))
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(3))


def test_it_learns():
    images = torch.randint(4, (80, 1, 4, 4), dtype=torch.uint8)
    split = data.Split(images, (images[:, 0, 1, 2] > 1).long())
    model = Classifier((1, 4, 4), 4, 2, channels=8, layers=2, dropout=0.0)
    fit(model, data.Dataset("x", 4, 2, split, split, split), 200)
    with torch.no_grad():
        assert calibration(model(images.long()), split.labels).accuracy > 0.95
