"""Outlier scores, maps of surprise, and images of other kinds to test the scores with."""

import math

import pytest
import torch
from torch import nn

from fastgen import data, likelihood, models, scores


def model_of(shape, levels, n_classes=None):
    torch.manual_seed(3)
    return models.GatedPixelCNN(shape, levels, channels=6, layers=2, n_classes=n_classes).eval()


@pytest.mark.parametrize("kind", ["grey", "colour", "mixture", "classes"])
def test_maps_of_surprise_sum_to_the_likelihood(kind):
    shape, levels = ((1, 5, 4), 7) if kind in ("grey", "classes") else ((3, 5, 4), 256)
    model = model_of(shape, levels, 3 if kind == "classes" else None)
    if kind == "mixture":
        model = models.PixelCNNPP(shape, channels=6, layers=1, n_mix=2).eval()
    images = torch.randint(levels, (3, *shape))
    classes = torch.arange(3) if kind == "classes" else None
    bits = scores.surprise(model, images, classes)
    assert bits.shape == (3, *shape[1:]) and (bits > 0).all()
    with torch.no_grad():
        log_prob = model.log_prob(images, classes).double()
    torch.testing.assert_close(bits.double().sum((1, 2)) * math.log(2), -log_prob, rtol=1e-5, atol=0)


def test_a_pixel_surprises_at_its_own_place():
    """With p = 3/4 for level 1 everywhere, a single 0 takes 2 bits, the other pixels log2(4/3)."""

    class Fixed(models.PixelCNN):
        def forward(self, x, condition=None):
            logits = torch.tensor([0.25, 0.75]).log().view(1, 2, 1, 1, 1)
            return logits.expand(len(x), 2, 1, *x.shape[2:])

    image = torch.ones(1, 1, 3, 4, dtype=torch.long)
    image[0, 0, 1, 2] = 0
    bits = scores.surprise(Fixed((1, 3, 4), 2, channels=2, layers=1).eval(), image)
    expected = torch.full((1, 3, 4), math.log2(4 / 3))
    expected[0, 1, 2] = 2
    torch.testing.assert_close(bits.float(), expected)


def test_wrong_models_are_named():
    with pytest.raises(TypeError, match="VAE"):
        scores.surprise(
            models.VAE((1, 4, 4), 2, levels=3, channels=4).eval(), torch.zeros(1, 1, 4, 4, dtype=torch.long)
        )
    with pytest.raises(ValueError, match="training mode"):
        scores.surprise(model_of((1, 4, 4), 3).train(), torch.zeros(1, 1, 4, 4, dtype=torch.long))


def test_strangers():
    images = torch.arange(2 * 3 * 12 * 10).view(2, 3, 12, 10) % 256
    found = scores.strangers(images, 256, torch.Generator().manual_seed(0))
    assert list(found) == ["inverted", "shuffled", "noise", "letters"]
    assert all(x.shape == images.shape and x.dtype == images.dtype for x in found.values())
    assert torch.equal(found["inverted"] + images, torch.full_like(images, 255))
    # Pixels are shuffled whole: with their colours.
    pixels = [sorted(map(tuple, x[0].flatten(1).T.tolist())) for x in (images, found["shuffled"])]
    assert pixels[0] == pixels[1] and not torch.equal(found["shuffled"], images)
    again = scores.strangers(images, 256, torch.Generator().manual_seed(0))
    assert all(torch.equal(found[name], again[name]) for name in found)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (1, 3, 9)], ids=str)
def test_letters_are_white_on_black(shape):
    drawn = scores.letters(26, shape, 17, torch.Generator().manual_seed(1))
    assert drawn.shape == (26, *shape) and drawn.min() == 0 and drawn.max() > 8
    assert 0.02 < (drawn > 8).double().mean() < 0.6
    assert len({image.numpy().tobytes() for image in drawn}) > 8


class Bernoulli(nn.Module):
    """A model of independent binary pixels with the same probability."""

    def __init__(self, p, n_classes=None):
        super().__init__()
        self.p, self.n_classes, self.shape = nn.Parameter(torch.tensor(float(p))), n_classes, (1, 4, 4)

    def log_prob(self, x, condition=None):
        p = self.p if condition is None else (self.p + condition) / 2
        ones = x.flatten(1).sum(1)
        return ones * p.log() + (16 - ones) * (1 - p).log()


def test_scores_are_those_of_the_papers():
    ones = torch.ones(5, 1, 4, 4, dtype=torch.uint8)
    half = ones.clone()
    half[:, :, :2] = 0
    split = data.Split(half)
    dataset = data.Dataset("x", 2, None, split, split, split)
    scorer = scores.Scorer(Bernoulli(0.25).eval(), Bernoulli(0.5).eval(), dataset)
    found = scorer(ones)
    log_p, usual = 16 * math.log(0.25), 8 * (math.log(0.25) + math.log(0.75))
    for values, expected in zip(found, (log_p, 16 * math.log(0.5) - log_p, usual - log_p), strict=True):
        torch.testing.assert_close(values, torch.full((5,), expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    zeros = scorer(1 - ones)
    table = scores.aurocs(scorer(half), {"ones": found, "zeros": zeros})
    assert table["ones"] == {"-log p": 1, "likelihood ratio": 1, "typicality": 1}
    # What is likelier than the training images is an outlier by typicality alone.
    assert table["zeros"] == {"-log p": 0, "likelihood ratio": 0, "typicality": 1}


def test_a_class_conditional_model_is_scored_with_the_class_summed_out():
    split = data.Split(torch.randint(2, (5, 1, 4, 4), dtype=torch.uint8))
    model = Bernoulli(0.25, n_classes=2).eval()
    scorer = scores.Scorer(model, Bernoulli(0.5).eval(), data.Dataset("x", 2, None, split, split, split))
    images = split.images.long()
    expected = likelihood.class_posterior(model, images).log_likelihood
    assert torch.equal(scorer(images).log_prob, expected)
