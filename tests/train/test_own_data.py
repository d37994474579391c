"""Training with torch Datasets and DataLoaders."""

import functools
from dataclasses import replace

import pytest
import torch
from small_runs import QUICK, images, pixelcnn, resumes_exactly, rows, train
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import fastgen
from fastgen.train import read_state
from fastgen.train.batches import Loaded


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
