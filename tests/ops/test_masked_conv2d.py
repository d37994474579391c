import pytest
import torch

from fastgen.ops import masked_conv2d
from tests.ops.masked_conv2d_truth import ACTIVATIONS, GEOMETRIES, gradients, problem, strided, truth


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("kind", ["A", "B", "A-rgb", "B-rgb", "random", "all", "none"])
def test_equals_a_dense_convolution_of_masked_weights(kind, geometry, activation, device):
    x, weight, mask, bias = problem(kind, device=device)
    expected = gradients(lambda x, w, b: truth(x, w, mask, b, activation, **geometry), (x, weight, bias))
    options = {"activation": activation, **geometry}
    found = gradients(lambda x, w, b: masked_conv2d(x, w, mask, b, **options), (x, weight, bias))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert (found[2][~mask] == 0).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 1), (5, 5), (2, 4)], ids=str)
def test_any_kernel_size(size):
    x, weight, mask, bias = problem("random", size=size)
    torch.testing.assert_close(masked_conv2d(x, weight, mask, bias), truth(x, weight, mask, bias))


def test_masked_weights_take_no_part_whatever_their_value():
    x, weight, mask, bias = problem()
    expected = masked_conv2d(x, weight, mask, bias, padding=1)
    with torch.no_grad():
        weight[~mask] = torch.nan
    found = gradients(lambda x, w, b: masked_conv2d(x, w, mask, b, padding=1), (x, weight, bias))
    torch.testing.assert_close(found[0], expected)
    assert all(one.isfinite().all() for one in found)
    x.data[0, 0, 0, 0] = torch.inf
    grad = gradients(lambda x, w, b: masked_conv2d(x, w, mask, b, padding=1), (x, weight, bias))[2]
    assert (grad[~mask] == 0).all()


def test_without_mask_or_bias():
    x, weight, mask, bias = problem("all")
    torch.testing.assert_close(masked_conv2d(x, weight, None, bias), truth(x, weight, mask, bias))
    torch.testing.assert_close(masked_conv2d(x, weight, mask), truth(x, weight, mask, None))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    x, weight, mask, bias = problem("A-rgb", batch=1, height=3, width=4)
    options = {"padding": 1, "activation": activation, "impl": "reference"}
    assert torch.autograd.gradcheck(lambda x, w, b: masked_conv2d(x, w, mask, b, **options), (x, weight, bias))


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "expanded"])
def test_any_strides(layout):
    x, weight, mask, bias = problem()
    moved = strided(x.detach(), layout)
    expected = truth(moved.contiguous(), weight, mask, bias, padding=1)
    weight = strided(weight.detach(), "channels_last")
    torch.testing.assert_close(masked_conv2d(moved, weight, mask, bias, padding=1), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (1, 3, 1, 1), (2, 3, 1, 4), (1, 3, 4, 1), (1, 1, 2, 2)], ids=str)
