"""Training of modules that are not fastgen's: any module with a loss or a likelihood, also inside wrappers."""

import json

import pytest
import torch
from small_runs import QUICK, Own, dataset, images, pixelcnn, resumes_exactly, rows, train
from torch import nn
from torch.utils.data import TensorDataset

import fastgen
from fastgen.models import VAE, GatedPixelCNN, PixelCNN
from fastgen.weights import load_weights


class Likelihood(nn.Module):
    """A model with a histogram for every pixel and class, which has log_prob but no loss."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(2, 4, 1, 4, 3))
        self.seen = []

    def log_prob(self, x, condition):
        self.seen.append((x.dtype, condition))
        log_p = self.logits.log_softmax(1)[condition]
        return log_p.gather(1, x.unsqueeze(1)).squeeze(1).sum((1, 2, 3))


class Mine(GatedPixelCNN):
    def loss(self, x, condition=None):
        return super().loss(x, condition) + 0.01 * sum(p.square().sum() for p in self.parameters())


def test_a_module_with_a_loss(tmp_path):
    folder = resumes_exactly(Own, dataset(), tmp_path)
    assert rows(folder)[0].keys() == {"step", "validation_loss"}
    assert json.loads((folder / "config.json").read_text())["class"] == "Own"
    with pytest.raises(ValueError, match=r"unknown class 'Own'.*load_weights"):
        fastgen.load(folder)
    model = Own()
    load_weights(model, folder)
    assert (model.mean > 0).all()


def test_a_module_with_a_likelihood_and_classes(tmp_path):
    model = Likelihood()
    result = train(model, dataset(), tmp_path, QUICK)
    assert result.metric == "bits_per_dim" and 0 < result.best < 2.1
    assert all(dtype == torch.int64 and condition is not None for dtype, condition in model.seen)


def test_a_subclass_is_trained_and_comes_back(tmp_path):
    torch.manual_seed(0)
    train(Mine((1, 4, 3), 4, channels=4, layers=2), dataset(), tmp_path, QUICK)
    model = Mine.from_pretrained(tmp_path)
    assert type(model) is Mine and not model.training
    with pytest.raises(ValueError, match=r"'Mine'.*from_pretrained"):
        fastgen.load(tmp_path)
    with pytest.raises(ValueError, match="holds a 'Mine', expected a 'PixelCNN'"):
        PixelCNN.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: nn.Linear(1, 1), "loss.*or log_prob.*Linear has neither"),
        (lambda: Extra(), "_extra_state"),
        (lambda: Odd(torch.tensor(1)), "shape="),
    ],
)
def test_what_cannot_be_saved_is_refused_before_the_first_step(build, named, tmp_path):
    model = build()
    model.steps = 0
    with pytest.raises(TypeError, match=named):
        train(model, dataset(), tmp_path / "run", QUICK)
    assert model.steps == 0 and not (tmp_path / "run").exists()


class Extra(Own):
    def get_extra_state(self):
        return {"a": 1}

    def set_extra_state(self, state):
        pass

    def loss(self, x):
        self.steps += 1
        return super().loss(x)


class Odd(PixelCNN):
    def __init__(self, shape):
        super().__init__((1, 4, 3), 4, channels=4, layers=1)

    def loss(self, x, condition=None):
        self.steps += 1
        return super().loss(x, condition)


def test_tied_weights_are_saved(tmp_path):
    class Tied(Own):
        def __init__(self):
            super().__init__()
            self.again = self.mean

    train(Tied(), dataset(), tmp_path, QUICK)
    model = Tied()
    load_weights(model, tmp_path)
    assert model.again is model.mean and (model.mean > 0).all()


def test_wrappers_are_taken_off(tmp_path):
    torch.manual_seed(0)
    model = PixelCNN((1, 4, 3), 4, channels=4, layers=1)
    wrapped = nn.DataParallel(torch.compile(nn.DataParallel(model), backend="eager"))
    fastgen.save(wrapped, tmp_path / "saved")
    assert torch.equal(fastgen.load(tmp_path / "saved").input.weight, model.input.weight)
    train(wrapped, dataset(), tmp_path / "run", QUICK)
    assert isinstance(fastgen.load(tmp_path / "run"), PixelCNN) and not model.training


@pytest.mark.parametrize("method", ["loss", "log_prob"])
def test_a_loss_of_another_shape_is_named(method, tmp_path):
    model = Own() if method == "loss" else Likelihood()
    shape = r"\(8,\)" if method == "loss" else r"\(8, 1\)"
    values = {"loss": lambda x: x.float().sum((1, 2, 3)) * model.mean.sum()}
    values["log_prob"] = lambda x: x.float().sum((2, 3)) * model.logits.sum()
    setattr(model, method, values[method])
    with pytest.raises(ValueError, match=rf"model.{method} must return a tensor of the shape .*got {shape}"):
        train(model, dataset(), tmp_path, QUICK)


def test_a_model_that_is_frozen_is_refused(tmp_path):
    with pytest.raises(ValueError, match="model must have parameters that require a gradient, this PixelCNN has none"):
        train(pixelcnn().requires_grad_(False), dataset(), tmp_path, QUICK)
    assert not list(tmp_path.iterdir())


def test_floats_of_a_gaussian_have_a_density_and_no_bits(tmp_path):
    model = VAE((1, 4, 3), 2, likelihood="gaussian", levels=4, channels=4, hidden=8)
    train(model, TensorDataset(images() / 1.5 - 1), tmp_path / "floats", QUICK)
    train(model, TensorDataset(images()), tmp_path / "levels", QUICK)
    assert "validation_density_nats" in rows(tmp_path / "floats")[0]
    assert "validation_bits_per_dim" in rows(tmp_path / "levels")[0]
