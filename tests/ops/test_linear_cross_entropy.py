"""The softmax's nats from the features, all at once and in parts: one value, one gradient, less memory."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastgen.models.softmax import logits_of_colours
from fastgen.ops import linear_cross_entropy, reconstruction_nll

# By torch's own operation where it exists, and by checkpointing as on an older torch.
WAYS = pytest.mark.parametrize("way", ["torch", "checkpoint"])


@pytest.fixture
def use(monkeypatch):
    def choose(way):
        if way == "torch" and not hasattr(F, "linear_cross_entropy"):
            pytest.skip("this torch has no linear_cross_entropy")
        if way == "checkpoint" and hasattr(F, "linear_cross_entropy"):
            monkeypatch.delattr(F, "linear_cross_entropy")

    return choose


def make(batch=3, features=6, channels=3, levels=5, image=(3, 5), dtype=torch.float64, device="cpu"):
    kind = {"dtype": dtype, "device": device}
    return (
        torch.randn(batch, features, *image, **kind, requires_grad=True),
        torch.randn(channels * levels, features, **kind, requires_grad=True),
        torch.randint(levels, (batch, channels, *image), device=device),
        torch.randn(channels * levels, **kind, requires_grad=True),
    )


def truth(features, weight, target, bias):
    """By F.conv2d and torch.distributions."""
    logits = F.conv2d(features, weight[:, :, None, None], bias).unflatten(1, (target.shape[1], -1))
    return -torch.distributions.Categorical(logits=logits.movedim(2, -1)).log_prob(target).flatten(1).sum(1)


@WAYS
@pytest.mark.parametrize("positions", [1, 7, 44, 45, 8192])
@pytest.mark.parametrize("channels", [1, 3])
def test_parts_of_any_size_give_the_same(way, positions, channels, use, device):
    use(way)
    x, w, t, b = make(channels=channels, device=device)
    nats, wanted = linear_cross_entropy(x, w, t, b, positions=positions), truth(x, w, t, b)
    torch.testing.assert_close(nats, wanted)
    upstream = torch.randn_like(nats)
    for found, exact in zip(
        torch.autograd.grad(nats, (x, w, b), upstream), torch.autograd.grad(wanted, (x, w, b), upstream), strict=True
    ):
        torch.testing.assert_close(found, exact)


@WAYS
@pytest.mark.parametrize("positions", [8, 8192])
def test_a_models_head_is_taken_as_it_is(way, positions, use, device):
    """A 1x1 nn.Conv2d, channels last, without bias, and uint8 levels."""
    use(way)
    head = nn.Conv2d(6, 3 * 5, 1, bias=False).to(device)
    x = torch.randn(2, 6, 3, 5, device=device).contiguous(memory_format=torch.channels_last)
    target = torch.randint(5, (2, 3, 3, 5), dtype=torch.uint8, device=device)
    wanted = reconstruction_nll(logits_of_colours(head(x), 3), target, "categorical")
    torch.testing.assert_close(linear_cross_entropy(x, head.weight, target, positions=positions), wanted)


@WAYS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_storage_in_low_precision_gives_float32_nats(way, dtype, use, device):
    use(way)
    x, w, t, b = make(batch=8, dtype=dtype, device=device)
    nats = linear_cross_entropy(x, w, t, b, positions=30)
    wanted = truth(x.double(), w.double(), t, b.double())
    assert nats.dtype == torch.float32
    # The logits are rounded to the dtype, about 3 in size, 45 in an image.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(nats.double(), wanted, rtol=0, atol=3 * eps * math.sqrt(45) + 1e-4)
    grads = torch.autograd.grad(nats.sum(), (x, w, b))
    assert [grad.dtype for grad in grads] == [dtype] * 3
    for grad, exact in zip(grads, torch.autograd.grad(wanted.sum(), (x, w, b)), strict=True):
        largest = exact.abs().max().item()
        torch.testing.assert_close(grad, exact, rtol=0, atol=8 * eps * largest)


@WAYS
def test_fewer_dimensions_and_empty_batches(way, use, device):
    use(way)
    x, w, t, b = make(image=(7,), device=device)
    torch.testing.assert_close(linear_cross_entropy(x, w, t, b, positions=4), truth(x[..., None], w, t[..., None], b))
    assert linear_cross_entropy(x[:0], w, t[:0], b).shape == (0,)
    rows = linear_cross_entropy(x[..., 0], w, t[..., 0], b, positions=2)
    torch.testing.assert_close(rows, truth(x[..., :1, None], w, t[..., :1, None], b))


@WAYS
@pytest.mark.parametrize("positions", [8, 8192])
def test_compiles_into_one_graph(way, positions, use, device):
    use(way)
    x, w, t, b = make(dtype=torch.float32, device=device)

    def loss(x, w, b):
        return linear_cross_entropy(x, w, t, b, positions=positions).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, w, b), loss(x, w, b))
    for found, wanted in zip(
        torch.autograd.grad(compiled(x, w, b), (x, w, b)), torch.autograd.grad(loss(x, w, b), (x, w, b)), strict=True
    ):
        torch.testing.assert_close(found, wanted)


def test_runs_under_autocast(device):
    x, w, t, b = make(dtype=torch.float32, device=device)
    with torch.autocast(device, torch.bfloat16):
        nats = linear_cross_entropy(x, w, t, b, positions=8)
    assert nats.dtype == torch.float32
    torch.testing.assert_close(nats, truth(x, w, t, b), rtol=0.01, atol=0.5)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returned, in elements."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@pytest.mark.parametrize("positions", [16, 8192])
def test_the_logits_of_all_pixels_never_exist(positions):
    """In the way that dispatches operation by operation: checkpointing, here chosen by bfloat16."""
    x, w, t, b = make(batch=4, features=8, channels=1, levels=64, image=(8, 8), dtype=torch.bfloat16)
    with Largest() as seen:
        linear_cross_entropy(x, w, t, b, positions=positions).sum().backward()
    everything = 4 * 64 * 64
    assert seen.elements >= everything if positions == 8192 else seen.elements <= 4 * 8 * 64


def test_second_derivatives_all_at_once():
    x, w, t, b = make(batch=2, channels=1, levels=3, image=(2,), features=2)
    assert torch.autograd.gradgradcheck(lambda x, w, b: linear_cross_entropy(x, w, t, b), (x, w, b))


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"features": 3}, TypeError, "features must be a float tensor, got int"),
        ({"weight": torch.zeros(15, 6).long()}, TypeError, "weight must be a float tensor"),
        ({"bias": [0.0]}, TypeError, "bias must be a float tensor, got list"),
        ({"target": torch.zeros(2, 3, 2, 2)}, TypeError, "target must hold integer levels"),
        ({"target": torch.zeros(2, 3, 2, 3).long()}, ValueError, "features and target must be"),
        ({"target": torch.zeros(1, 3, 2, 2).long()}, ValueError, "one batch size, got 2 and 1"),
        ({"weight": torch.zeros(16, 6)}, ValueError, r"weight must have the shape \(3 \* K, 6\)"),
        ({"weight": torch.zeros(15, 7)}, ValueError, "weight must have the shape"),
        ({"weight": torch.zeros(15, 6, 3, 3)}, ValueError, "weight must have the shape"),
        ({"bias": torch.zeros(14)}, ValueError, r"bias must have the shape \(15,\), got \(14,\)"),
        ({"target": torch.full((2, 3, 2, 2), 5)}, ValueError, r"target must be in 0\.\.4"),
        ({"positions": 0}, ValueError, "positions must be an int >= 1, got 0"),
    ],
)
def test_bad_arguments_are_named(change, error, named):
    arguments = {
        "features": torch.zeros(2, 6, 2, 2),
        "weight": torch.zeros(15, 6),
        "target": torch.zeros(2, 3, 2, 2).long(),
        "bias": torch.zeros(15),
        **change,
    }
    with pytest.raises(error, match=named):
        linear_cross_entropy(**arguments)
