"""The settings of VAEs, precision, noise and CUDA graphs have their effect."""

import inspect
import warnings
from dataclasses import replace

import pytest
import torch
from small_runs import QUICK, Own, dataset, images, pixelcnn, train
from torch import nn

from fastgen.models import VAE, Autoencoder
from fastgen.train import parallel
from fastgen.train.batches import Data
from fastgen.train.measure import Loss
from fastgen.train.run import Run


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
    assert "beta or free_bits" in why and not parallel._why_no_graph(QUICK, torch.device("cuda"))


def test_a_graphed_loss_replays_one_shape_and_leaves_the_model_as_it_was(monkeypatch):
    """With a replacement of torch's capture, which runs the module to warm up and replaces its forward."""
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


def test_each_step_and_each_process_has_noise_of_its_own(tmp_path, monkeypatch):
    seen = []

    class Noisy(Own):
        def loss(self, x):
            seen.append(torch.rand(()).item())
            return super().loss(x)

    for rank in (0, 1):
        run = Run(Noisy(), Data(dataset()), tmp_path, QUICK, torch.device("cpu"))
        monkeypatch.setattr("fastgen.distributed.rank", lambda rank=rank: rank)
        for _ in range(3):
            run.train_step()
    assert len(set(seen)) == 6
