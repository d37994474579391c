import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from fastgen.ops import diagonal_lstm
from fastgen.ops.diagonal_lstm import diagonal_lstm_cell, diagonal_lstm_reference
from tests.ops.lstm_truth import diagonal_pixels, gradients, problem

SIZES = [(2, 3, 4, 5), (1, 2, 7, 3), (3, 1, 1, 6), (2, 5, 6, 1), (1, 1, 1, 1)]  # B, h, H, W


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("options", [{"impl": "reference"}, {}, {"recompute": True}], ids=str)
def test_equals_the_pixel_loop(size, reverse, options):
    gates, weight, grad = problem(*size, 2)
    expected = gradients(lambda g, w: diagonal_pixels(g, w, reverse), gates, weight, grad)
    found = gradients(lambda g, w: diagonal_lstm(g, w, reverse=reverse, **options), gates, weight, grad)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck(reverse):
    gates, weight, _ = problem(2, 2, 3, 4, 2)
    inputs = (gates.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda g, w: diagonal_lstm_reference(g, w, reverse=reverse), inputs)
    assert torch.autograd.gradcheck(lambda g, w: diagonal_lstm(g, w, reverse=reverse), inputs)


def strided(tensor, layout):
    if layout == "channels_last":
        return tensor.to(memory_format=torch.channels_last)
    wide = torch.full((*tensor.shape[:3], 2 * tensor.shape[3] + 1), torch.nan, dtype=tensor.dtype, device=tensor.device)
    wide[..., 1::2] = tensor
    return wide[..., 1::2]


@pytest.mark.parametrize("layout", ["channels_last", "sliced"])
def test_any_strides(layout):
    gates, weight, grad = problem(2, 3, 4, 5, 2)
    expected = gradients(diagonal_lstm, gates, weight, grad)
    found = gradients(diagonal_lstm, strided(gates, layout), weight, strided(grad, layout))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_as_close_as_its_rounding(dtype):
    gates, weight, grad = problem(2, 8, 6, 7, 2, dtype)
    truth = gradients(diagonal_pixels, gates.double(), weight.double(), grad.double())
    found = gradients(diagonal_lstm, gates, weight, grad)
    for one, other in zip(found, truth, strict=True):
        assert one.dtype == dtype
        error = (one.double() - other).abs().max() / other.abs().max()
        assert error < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("reverse", [False, True])
def test_depends_on_the_pixels_above_and_behind_only(reverse):
    gates, weight, _ = problem(1, 2, 4, 5, 2)
    before = diagonal_lstm(gates, weight, reverse=reverse)
    gates[:, :, 1, 2] += 1
    changed = (diagonal_lstm(gates, weight, reverse=reverse) != before).any(1)[0]
    expected = torch.zeros(4, 5, dtype=torch.bool)
    expected[1:, : 2 + 1] = reverse
    expected[1:, 2:] |= not reverse
    assert torch.equal(changed, expected)


def test_the_cell_advances_the_scan_a_pixel_at_a_time():
    gates, weight, _ = problem(2, 3, 3, 4, 2, torch.float32)
    hidden = diagonal_lstm(gates, weight)
    zeros = hidden.new_zeros(2, 3)
    for i in range(3):
        left, cell = zeros, zeros
        for j in range(4):
            up = hidden[:, :, i - 1, j] if i else zeros
            left, cell = diagonal_lstm_cell(gates[:, :, i, j], weight, up, left, cell)
            torch.testing.assert_close(left, hidden[:, :, i, j])


def test_is_one_node_of_a_trace():
    gates, weight, _ = problem(2, 3, 3, 4, 2, torch.float32)
    with torch.no_grad():
        graph = make_fx(lambda g: diagonal_lstm(g, weight, reverse=True), tracing_mode="real")(gates).graph
    calls = [node for node in graph.nodes if node.op == "call_function"]
    assert [node.target for node in calls] == [torch.ops.fastgen.diagonal_lstm.default]
    assert calls[0].args[2] is True and len(calls[0].args) == 3


def test_operators_pass_opcheck():
    gates, weight, grad = problem(2, 3, 3, 4, 2, torch.float32)
    inputs = (gates.requires_grad_(), weight.requires_grad_(), False)
    torch.library.opcheck(torch.ops.fastgen.diagonal_lstm.default, inputs)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.fastgen.diagonal_lstm_saving.default, (*inputs, False), test_utils=tests)
    _, activated, cell = torch.ops.fastgen.diagonal_lstm_saving(gates.detach(), weight.detach(), False, False)
    torch.library.opcheck(
        torch.ops.fastgen.diagonal_lstm_backward.default, (grad, activated, cell, weight.detach(), False, False)
    )


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda g, w: (g[:, :7], w), ValueError, "gates must have the shape"),
        (lambda g, w: (g[0], w), ValueError, "gates must have the shape"),
        (lambda g, w: (g[:, :, :0], w), ValueError, "H, W >= 1"),
        (lambda g, w: (g, w[:, :1]), ValueError, "weight must have the shape"),
        (lambda g, w: (g, w[..., :1]), ValueError, "two taps"),
        (lambda g, w: (g, w.float()), TypeError, "same dtype"),
        (lambda g, w: (g.long(), w), TypeError, "gates must be a float tensor"),
        (lambda g, w: (g, None), TypeError, "weight must be a float tensor"),
    ],
)
def test_wrong_arguments(change, error, words):
    gates, weight, _ = problem(1, 2, 3, 4, 2)
    with pytest.raises(error, match=words):
        diagonal_lstm(*change(gates, weight))


def test_wrong_implementations():
    gates, weight, _ = problem(1, 2, 3, 4, 2)
    with pytest.raises(ValueError, match="impl must be one of"):
        diagonal_lstm(gates, weight, impl="cuda")
    with pytest.raises(TypeError, match="float64"):
        diagonal_lstm(gates, weight, impl="triton")
