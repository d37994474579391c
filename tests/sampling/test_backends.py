"""The library's own models: every backend gives the images of the naive loop, each activation computed once."""

import warnings

import pytest
import torch

from fastgen import accelerate
from fastgen.models import GatedPixelCNN, PixelCNN, PixelCNNPP, PixelRNN
from fastgen.sampling.machine.cpu.build import machine

MODELS = {
    "gated": lambda: GatedPixelCNN((1, 6, 5), 5, channels=8, layers=2),
    "gated, colours, classes": lambda: GatedPixelCNN((3, 4, 5), 3, channels=6, layers=1, n_classes=3),
    "plain, colours": lambda: PixelCNN((3, 5, 4), 3, channels=6, layers=2),
    "plusplus": lambda: PixelCNNPP((3, 5, 6), channels=6, layers=1, n_mix=2),
    "diagonal": lambda: PixelRNN((1, 5, 6), 4, hidden_channels=6, layers=2),
    "diagonal, colours": lambda: PixelRNN((3, 4, 3), 3, hidden_channels=6, layers=1),
    "row": lambda: PixelRNN((3, 4, 5), 3, kind="row_lstm", hidden_channels=6, layers=2),
}


def make(name, device="cpu"):
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)
    return model.to(device)


def samplers(model, *backends):
    condition = torch.tensor([2, 0, 1], device=next(model.parameters()).device) if model.n_classes else None
    arguments = {"distribution": model.distribution, "condition": condition}
    return [accelerate(model, model.shape, backend=backend, **arguments) for backend in backends]


@pytest.mark.parametrize("name", MODELS)
def test_eager_equals_naive_and_computes_everything_once(name):
    model = make(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        eager, naive = samplers(model, "eager", "naive")
        assert torch.equal(eager.sample(3, seed=1), naive.sample(3, seed=1))
    assert 1 <= eager.work_ratio <= 1.05
    assert eager._engine.error < 1e-5


@pytest.mark.parametrize("name", ["gated", "diagonal"])
def test_known_rows_are_filled_in_one_pass(name):
    model = make(name)
    eager, naive = samplers(model, "eager", "naive")
    known = torch.randint(model.levels, (3, *model.shape))
    mask = torch.zeros(model.shape, dtype=torch.bool)
    mask[:, :3] = True
    mask[:, 3, 1] = True
    found = eager.sample(3, seed=1, known=known, known_mask=mask)
    assert torch.equal(found, naive.sample(3, seed=1, known=known, known_mask=mask))
    assert torch.equal(found[:, :, :3], known[:, :, :3])


@pytest.mark.parametrize("name", MODELS)
def test_the_step_machine_gives_the_same_images(name):
    model = make(name)
    compiled, auto, naive = samplers(model, "compiled", "auto", "naive")
    assert "compiled:" in compiled.explain() and "auto: on a CPU compiled" in auto.explain()
    assert torch.equal(compiled.sample(3, seed=1), naive.sample(3, seed=1))
    assert compiled._engine.error < 1e-5


def test_without_a_compiler_eager_takes_its_place(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    machine.cache_clear()
    try:
        model = make("gated")
        (auto,) = samplers(model, "auto")
        assert "eager, since there is no C++ compiler 'no-such-compiler'" in auto.explain()
        with pytest.warns(UserWarning, match="from the compiled to the eager backend: eager, since there is no"):
            samplers(model, "compiled")
    finally:
        machine.cache_clear()


@pytest.mark.parametrize("backend", ["persistent", "cuda_graph"])
def test_what_cannot_run_here_is_said_and_replaced(backend):
    model = make("gated")
    with pytest.warns(UserWarning, match=f"from the {backend} to the compiled backend"):
        (sampler,) = samplers(model, backend)
    assert f"compiled instead of {backend}" in sampler.explain()
    assert torch.equal(sampler.sample(2, seed=1), samplers(model, "naive")[0].sample(2, seed=1))


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_cuda_graphs_equal_naive(name):
    model = make(name, "cuda")
    graph, eager, naive = samplers(model, "cuda_graph", "eager", "naive")
    for seed in range(4):  # the first batch runs eagerly, the second is captured, later ones are replayed
        expected = naive.sample(3, seed=seed)
        assert torch.equal(graph.sample(3, seed=seed), expected)
        assert torch.equal(eager.sample(3, seed=seed), expected)
    known = torch.zeros(3, *model.shape, dtype=torch.long, device="cuda")
    mask = torch.zeros(model.shape, dtype=torch.bool, device="cuda")
    mask[:, 2] = True
    for seed in range(3):
        given = {"known": known, "known_mask": mask}
        assert torch.equal(graph.sample(3, seed=seed, **given), naive.sample(3, seed=seed, **given))
