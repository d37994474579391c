"""float32 is float32 while images are drawn; the settings are found again as they were."""

import contextlib
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastgen import Categorical
from fastgen.sampling.precision import LEAVES, PARENTS, ieee_float32
from tests.sampling.exactness import assert_exact, pair
from tests.sampling.zoo_case import raster_mask

newer = pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="fp32_precision came with PyTorch 2.9")
OLD = {
    "matmul": lambda: torch.backends.cuda.matmul.allow_tf32,
    "convolutions": lambda: torch.backends.cudnn.allow_tf32,
    "precision": torch.get_float32_matmul_precision,
}


def settings():
    """All that can be read; a getter raises where older and newer settings contradict each other."""
    found = {}
    for name, read in OLD.items():
        try:
            found[name] = read()
        except RuntimeError:
            found[name] = "contradiction"
    if hasattr(torch._C, "_get_fp32_precision_getter"):
        found |= {key: torch._C._get_fp32_precision_getter(*key) for key in (*PARENTS, *LEAVES)}
    return found


def as_pytorch_starts():
    newer_too = hasattr(torch._C, "_get_fp32_precision_getter")
    for key in (*PARENTS, *LEAVES) if newer_too else ():
        torch._C._set_fp32_precision_setter(*key, "none")
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    for key in (("cuda", "matmul"), ("mkldnn", "matmul")) if newer_too else ():
        torch._C._set_fp32_precision_setter(*key, "none")


@pytest.fixture(autouse=True)
def as_before():
    as_pytorch_starts()  # whatever tests before this one have left
    with ieee_float32():  # puts back what it found, so that the getters are the same from now on
        pass
    before = settings()
    yield
    as_pytorch_starts()
    assert settings() == before


CHANGES = {
    "as PyTorch starts": lambda: None,
    "matmul, older": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "convolutions, older": lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "matmul, newer": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "convolutions, newer": lambda: setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee"),
    "recurrent, newer": lambda: setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee"),
    "oneDNN": lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
    "everything": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
}


@newer
@pytest.mark.parametrize("name", CHANGES)
def test_settings_are_ieee_inside_and_as_they_were_outside(name):
    CHANGES[name]()
    before = settings()
    for error in (None, RuntimeError):
        try:
            with ieee_float32(), ieee_float32():
                inside = settings()
                if error is not None:
                    raise error
        except RuntimeError:
            assert error is not None
        assert settings() == before
        assert (inside["matmul"], inside["convolutions"], inside["precision"]) == (False, False, "highest")
        assert all(inside[leaf] == "ieee" for leaf in LEAVES)


@newer
def test_what_a_setting_inherits_it_goes_on_to_inherit():
    torch.backends.cudnn.conv.fp32_precision = "none"
    torch.backends.fp32_precision = "tf32"
    with ieee_float32():
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"
    torch.backends.fp32_precision = "ieee"
    assert torch.backends.cudnn.conv.fp32_precision == "ieee"


def test_one_thread_at_a_time_is_inside():
    inside, most = [], []

    def work():
        for _ in range(50):
            with ieee_float32():
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1 and len(most) == 200


def tf32(x):
    """Rounded to the ten bits that a tensor core multiplies."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class OnTensorCores(nn.Module):
    """A masked network whose convolutions round as a GPU's do where PyTorch's settings allow it."""

    def __init__(self, layers=3):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(1 if k == 0 else 24, 24, 3, padding=1) for k in range(layers))
        self.out = nn.Conv2d(24, 16, 1)
        with torch.no_grad():
            for k, layer in enumerate(self.layers):
                layer.weight.mul_(4 * raster_mask(3, k == 0))
            self.out.weight.mul_(3)

    def forward(self, x):
        rounds = tf32 if torch.backends.cudnn.allow_tf32 else lambda x: x
        for layer in self.layers:
            x = F.elu(F.conv2d(rounds(x), rounds(layer.weight), layer.bias, padding=1))
        return F.conv2d(rounds(x), rounds(self.out.weight), self.out.bias)


SHAPE, DISTRIBUTION = (1, 8, 8), Categorical(16, "B(KC)HW")


def test_a_model_that_would_round_to_tf32_is_drawn_without_a_second_time():
    model = OnTensorCores().eval()
    x = torch.rand(4, *SHAPE) * 2 - 1
    with torch.no_grad():
        rounded = model(x)
        with ieee_float32():
            assert 1e-4 < (model(x) - rounded).abs().max() < 0.1
        assert rounded.std() > 1  # logits as spread as those of a trained model
    fast, naive = pair(model, SHAPE, verify="auto", distribution=DISTRIBUTION)
    redrawn = 0
    for seed in range(3):
        assert_exact(fast, naive, 16, passes=None, seed=seed)
        redrawn += fast.stats.redrawn
    assert redrawn == 0
    assert torch.backends.cudnn.allow_tf32


@pytest.mark.filterwarnings("ignore:the engine's output differs")
def test_the_simulated_rounding_would_have_been_seen(monkeypatch):
    """Where drawing does not set the settings, whole passes round otherwise than the engine, planned without."""
    model = OnTensorCores().eval()
    fast, naive = pair(model, SHAPE, verify="auto", distribution=DISTRIBUTION)
    monkeypatch.setattr("fastgen.sampling.sampler.ieee_float32", contextlib.nullcontext)
    redrawn = []
    for seed in range(3):
        assert torch.equal(fast.sample(16, seed=seed), naive.sample(16, seed=seed))
        redrawn.append(fast.stats.redrawn)
    assert sum(redrawn) > 0
