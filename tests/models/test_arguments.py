"""Errors for wrong images and classes name the argument, the value and what was expected."""

import pytest
import torch

from fastgen.models import VAE, Autoencoder, GatedPixelCNN, PixelCNN, PixelCNNPP, PixelRNN

CONDITIONAL = {
    "gated": lambda: GatedPixelCNN((1, 4, 4), 4, channels=4, layers=2, n_classes=3),
    "pixelcnn": lambda: PixelCNN((1, 4, 4), 4, channels=4, layers=1, n_classes=3),
    "plusplus": lambda: PixelCNNPP((1, 4, 4), channels=4, layers=1, n_mix=2, n_classes=3),
    "rnn": lambda: PixelRNN((1, 4, 4), 4, hidden_channels=4, layers=1, n_classes=3),
    "vae": lambda: VAE((1, 4, 4), 2, likelihood="categorical", levels=4, channels=4, hidden=8, n_classes=3),
    "autoencoder": lambda: Autoencoder((1, 4, 4), 2, levels=4, channels=4, hidden=8, n_classes=3),
}


def calls(model, x, condition):
    """Functions that use a model with these images and classes, by name."""
    found = {"loss": lambda: model.loss(x, condition)}
    if not isinstance(model, Autoencoder):
        found["log_prob"] = lambda: model.log_prob(x, condition=condition)
        found["sample"] = lambda: model.sample(2, seed=0, condition=condition)
    return found


@pytest.mark.parametrize("name", CONDITIONAL)
@pytest.mark.parametrize(
    ("condition", "kind", "named"),
    [
        (torch.tensor([0, 5]), ValueError, r"condition must hold classes 0\.\.2, got 0\.\.5"),
        (torch.tensor([-1, 2]), ValueError, r"condition must hold classes 0\.\.2, got -1\.\.2"),
        ([0, 1], TypeError, r"condition must be an integer tensor of classes 0\.\.2, got list"),
        (torch.tensor([0.0, 1.0]), TypeError, r"condition must be an integer tensor .*float32"),
        (None, ValueError, "condition is missing"),
    ],
    ids=str,
)
def test_classes(name, condition, kind, named):
    model = CONDITIONAL[name]().eval()
    for call in calls(model, torch.zeros(2, 1, 4, 4, dtype=torch.long), condition).values():
        with pytest.raises(kind, match=named):
            call()


@pytest.mark.parametrize("name", ["gated", "pixelcnn", "plusplus", "rnn"])
def test_levels(name):
    model = CONDITIONAL[name]().eval()
    most, condition = model.levels - 1, torch.tensor([0, 2])
    for value in (-1, most + 1):
        x = torch.zeros(2, 1, 4, 4, dtype=torch.long)
        x[1, 0, 2, 3] = value
        for method in (model.log_prob, model.loss):
            with pytest.raises(ValueError, match=rf"x must hold levels 0\.\.{most}, got {min(value, 0)}\.\."):
                method(x, condition)
    for wrong in (torch.zeros(2, 1, 4, 4), [[0]]):
        with pytest.raises(TypeError, match=rf"x must hold integer levels 0\.\.{most}"):
            model.log_prob(wrong, condition)


@pytest.mark.parametrize("name", CONDITIONAL)
def test_another_number_of_channels(name):
    model = CONDITIONAL[name]().eval()
    for shape in ((2, 3, 4, 4), (2, 1, 4, 5), (1, 4, 4)):
        with pytest.raises(ValueError, match=r"x must have the shape \(B, 1, 4, 4\), got"):
            model.loss(torch.zeros(shape, dtype=torch.long), torch.tensor([0, 2]))


def test_as_many_classes_as_images():
    model = CONDITIONAL["gated"]().eval()
    x = torch.zeros(2, 1, 4, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"condition must hold 2 classes, one an image, got \(3,\)"):
        model.log_prob(x, torch.tensor([0, 1, 2]))
    assert torch.equal(model.log_prob(x, torch.tensor([1])), model.log_prob(x, torch.tensor([1, 1])))
    assert torch.equal(model.sample(2, seed=0, condition=1), model.sample(2, seed=0, condition=torch.tensor([1, 1])))


def test_values_are_not_read_while_compiling():
    model = CONDITIONAL["gated"]()
    x, condition = torch.zeros(2, 1, 4, 4, dtype=torch.long), torch.tensor([0, 2])
    compiled = torch.compile(model.loss, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, condition), model.loss(x, condition))
