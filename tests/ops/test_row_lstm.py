import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from fastgen.ops import row_lstm
from fastgen.ops.row_lstm import row_lstm_cell, row_lstm_reference
from tests.ops.lstm_truth import gradients, row_pixels

SIZES = [
    (2, 3, 4, 5, 3),
    (1, 2, 7, 3, 5),
    (3, 1, 1, 6, 3),
    (2, 5, 6, 1, 3),
    (1, 2, 3, 2, 7),
    (2, 2, 3, 4, 1),
]  # B h H W k


def problem(batch, units, height, width, taps, dtype=torch.float64, device="cpu"):
    gates = torch.randn(batch, 4 * units, height, width, dtype=torch.float64)
    weight = torch.randn(4 * units, units, taps, dtype=torch.float64) / units**0.5
    grad = torch.randn(batch, units, height, width, dtype=torch.float64)
    return tuple(tensor.to(device, dtype) for tensor in (gates, weight, grad))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("options", [{"impl": "reference"}, {}, {"recompute": True}], ids=str)
def test_equals_the_pixel_loop(size, options):
    gates, weight, grad = problem(*size)
    expected = gradients(row_pixels, gates, weight, grad)
    found = gradients(lambda g, w: row_lstm(g, w, **options), gates, weight, grad)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_gradcheck():
    gates, weight, _ = problem(2, 2, 3, 4, 3)
    inputs = (gates.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(row_lstm_reference, inputs)
    assert torch.autograd.gradcheck(row_lstm, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_as_close_as_its_rounding(dtype):
    gates, weight, grad = problem(2, 8, 6, 7, 3, dtype)
    truth = gradients(row_pixels, gates.double(), weight.double(), grad.double())
    found = gradients(row_lstm, gates.to(memory_format=torch.channels_last), weight, grad)
    for one, other in zip(found, truth, strict=True):
        assert one.dtype == dtype
        error = (one.double() - other).abs().max() / other.abs().max()
        assert error < 16 * torch.finfo(dtype).eps


def test_depends_on_the_widening_rows_above_only():
    gates, weight, _ = problem(1, 2, 4, 7, 3)
    before = row_lstm(gates, weight)
    gates[:, :, 1, 3] += 1
    changed = (row_lstm(gates, weight) != before).any(1)[0]
    expected = torch.zeros(4, 7, dtype=torch.bool)
    for below in range(3):
        expected[1 + below, 3 - below : 4 + below] = True
    assert torch.equal(changed, expected)


def test_the_cell_advances_the_scan_a_pixel_at_a_time():
    gates, weight, _ = problem(2, 3, 3, 4, 3, torch.float32)
    hidden = row_lstm(gates, weight)
    cells = hidden.new_zeros(2, 3, 4)
    for i in range(3):
        above = torch.nn.functional.pad(hidden[:, :, i - 1] if i else torch.zeros_like(cells), (1, 1))
        new_cells = []
        for j in range(4):
            found, cell = row_lstm_cell(gates[:, :, i, j], weight, above[..., j : j + 3], cells[..., j])
            torch.testing.assert_close(found, hidden[:, :, i, j])
            new_cells.append(cell)
        cells = torch.stack(new_cells, -1)


def test_is_one_node_of_a_trace():
    gates, weight, _ = problem(2, 3, 3, 4, 3, torch.float32)
    with torch.no_grad():
        graph = make_fx(lambda g: row_lstm(g, weight), tracing_mode="real")(gates).graph
    calls = [node for node in graph.nodes if node.op == "call_function"]
    assert [node.target for node in calls] == [torch.ops.fastgen.row_lstm.default]
    assert len(calls[0].args) == 2


def test_operators_pass_opcheck():
    gates, weight, grad = problem(2, 3, 3, 4, 3, torch.float32)
    inputs = (gates.requires_grad_(), weight.requires_grad_())
    torch.library.opcheck(torch.ops.fastgen.row_lstm.default, inputs)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.fastgen.row_lstm_saving.default, (*inputs, False), test_utils=tests)
    _, activated, cell = torch.ops.fastgen.row_lstm_saving(gates.detach(), weight.detach(), False)
    torch.library.opcheck(torch.ops.fastgen.row_lstm_backward.default, (grad, activated, cell, weight.detach(), False))


def test_compiles_in_one_graph():
    gates, weight, grad = problem(2, 3, 3, 4, 3, torch.float32)
    compiled = torch.compile(row_lstm, fullgraph=True, backend="aot_eager")
    for one, other in zip(
        gradients(compiled, gates, weight, grad), gradients(row_lstm, gates, weight, grad), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_autocast_takes_its_dtype():
    gates, weight, grad = problem(2, 3, 3, 4, 3, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        hidden, grad_gates, grad_weight = gradients(row_lstm, gates, weight, grad)
    assert hidden.dtype == torch.bfloat16
    assert grad_gates.dtype == grad_weight.dtype == torch.float32


@pytest.mark.parametrize("wanted", [0, 1])
def test_gradients_not_asked_for(wanted):
    gates, weight, grad = problem(1, 2, 3, 4, 3)
    expected = gradients(row_lstm, gates, weight, grad)[1 + wanted]
    inputs = [gates, weight]
    inputs[wanted].requires_grad_()
    (found,) = torch.autograd.grad(row_lstm(*inputs), inputs[wanted], grad)
    torch.testing.assert_close(found, expected)


def test_a_second_derivative_is_the_definitions_alone():
    gates, weight, _ = problem(2, 2, 3, 3, 3)
    gates.requires_grad_()

    def slope(**options):
        return torch.autograd.grad(row_lstm(gates, weight, **options).sum(), gates, create_graph=True)[0]

    assert torch.autograd.grad(slope(impl="reference").square().sum(), gates)[0].abs().max() > 0
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(slope().square().sum(), gates)


def test_empty_batch():
    gates, weight, grad = problem(0, 2, 3, 4, 3)
    hidden, grad_gates, grad_weight = gradients(row_lstm, gates, weight, grad)
    assert hidden.shape == (0, 2, 3, 4) and grad_gates.shape == gates.shape
    assert torch.equal(grad_weight, torch.zeros_like(weight))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda g, w: (g[:, :7], w), ValueError, "gates must have the shape"),
        (lambda g, w: (g, w[..., :2]), ValueError, "odd number of taps"),
        (lambda g, w: (g, w.float()), TypeError, "same dtype"),
    ],
)
def test_wrong_arguments(change, error, words):
    gates, weight, _ = problem(1, 2, 3, 4, 3)
    with pytest.raises(error, match=words):
        row_lstm(*change(gates, weight))
