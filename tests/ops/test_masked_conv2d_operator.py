"""The operator: its contract, graphs, transforms, autocast, and the errors that it tells."""

import sys

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

from fastgen.kernels.masked_conv2d import launch
from fastgen.ops import masked_conv2d
from fastgen.ops.masked_conv2d import in_aten
from tests.ops.masked_conv2d_truth import check, gradients, problem, truth

pytestmark = pytest.mark.usefixtures("full_memory", "kernels_wherever_they_can")


def test_operator_contract(device):
    x, weight, mask, bias = problem("B", 2, 3, 4, 4, 3, dtype=torch.float32, device=device)
    condition = torch.randn(2, 4, device=device, requires_grad=True)
    residual = torch.randn(2, 4, 4, 3, device=device, requires_grad=True)
    geometry = ([1, 1], [1, 1], [1, 1])
    for activation, keep, added in (
        ("none", "", residual),
        ("relu", "", None),
        ("gated", "valve", None),
        ("gated", "both", None),
    ):
        arguments = (x, weight, mask, bias, condition, added, None, None, *geometry, activation, keep)
        torch.library.opcheck(torch.ops.fastgen.masked_conv2d.default, arguments)


@pytest.mark.parametrize(("activation", "keep"), [("none", ""), ("relu", ""), ("gated", "valve"), ("gated", "both")])
def test_written_out_in_plain_operators_it_is_the_same(activation, keep, device):
    x, weight, mask, bias = (one.detach() for one in problem("B", 2, 3, 4, 5, 5, dtype=torch.float32, device=device))
    condition, residual = torch.randn(2, 4, device=device), torch.randn(2, 4, 3, 2, device=device)
    other, other_weight = torch.randn(2, 3, 3, 2, device=device), torch.randn(4, 3, 1, 1, device=device)
    added = residual if activation == "none" else None
    arguments = (x, weight, mask, bias, condition, added, other, other_weight, [2, 2], [1, 0], [1, 1], activation, keep)
    for one, two in zip(torch.ops.fastgen.masked_conv2d(*arguments), in_aten(*arguments), strict=True):
        torch.testing.assert_close(one, two)


def test_compiles_into_one_graph(device):
    x, weight, mask, bias = problem("B", dtype=torch.float32, device=device)
    options = {"padding": 1, "activation": "gated", "impl": "triton"}
    compiled = torch.compile(masked_conv2d, fullgraph=True, backend="aot_eager")
    expected = gradients(lambda x, w, b: masked_conv2d(x, w, mask, b, **options), (x, weight, bias))
    for one, other in zip(
        gradients(lambda x, w, b: compiled(x, w, mask, b, **options), (x, weight, bias)), expected, strict=True
    ):
        torch.testing.assert_close(one, other)


def test_transforms_of_torch_func_get_the_definition(device, monkeypatch):
    """As "auto" on a GPU: `torch.func` cannot differentiate an operator of torch.library."""
    x, weight, mask, bias = problem("B", 2, 3, 4, 4, 3, dtype=torch.float32, device=device)
    monkeypatch.setattr(sys.modules["fastgen.ops.masked_conv2d"], "uses_triton", lambda impl, x: True)
    calls = []
    monkeypatch.setattr(
        sys.modules["fastgen.ops.masked_conv2d"], "fused", lambda *arguments, **more: calls.append(1) or (x, x)
    )
    masked_conv2d(x, weight, mask, bias)
    assert calls == [1]

    def loss(w, image):
        return masked_conv2d(image[None], w, mask, bias, activation="gated").square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(weight, x)
    (whole,) = torch.autograd.grad(truth(x, weight, mask, bias, "gated").square().sum(), weight)
    check([each.sum(0)], [whole])
    assert calls == [1]


