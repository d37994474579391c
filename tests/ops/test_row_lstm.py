import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from fastgen.ops import row_lstm
from fastgen.ops.row_lstm import row_lstm_cell, row_lstm_reference
from tests.ops.lstm_truth import gradients, problem, row_pixels

SIZES = [
    (2, 3, 4, 5, 3),
    (1, 2, 7, 3, 5),
    (3, 1, 1, 6, 3),
    (2, 5, 6, 1, 3),
    (1, 2, 3, 2, 7),
    (2, 2, 3, 4, 1),
]  # B h H W k


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
