import copy
import itertools

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from fastgen.nn import DiagonalBiLSTM, DiagonalLSTM, RowLSTM
from tests.ops.lstm_truth import diagonal_pixels, row_pixels

HEIGHT, WIDTH = 4, 5
LAYERS = [DiagonalLSTM, DiagonalBiLSTM, RowLSTM]


def dependences(layer, colours):
    """(C_out, H, W, C_in, H, W), C colour groups each: whether an output changes with an input."""
    channels = layer.input_to_state.in_channels if hasattr(layer, "input_to_state") else 2 * colours
    x = torch.randn(1, channels, HEIGHT, WIDTH, dtype=torch.float64)
    seen = []
    with torch.no_grad():
        before = layer(x)
        for colour, i, j in itertools.product(range(colours), range(HEIGHT), range(WIDTH)):
            changed = x.clone()
            changed[0].unflatten(0, (colours, -1))[colour, :, i, j] += 1
            seen.append((layer(changed) != before)[0].unflatten(0, (colours, -1)).any(1))
    shape = (colours, HEIGHT, WIDTH)
    return torch.stack(seen).view(*shape, *shape).permute(3, 4, 5, 0, 1, 2)


def reachable(layer, mask_type, colours):
    """What each layer is meant to see of the other pixels, and of its own."""
    shape = (colours, HEIGHT, WIDTH, colours, HEIGHT, WIDTH)
    expected = torch.zeros(shape, dtype=torch.bool)
    for i, j, y, x in itertools.product(range(HEIGHT), range(WIDTH), range(HEIGHT), range(WIDTH)):
        if layer is RowLSTM:
            sees = y <= i and j - (i - y) - 1 <= x <= j + i - y  # the convolution adds a column to the left
        elif layer is DiagonalBiLSTM:
            sees = y < i or (y == i and x < j)
        else:
            sees = y <= i and x <= j + (mask_type == "A" and y < i)  # by the 3x3 convolution of "A"
        if (y, x) != (i, j):
            expected[:, i, j, :, y, x] = sees
        else:
            for group, source in itertools.product(range(colours), repeat=2):
                expected[group, i, j, source, y, x] = source < group or (source == group and mask_type == "B")
    return expected


@pytest.mark.parametrize("colours", [1, 3])
@pytest.mark.parametrize("mask_type", ["A", "B"])
@pytest.mark.parametrize("layer", LAYERS)
def test_sees_exactly_what_it_should(layer, mask_type, colours):
    built = layer(2 * colours, 2 * colours, mask_type=mask_type, data_channels=colours).double()
    assert torch.equal(dependences(built, colours), reachable(layer, mask_type, colours))


@pytest.mark.parametrize("colours", [1, 3])
def test_equals_the_pixel_loop_on_a_masked_convolution(colours):
    x = torch.randn(2, 6, HEIGHT, WIDTH, dtype=torch.float64)
    group = torch.arange(6) // (6 // colours)
    mask = (group.repeat(4).unsqueeze(1) >= group).double()[:, :, None, None]

    diagonal = DiagonalLSTM(6, 6, mask_type="B", data_channels=colours).double()
    convolution = diagonal.input_to_state
    gates = F.conv2d(x, convolution.weight * mask, convolution.bias)
    torch.testing.assert_close(diagonal(x), diagonal_pixels(gates, diagonal.state_to_state))

    both = DiagonalBiLSTM(6, 6, mask_type="B", data_channels=colours).double()
    right = both.from_right
    gates = F.conv2d(x, right.input_to_state.weight, right.input_to_state.bias)
    beyond = diagonal_pixels(gates, right.state_to_state, reverse=True)
    expected = both.from_left(x)
    expected[:, :, 1:] += beyond[:, :, :-1]
    torch.testing.assert_close(both(x), expected)

    rows = RowLSTM(6, 6, mask_type="B", data_channels=colours, kernel_size=5).double()
    weight = torch.stack(
        (rows.input_to_state.weight[..., 0, 0], rows.input_to_state.weight[..., 0, 1] * mask[..., 0, 0])
    )
    gates = F.conv2d(F.pad(x, (1, 0)), weight.movedim(0, -1).unsqueeze(2), rows.input_to_state.bias)
    torch.testing.assert_close(rows(x), row_pixels(gates, rows.state_to_state))