def test_empty_and_size_one(shape, activation):
    batch, inputs, height, width = shape
    x, weight, mask, bias = problem("B", batch, inputs, 2, height, width)
    found = gradients(lambda x, w, b: masked_conv2d(x, w, mask, b, padding=1, activation=activation), (x, weight, bias))
    expected = gradients(lambda x, w, b: truth(x, w, mask, b, activation, padding=1), (x, weight, bias))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_an_image_without_a_batch():
    x, weight, mask, bias = problem()
    found = masked_conv2d(x[0], weight, mask, bias, activation="gated")
    torch.testing.assert_close(found, truth(x, weight, mask, bias, "gated")[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_as_close_as_a_dense_convolution(dtype, device):
    x, weight, mask, bias = problem(inputs=16, outputs=8, dtype=dtype, device=device)
    options = {"padding": 1, "activation": "gated"}
    expected = gradients(lambda x, w, b: truth(x, w, mask, b, **options), (x, weight, bias))
    found = gradients(lambda x, w, b: masked_conv2d(x, w, mask, b, **options), (x, weight, bias))
    epsilon = torch.finfo(dtype).eps
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        # Sums of up to 60 terms of size 1: one rounding of the result, and of the gate's two halves.
        assert (one.double() - other).abs().max() <= 4 * epsilon * max(1, other.abs().max())


def test_gradients_not_asked_for_are_not_produced():
    x, weight, mask, bias = problem()
    out = masked_conv2d(x.detach(), weight, mask, bias.detach())
    out.sum().backward()
    assert weight.grad is not None
    assert x.grad is None
    assert bias.grad is None


def test_autocast():
    x, weight, mask, bias = problem(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = masked_conv2d(x, weight, mask, bias, padding=1, activation="gated")
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), truth(x, weight, mask, bias, "gated", padding=1), rtol=0, atol=0.02)
    out.sum().backward()
    assert weight.grad.dtype == torch.float32


def test_torch_func():
    x, weight, mask, bias = problem()
    found = torch.func.vmap(lambda w: masked_conv2d(x, w, mask, bias, activation="gated"))(
        weight[None].expand(2, *weight.shape)
    )
    torch.testing.assert_close(found[1], truth(x, weight, mask, bias, "gated"))
    each = torch.func.vmap(
        torch.func.grad(lambda w, one: masked_conv2d(one[None], w, mask, bias).square().sum()), (None, 0)
    )(weight, x)
    (whole,) = torch.autograd.grad(truth(x, weight, mask, bias).square().sum(), weight)
    torch.testing.assert_close(each.sum(0), whole)


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"x": torch.ones(1, 3, 6, 5, dtype=torch.int64)}, TypeError, "x must be a float"),
        ({"x": [1.0]}, TypeError, "x must be a float"),
        ({"x": torch.ones(3, 5)}, ValueError, "x must have the shape"),
        ({"x": torch.ones(1, 4, 6, 5)}, ValueError, r"x must have the shape \(B, 3, H, W\)"),
        ({"x": torch.ones(1, 3, 6, 5).double()}, TypeError, "same dtype"),
        ({"x": torch.ones(1, 3, 2, 5)}, ValueError, "height 2"),
        ({"weight": torch.ones(6, 3, 3)}, ValueError, "weight must have the shape"),
        ({"mask": torch.ones(6, 3, 3, 3)}, TypeError, "mask must be a bool"),
        ({"mask": torch.ones(3, 3, dtype=torch.bool)}, ValueError, "mask must have the shape"),
        ({"bias": torch.ones(5)}, ValueError, r"bias must have the shape \(6,\)"),
        ({"bias": torch.ones(6).bfloat16()}, TypeError, "same dtype"),
        ({"stride": 0}, ValueError, "stride"),
        ({"padding": -1}, ValueError, "padding"),
        ({"dilation": (1, 1, 1)}, ValueError, "dilation"),
        ({"activation": "tanh"}, ValueError, "activation"),
        ({"weight": torch.ones(5, 3, 3, 3), "mask": None, "bias": None, "activation": "gated"}, ValueError, "even"),
        ({"impl": "cuda"}, ValueError, "impl"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(changes, error, named):
    x, weight, mask, bias = (one.detach() for one in problem(dtype=torch.float32))
    arguments = {"x": x, "weight": weight, "mask": mask, "bias": bias, **changes}
    with pytest.raises(error, match=named):
        masked_conv2d(**arguments)


def test_triton_outside_the_interpreter_says_what_to_do(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    x, weight, mask, bias = problem(dtype=torch.float32)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        masked_conv2d(x, weight, mask, bias, impl="triton")


def test_compiles_into_one_graph():
    x, weight, mask, bias = problem(dtype=torch.float32)
    compiled = torch.compile(masked_conv2d, fullgraph=True, backend="aot_eager")
    options = {"padding": 1, "activation": "gated"}
    expected = gradients(lambda x, w, b: masked_conv2d(x, w, mask, b, **options), (x, weight, bias))
    found = gradients(lambda x, w, b: compiled(x, w, mask, b, **options), (x, weight, bias))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
