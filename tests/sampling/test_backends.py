"""The library's own models: every backend gives the images of the naive loop, each activation computed once."""

import functools

import pytest
import torch

from fastgen import accelerate
from fastgen.models import GatedPixelCNN, PixelCNN, PixelCNNPP, PixelRNN
from fastgen.sampling.machine.cpu.build import machine
from tests.sampling.exactness import assert_exact, pair

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


def samplers(model, *backends, **options):
    return [accelerate(model, model.shape, backend=backend, **arguments(model), **options) for backend in backends]


def arguments(model):
    condition = torch.tensor([2, 0, 1], device=next(model.parameters()).device) if model.n_classes else None
    return {"distribution": model.distribution, "condition": condition}


@pytest.mark.parametrize("name", MODELS)
def test_equals_naive_and_computes_everything_once(name):
    model = make(name)
    naive = samplers(model, "naive")[0]
    naive.sample = functools.cache(naive.sample)  # for both backends
    for backend in ("eager", "compiled"):
        (fast,) = samplers(model, backend, verify="always")
        for seed in range(2):  # the second batch begins anew
            assert_exact(fast, naive, 3, error=1e-5, seed=seed)
        assert 1 <= fast.work_ratio <= 1.05
        assert fast.stats.backend == backend


@pytest.mark.parametrize("backend", ["eager", "compiled"])
@pytest.mark.parametrize("name", ["gated", "diagonal", "plain, colours", "row"])
def test_known_rows_are_filled_in_one_pass(name, backend):
    model = make(name)
    fast, naive = pair(model, model.shape, backend, **arguments(model))
    known = torch.randint(model.levels, (3, *model.shape))
    mask = torch.zeros(model.shape, dtype=torch.bool)
    mask[:, :3] = True
    mask[:, 3, 1] = True
    images = assert_exact(fast, naive, 3, error=1e-5, seed=1, known=known, known_mask=mask)
    assert torch.equal(images[:, :, :3], known[:, :, :3])


def test_on_a_cpu_auto_is_the_step_machine():
    (auto,) = samplers(make("gated"), "auto")
    assert "auto: on a CPU compiled" in auto.explain()
    auto.sample(1, seed=0)
    assert auto.stats.backend == "compiled"


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
def test_what_cannot_run_here_is_said_and_replaced(backend, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # in the interpreter the persistent kernel runs anywhere
    model = make("gated")
    with pytest.warns(UserWarning, match=f"from the {backend} to the compiled backend"):
        (sampler,) = samplers(model, backend)
    assert f"compiled instead of {backend}" in sampler.explain()
    assert torch.equal(sampler.sample(2, seed=1), samplers(model, "naive")[0].sample(2, seed=1))


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_cuda_graphs_equal_naive(name):
    model = make(name, "cuda")
    graph, naive = samplers(model, "cuda_graph", "naive")
    for seed in range(4):  # the first batch runs eagerly, the second is captured, later ones are replayed
        assert torch.equal(graph.sample(3, seed=seed), naive.sample(3, seed=seed))
    known = torch.zeros(3, *model.shape, dtype=torch.long, device="cuda")
    mask = torch.zeros(model.shape, dtype=torch.bool, device="cuda")
    mask[:, 2] = True
    for seed in range(3):
        given = {"known": known, "known_mask": mask}
        assert torch.equal(graph.sample(3, seed=seed, **given), naive.sample(3, seed=seed, **given))


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in MODELS if name.split(",")[0] not in ("diagonal", "row")])
def test_the_persistent_kernel_equals_naive(name):
    model = make(name, "cuda")
    fast, naive = samplers(model, "persistent", "naive")
    for seed in range(2):
        assert torch.equal(fast.sample(3, seed=seed), naive.sample(3, seed=seed))
        assert fast.stats.backend == "persistent" and fast.stats.redrawn == 0