def test_autocast(device):
    x, weight, mask, bias = problem("B", dtype=torch.float32, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = masked_conv2d(x, weight, mask, bias, condition=torch.randn(2, 6, device=device), impl="triton")
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert weight.grad.dtype == torch.float32 and weight.grad[~mask].abs().sum() == 0


def test_what_the_kernel_cannot_do_is_said(device):
    x, weight, mask, bias = problem("B", dtype=torch.float64, device=device)
    with pytest.raises(TypeError, match="float64"):
        masked_conv2d(x, weight, mask, bias, impl="triton")
    x, weight, mask, bias = problem("B", dtype=torch.float32, device=device)
    (grad,) = torch.autograd.grad(masked_conv2d(x, weight, mask, bias, impl="triton").sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_too_many_pixels_are_refused(monkeypatch, device):
    monkeypatch.setattr(launch, "MAX_PIXELS", 10)
    x, weight, mask, bias = problem("B", dtype=torch.float32, device=device)
    with pytest.raises(ValueError, match="split the batch"):
        masked_conv2d(x, weight, mask, bias, impl="triton")


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"condition": torch.ones(2, 5)}, ValueError, r"condition must have the shape \(2, 6\)"),
        ({"condition": torch.ones(2, 6, dtype=torch.int64)}, TypeError, "condition must be a float"),
        ({"residual": torch.ones(2, 6, 6, 5)}, ValueError, r"residual must have the shape \(2, 6, 4, 3\)"),
        ({"residual": torch.ones(2, 6, 4, 3).double()}, TypeError, "residual must have the same dtype"),
    ],
    ids=str,
)
def test_bad_addends_are_named(changes, error, named):
    x, weight, mask, bias = problem("B", dtype=torch.float32)
    with pytest.raises(error, match=named):
        masked_conv2d(x, weight, mask, bias, **changes)


@pytest.mark.parametrize(
    ("impl", "activation", "channels"),
    [("reference", "gated", 3), ("triton", "none", 16), ("triton", "relu", 3), ("triton", "gated", 16)],
)
def test_compiles_for_sizes_that_vary(impl, activation, channels, device):
    """`dynamic=True`: one graph for all sizes, with gradients; the batch, then the sides vary."""
    weight, mask, bias = problem("B", 1, channels, 6, dtype=torch.float32, device=device)[1:]
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(1)
        return graph.forward

    def layer(x, weight, bias):
        return masked_conv2d(x.sin(), weight, mask, bias, padding=1, activation=activation, impl=impl)

    compiled = torch.compile(layer, dynamic=True, fullgraph=True, backend=aot_autograd(fw_compiler=backend))
    for batch, height, width in ((2, 5, 4), (3, 5, 4), (4, 7, 6)):
        x = torch.randn(batch, channels, height, width, device=device, requires_grad=True)
        expected = gradients(layer, (x, weight, bias))
        for one, two in zip(gradients(compiled, (x, weight, bias)), expected, strict=True):
            torch.testing.assert_close(one, two)
    assert len(graphs) <= 2


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"weight": torch.ones(6, 3, 3)}, ValueError, "weight must have the shape"),
        ({"weight": None}, TypeError, "weight must be a float"),
        ({"mask": torch.ones(6, 3, 3, 3)}, TypeError, "mask must be a bool"),
        ({"mask": torch.ones(3, 3, dtype=torch.bool)}, ValueError, "mask must have the shape"),
        ({"mask": [True]}, TypeError, "mask must be a bool"),
        ({"bias": torch.ones(5)}, ValueError, r"bias must have the shape \(6,\)"),
        ({"bias": torch.ones(6).bfloat16()}, TypeError, "x and bias must have the same dtype"),
        ({"residual": torch.ones(2, 6, 6, 5)}, ValueError, r"residual must have the shape \(2, 6, 4, 3\)"),
        ({"stride": [1, 0]}, ValueError, "stride"),
        ({"padding": (1, 1.0)}, ValueError, "padding"),
        ({"dilation": True, "stride": 9, "padding": -1}, ValueError, "padding"),
        ({"activation": "tanh"}, ValueError, "activation"),
    ],
    ids=str,
)
@pytest.mark.parametrize("train", [False, True])
def test_bad_arguments_are_named_before_kernels_are_planned(train, changes, error, named, device):
    """Also after a call that was as it must be, of which most is the same."""
    x, weight, mask, bias = problem("B", dtype=torch.float32, device=device)
    arguments = {"x": x, "weight": weight, "mask": mask, "bias": bias, "impl": "triton"}
    with torch.set_grad_enabled(train):
        masked_conv2d(**arguments)
        with pytest.raises(error, match=named):
            masked_conv2d(**arguments | changes)
