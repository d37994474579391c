"""The user's own callbacks, augmentation, optimizers, schedules and trainers."""

from dataclasses import replace

import pytest
import torch
from small_runs import QUICK, dataset, images, pixelcnn, resumes_exactly, rows, train
from torch.utils.data import DataLoader, TensorDataset

from fastgen.train import METRICS, Callback, read_state


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


@pytest.mark.parametrize("name", ["augment", "optimizer", "schedule"])
def test_what_is_no_function_is_refused(name, tmp_path):
    with pytest.raises(TypeError, match=f"{name} must be an? .*, got float"):
        train(pixelcnn(), dataset(), tmp_path / "run", QUICK, **{name: 0.1})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("given", [True, False])
def test_a_scheduler_of_another_optimizer_is_refused(given, tmp_path):
    model = pixelcnn()
    optimizer, another = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    scheduler = torch.optim.lr_scheduler.StepLR(another, 2)
    with pytest.raises(ValueError, match="schedule must be an LRScheduler of the optimizer"):
        train(model, dataset(), tmp_path, QUICK, optimizer=optimizer if given else None, schedule=scheduler)


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
