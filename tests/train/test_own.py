"""Models, data, callbacks, optimizers and schedules that are not the library's."""

import functools
import inspect
import json
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import fastgen
from fastgen import data
from fastgen.models import VAE, Autoencoder, GatedPixelCNN, PixelCNN
from fastgen.train import METRICS, Callback, Settings, parallel, read_state
from fastgen.train import train as train_anywhere
from fastgen.train.measure import Loss
from fastgen.weights import load_weights

train = functools.partial(train_anywhere, device="cpu", progress=False)
QUICK = Settings(steps=7, batch_size=8, lr=0.01, warmup=2, validate_every=3, ema=0.5)


def images(count=40):
    return torch.randint(4, (count, 1, 4, 3), generator=torch.Generator().manual_seed(0))


def dataset(levels=4):
    part = data.Split(images().to(torch.uint8), torch.arange(40) % 2)
    return data.Dataset("noise", levels, 2, part[:20], part[20:30], part[30:])


class Own(nn.Module):
    """Independent pixels, with a loss that is no likelihood."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(1, 4, 3))

    def loss(self, x):
        return (x.float() - self.mean).square().mean()


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


def rows(folder):
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


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


# --- weights from elsewhere


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


# --- data


class Numbered(torch.utils.data.Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, number):
        return images()[number], number % 2


def pixelcnn(**options):
    torch.manual_seed(0)
    return PixelCNN((1, 4, 3), 4, channels=4, layers=1, **options)


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
    ],
    ids=str,
)
def test_data_that_is_none_is_refused(source, kind, named, tmp_path):
    with pytest.raises(kind, match=named):
        train(pixelcnn(), source, tmp_path, QUICK)


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
        ("end", 4, False),
    ]


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


# --- settings of a VAE, precision, CUDA graphs


def test_beta_rises_and_free_bits_reach_the_loss(tmp_path, monkeypatch):
    given = []
    loss = VAE.loss

    def seen(self, x, condition=None, **options):
        if self.training:
            given.append(options)
        return loss(self, x, condition, **options)

    seen.__signature__ = inspect.signature(loss)
    monkeypatch.setattr(VAE, "loss", seen)
    vae = VAE((1, 4, 3), 2, likelihood="categorical", levels=4, channels=4, hidden=8)
    train(vae, dataset(), tmp_path, replace(QUICK, steps=5, beta=2.0, beta_warmup=4, free_bits=0.1))
    assert given == [{"beta": 2.0 * min(1, step / 4), "free_bits": 0.1} for step in range(5)]
    given.clear()
    train(vae, dataset(), tmp_path / "plain", replace(QUICK, steps=1))
    assert given == [{}]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"beta": 2.0}, "beta"),
        ({"free_bits": 0.1}, "free_bits"),
        ({"beta_warmup": 3}, "beta"),
        ({"samples": 2}, "samples"),
    ],
    ids=str,
)
def test_settings_that_are_for_other_models_are_refused(change, named, tmp_path):
    model = Autoencoder((1, 4, 3), 2, levels=4, channels=4, hidden=8)
    with pytest.raises(ValueError, match=named):
        train(model, dataset(), tmp_path / "run", replace(QUICK, **change))
    assert not (tmp_path / "run").exists()


def test_precision(tmp_path):
    seen = []

    class Dtype(Own):
        def loss(self, x):
            if self.training:
                seen.append((x.float().flatten(1) @ torch.ones(12, 2)).dtype)
            return super().loss(x)

    for precision, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32), ("auto", torch.float32)):
        train(Dtype(), dataset(), tmp_path / precision, replace(QUICK, steps=2, precision=precision))
        assert set(seen) == {dtype}
        seen.clear()


def test_a_cuda_graph_is_not_taken_on_a_cpu_and_says_so(tmp_path):
    with pytest.warns(UserWarning, match="cuda_graph is not used: it needs a CUDA device, the model is on cpu"):
        train(pixelcnn(), dataset(), tmp_path, replace(QUICK, steps=1, cuda_graph=True))
    why = parallel._why_no_graph(replace(QUICK, beta=2.0), torch.device("cuda"))
    assert "weight of the KL" in why and not parallel._why_no_graph(QUICK, torch.device("cuda"))


def test_a_graphed_loss_replays_one_shape_and_leaves_the_model_as_it_was(monkeypatch):
    """With a stand-in for torch's capture, which warms up by running the module and replaces its forward."""
    captured = []

    def make_graphed_callables(module, sample, allow_unused_input):
        for _ in range(3):
            module(*sample)
        captured.append([tensor.shape for tensor in sample])
        forward = module.forward

        def replay(*batch):
            assert [tensor.shape for tensor in batch] == captured[-1], "a graph replays one shape"
            return forward(*batch)

        module.forward = replay
        return module

    class Normed(Own):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(1)

        def loss(self, x):
            return (self.norm(x.float()) - self.mean).square().mean()

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make_graphed_callables)
    graphed, plain = Normed(), Normed()
    loss = parallel.GraphedLoss(Loss(graphed))
    for count in (8, 8, 5, 8):
        assert torch.equal(loss(images(count)), plain.loss(images(count)))
    assert captured == [[(8, 1, 4, 3)]]
    for one, other in zip(graphed.buffers(), plain.buffers(), strict=True):
        assert torch.equal(one, other)

    def fails(*given, **options):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fails)
    loss = parallel.GraphedLoss(Loss(Normed()))
    with pytest.warns(UserWarning, match="cannot be captured"):
        first = loss(images(8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(first, loss(images(8)))


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
