"""Models, data, callbacks, optimizers and schedules that are not the library's."""

import functools
import json
from dataclasses import replace

import pytest
import torch
from small_runs import QUICK, Own, dataset, images, pixelcnn, rows, train
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import fastgen
from fastgen.models import VAE, GatedPixelCNN, PixelCNN
from fastgen.train import METRICS, Callback, read_state
from fastgen.train.batches import Loaded
from fastgen.weights import load_weights


class Likelihood(nn.Module):
    """A histogram for every pixel and class, of which only the log-likelihood is known."""

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


def resumes_exactly(build, source, tmp_path, **options):
    """Trains in one go and in two; returns the first folder."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    models = [build() for _ in range(3)]
    made = [{name: make(model) for name, make in options.items()} for model in models]
    train(models[0], source, whole, QUICK, **made[0])
    train(models[1], source, parts, replace(QUICK, steps=4), **made[1])
    torch.rand(3)
    train(models[2], source, parts, QUICK, resume=True, **made[2])
    for name in (METRICS, "model.safetensors"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()
    return whole


# --- models


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
    with pytest.raises(ValueError, match="'Mine', not of 'PixelCNN'"):
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


# --- data


class Numbered(torch.utils.data.Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, number):
        return images()[number], number % 2


@pytest.mark.parametrize(
    "source",
    [
        TensorDataset(images(), torch.arange(40) % 2),
        Numbered(),
        DataLoader(Numbered(), batch_size=7, shuffle=True),
        DataLoader(TensorDataset(images()), batch_size=7, shuffle=True, drop_last=True),
        (DataLoader(Numbered(), batch_size=7, shuffle=True), DataLoader(Numbered(), batch_size=20)),
        (Numbered(), TensorDataset(images(20))),
    ],
    ids=["tensors", "dataset", "loader", "unlabelled loader", "two loaders", "two kinds"],
)
def test_torch_data(source, tmp_path):
    folder = resumes_exactly(pixelcnn, source, tmp_path)
    validated = any("validation_bits_per_dim" in row for row in rows(folder))
    assert validated == (not isinstance(source, DataLoader))


def test_classes_of_torch_data_reach_a_conditional_model(tmp_path):
    resumes_exactly(functools.partial(pixelcnn, n_classes=2), Numbered(), tmp_path)


def test_a_loader_without_validation_leaves_the_latest_weights(tmp_path):
    result = train(pixelcnn(), DataLoader(Numbered(), batch_size=7), tmp_path, replace(QUICK, patience=1, steps=8))
    assert result.steps == 8 and result.best == float("inf")
    average = read_state(tmp_path)["average"]
    loaded = fastgen.load(tmp_path).state_dict()
    assert all(torch.equal(value, average[name]) for name, value in loaded.items())


def test_other_tensors_of_the_same_shape_do_not_resume(tmp_path):
    train(pixelcnn(), TensorDataset(images()), tmp_path, replace(QUICK, steps=3))
    with pytest.raises(ValueError, match="other images"):
        train(pixelcnn(), TensorDataset(images().flip(0)), tmp_path, QUICK, resume=True)


def test_a_loader_is_shuffled_anew_in_each_epoch():
    loader = Loaded(DataLoader(TensorDataset(torch.arange(40)), batch_size=10, shuffle=True))
    epochs = [torch.cat([loader.batch(4 * epoch + place, 10, 0)[0] for place in range(4)]) for epoch in range(2)]
    assert all(epoch.sort().values.tolist() == list(range(40)) for epoch in epochs)
    assert not torch.equal(*epochs)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(images())


@pytest.mark.parametrize(
    ("source", "kind", "named"),
    [
        (images(), TypeError, "data must be .* got Tensor"),
        ("digits", TypeError, "data must be .* got str"),
        (Stream(), TypeError, "data must be .* got Stream"),
        (DataLoader(Stream(), batch_size=4), TypeError, "a DataLoader with a length"),
        ([{"image": 1}] * 20, TypeError, "data must give tensors of images"),
        (TensorDataset(images(1)), ValueError, "too few to hold some out"),
        (TensorDataset(images().transpose(2, 3)), ValueError, r"x must have the shape \(B, 1, 4, 3\)"),
        (TensorDataset(images() / 3), TypeError, "integer levels"),
        (DataLoader(TensorDataset(images(3)), 8, drop_last=True), ValueError, "data must have batches"),
        ((TensorDataset(images()), DataLoader(TensorDataset(images(0)))), ValueError, "data must have batches"),
        ((TensorDataset(images()), TensorDataset(images(0))), ValueError, "data must have images"),
    ],
    ids=["tensor", "name", "stream", "loader without a length", "dicts", "one image", "other shape", "floats"]
    + ["no batch", "no batch of validation", "no validation image"],
)
def test_data_that_is_none_is_refused(source, kind, named, tmp_path):
    with pytest.raises(kind, match=named):
        train(pixelcnn(), source, tmp_path, QUICK)


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


# --- callbacks, augmentation, optimizers, schedules


def test_callbacks_are_told(tmp_path):
    told = []

    class All(Callback):
        def on_step(self, run):
            told.append(("step", run.step, run.model.training))

        def on_validation(self, run):
            assert read_state(tmp_path)["step"] == run.step
            told.append(("validation", run.step, run.rows[-1]["validation_bits_per_dim"]))

        def on_end(self, run):
            told.append(("end", run.step, run.model.training))

    class Part:
        def on_validation(self, run):
            told.append(("part", run.step, None))

    train(pixelcnn(), dataset(), tmp_path, replace(QUICK, steps=4), callbacks=[All(), Part()])
    found = rows(tmp_path)
    assert told == [
        *(("step", step, True) for step in (1, 2, 3)),
        ("validation", 3, found[0]["validation_bits_per_dim"]),
        ("part", 3, None),
        ("step", 4, True),
        ("validation", 4, found[1]["validation_bits_per_dim"]),  # of the last weights
        ("part", 4, None),
        ("end", 4, False),
    ]


def test_a_run_is_not_overwritten(tmp_path):
    train(pixelcnn(), dataset(), tmp_path, QUICK)
    before = rows(tmp_path)
    with pytest.raises(ValueError, match="holds a run already"):
        train(pixelcnn(), dataset(), tmp_path, QUICK)
    assert rows(tmp_path) == before


def test_augmentation_is_for_training_alone(tmp_path):
    seen = []

    def augment(x):
        assert x.dtype == torch.int64
        seen.append(len(x))
        return torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x)

    folder = resumes_exactly(pixelcnn, dataset(), tmp_path, augment=lambda model: augment)
    assert seen == [8] * 14 and folder.exists()


@pytest.mark.parametrize("kind", ["instance", "function"])
def test_an_optimizer_of_ones_own_keeps_its_rate(kind, tmp_path):
    def build(parameters):
        return torch.optim.SGD(parameters, lr=0.03, momentum=0.9)

    make = (lambda model: build(model.parameters())) if kind == "instance" else (lambda model: build)
    resumes_exactly(pixelcnn, dataset(), tmp_path, optimizer=make)
    group = read_state(tmp_path / "whole")["optimizer"]["param_groups"][0]
    assert (group["lr"], group["momentum"]) == (0.03, 0.9)


def test_an_optimizer_of_another_model_is_refused(tmp_path):
    other = pixelcnn()
    for optimizer in (torch.optim.SGD(other.parameters(), lr=0.1), lambda _: torch.optim.SGD(other.parameters(), 0.1)):
        with pytest.raises(ValueError, match="optimizer must be of the model's own parameters, 12 of its tensors"):
            train(pixelcnn(), dataset(), tmp_path, QUICK, optimizer=optimizer)
    model = pixelcnn()
    some = [parameter for parameter in model.parameters() if parameter.dim() == 1]  # a part of them is fine
    train(model, dataset(), tmp_path, QUICK, optimizer=torch.optim.SGD(some, lr=0.1))


def test_a_schedule_of_ones_own(tmp_path):
    resumes_exactly(pixelcnn, dataset(), tmp_path, schedule=lambda model: lambda step: 0.1 / (step + 1))
    assert read_state(tmp_path / "whole")["optimizer"]["param_groups"][0]["lr"] == 0.1 / 7


def test_a_scheduler_of_torch(tmp_path):
    for name, stops in (("whole", [7]), ("parts", [4, 7])):
        for number, stop in enumerate(stops):
            model = pixelcnn()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            options = {"optimizer": optimizer, "schedule": schedule, "resume": number > 0}
            train(model, dataset(), tmp_path / name, replace(QUICK, steps=stop), **options)
    whole, parts = (read_state(tmp_path / name) for name in ("whole", "parts"))
    assert parts["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.1 * 0.5**7)
    assert whole["schedule"] == parts["schedule"]
    assert (tmp_path / "whole" / METRICS).read_bytes() == (tmp_path / "parts" / METRICS).read_bytes()


# --- other trainers


def test_two_steps_inside_lightning(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = pixelcnn()

        def training_step(self, batch, index):
            return self.model.loss(batch[0])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Module()
    before = [p.detach().clone() for p in module.parameters()]
    trainer = lightning.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path
    )
    trainer.fit(module, DataLoader(TensorDataset(images()), batch_size=8))
    assert any((p != old).any() for p, old in zip(module.parameters(), before, strict=True))


def test_two_steps_inside_accelerate():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = pixelcnn()
    before = [p.detach().clone() for p in model.parameters()]
    loader = DataLoader(TensorDataset(images()), batch_size=8)
    prepared, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), loader)
    for _, (x,) in zip(range(2), loader, strict=False):
        optimizer.zero_grad()
        accelerator.backward(prepared.loss(x))
        optimizer.step()
    assert any((p != old).any() for p, old in zip(model.parameters(), before, strict=True))