def skewed(layer, x):
    """As public code has it: rows shifted against each other by zeros, a convolution with its bias on all of that, the
    LSTM over its columns with a convolution of kernel 2, rows shifted back."""
    batch, _, height, width = x.shape
    rows = [F.pad(x[:, :, i], (i, height - 1 - i)) for i in range(height)]
    gates = layer.input_to_state(torch.stack(rows, 2))
    hidden = cell = x.new_zeros(batch, layer.state_to_state.shape[1], height)
    columns = []
    for j in range(width + height - 1):
        pre = gates[..., j] + F.conv1d(F.pad(hidden, (1, 0)), layer.state_to_state)
        o, f, i, g = pre.chunk(4, 1)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * cell.tanh()
        columns.append(hidden)
    out = torch.stack(columns, -1)
    return torch.stack([out[:, :, i, i : i + width] for i in range(height)], 2)


@pytest.mark.parametrize("size", [(4, 5), (6, 3), (1, 4), (3, 1)], ids=str)
def test_skewed_padding_is_what_public_code_does(size):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    layer = DiagonalLSTM(3, 4, mask_type="B", skewed_padding=True).double()
    torch.testing.assert_close(layer(x), skewed(layer, x))
    both = DiagonalBiLSTM(3, 4, mask_type="B", skewed_padding=True).double()
    expected = skewed(both.from_left, x)
    expected[:, :, 1:] += skewed(both.from_right, x.flip(3)).flip(3)[:, :, :-1]
    torch.testing.assert_close(both(x), expected)
    if size[0] > 1:
        layer.skewed_padding = False
        assert (layer(x) - skewed(layer, x)).abs().max() > 1e-3


def test_skewed_padding_has_gradients():
    layer = DiagonalLSTM(3, 4, mask_type="B", skewed_padding=True).double()
    x = torch.randn(2, 3, 4, 3, dtype=torch.float64)
    grad = torch.randn(2, 4, 4, 3, dtype=torch.float64)
    for one, other in zip(
        torch.autograd.grad(layer(x), list(layer.parameters()), grad),
        torch.autograd.grad(skewed(layer, x), list(layer.parameters()), grad),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("layer", "calls"), [(DiagonalLSTM, 1), (DiagonalBiLSTM, 2), (RowLSTM, 1)])
def test_a_scan_is_one_node_of_a_trace(layer, calls):
    built = layer(3, 4, mask_type="B").eval()
    with torch.no_grad():
        graph = make_fx(built, tracing_mode="real")(torch.randn(1, 3, 4, 5)).graph
    names = [str(node.target) for node in graph.nodes if str(node.target).startswith("fastgen.")]
    assert names == [f"fastgen.{'row' if layer is RowLSTM else 'diagonal'}_lstm.default"] * calls


@pytest.mark.parametrize("layer", LAYERS)
def test_learns_every_parameter_and_compiles(layer):
    built = layer(3, 4, mask_type="B")
    x = torch.randn(2, 3, 4, 5)
    out = built(x)
    assert out.shape == (2, 4, 4, 5)
    torch.testing.assert_close(torch.compile(built, fullgraph=True, backend="aot_eager")(x), out)
    out.sum().backward()
    for name, parameter in built.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.gpu
def test_both_scans_at_once_are_right_every_time():
    """The two streams wait for each other: forward and backward, many layers, and captured in a CUDA graph."""
    layers = torch.nn.Sequential(*(DiagonalBiLSTM(16, 16, mask_type="B") for _ in range(4))).cuda()
    x = torch.randn(5, 16, 13, 11, device="cuda", requires_grad=True)
    grad = torch.randn(5, 16, 13, 11, device="cuda")
    exact = copy.deepcopy(layers).double()
    wide = x.detach().double().requires_grad_()
    variables, precise = [x, *layers.parameters()], [wide, *exact.parameters()]
    out = exact(wide)
    truth = [out, *torch.autograd.grad(out, precise, grad.double())]
    for _ in range(50):
        out = layers(x)
        for one, other in zip([out, *torch.autograd.grad(out, variables, grad)], truth, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        layers(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = layers(x)
        captured.fill_(torch.nan)
        graph.replay()
    torch.testing.assert_close(captured.double(), truth[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: DiagonalLSTM(3, 4, mask_type="B", data_channels=3), "hidden_channels"),
        (lambda: DiagonalLSTM(3, 0, mask_type="B"), "hidden_channels"),
        (lambda: DiagonalBiLSTM(4, 3, mask_type="B", data_channels=3), "in_channels"),
        (lambda: DiagonalBiLSTM(4, 3, mask_type="C"), "mask_type"),
        (lambda: RowLSTM(4, 3, mask_type="B", kernel_size=2), "kernel_size"),
    ],
)
def test_bad_arguments_are_named(make, named):
    with pytest.raises(ValueError, match=named):
        make()
