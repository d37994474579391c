"""The scans' kernels, every variant, against the pixel loop in float64: in the interpreter, or on a GPU."""

import dataclasses
import functools
import itertools

import pytest
import torch

pytest.importorskip("triton")
from fastgen.kernels.lstm import diagonal as diagonal_kernels
from fastgen.kernels.lstm import row as row_kernels
from fastgen.kernels.lstm.choice import ScanLaunch, TileLaunch, choose, tile_launch_of
from fastgen.ops import diagonal_lstm, row_lstm
from tests.ops.lstm_truth import diagonal_pixels, gradients, problem, row_pixels


def check(found, truth, dtype):
    """To 8 units in the last place of the largest element: what rounding states and gradients a step costs."""
    for one, other in zip(found, truth, strict=True):
        assert one.dtype == dtype
        error = (one.double() - other).abs().max() / other.abs().max()
        assert error < 8 * torch.finfo(dtype).eps, error


def fitted(launch, weight, *, backward=False):
    """All taps together where that is 0; the parts of a launch by fragments, two or more of them a chunk."""
    units, taps = weight.shape[1:]
    if isinstance(launch, TileLaunch) and launch.CHUNK:
        parts = -(-units * (4 if backward else 1) // launch.K)
        chunk = max(size for size in range(1, launch.CHUNK + 1) if parts * taps % size == 0)
        whole = parts * launch.K == units * (4 if backward else 1)
        return dataclasses.replace(launch, PARTS=parts, CHUNK=chunk, WHOLE=whole)
    return dataclasses.replace(launch, TOGETHER=taps) if getattr(launch, "TOGETHER", 1) == 0 else launch


def diagonal(gates, weight, grad, reverse, launch):
    launch, back = fitted(launch, weight), fitted(launch, weight, backward=True)
    plain, *nothing = diagonal_kernels.forward(gates, weight, reverse, save=False, choice=launch)
    assert nothing == [None, None]
    hidden, activated, cell = diagonal_kernels.forward(gates, weight, reverse, save=True, choice=launch)
    return plain, hidden, diagonal_kernels.backward(grad, activated, cell, weight, reverse, choice=back)


def rows(gates, weight, grad, launch):
    launch, back = fitted(launch, weight), fitted(launch, weight, backward=True)
    plain, *nothing = row_kernels.forward(gates, weight, save=False, choice=launch)
    assert nothing == [None, None]
    hidden, activated, cell = row_kernels.forward(gates, weight, save=True, choice=launch)
    return plain, hidden, row_kernels.backward(grad, activated, cell, weight, choice=back)


# Launches, and sizes (B, h, H, W) that divide none of their tiles.
VARIANTS = {
    "images side by side": (ScanLaunch(4, 4, 16, 1, 4), (3, 5, 3, 4)),
    "a stream of images": (ScanLaunch(2, 8, 16, 1, 4), (5, 3, 5, 4)),
    "two programs, nothing ahead": (ScanLaunch(1, 16, 16, 2, 4), (3, 16, 4, 3)),
    "more units": (ScanLaunch(1, 16, 32, 1, 4), (1, 19, 2, 3)),
    "tiles": (TileLaunch(16, 16, 16, 1), (6, 2, 3, 4)),
    "tiles of a long row": (TileLaunch(16, 16, 16, 1), (3, 2, 2, 7)),
    "tiles of a column": (TileLaunch(16, 16, 16, 2), (2, 2, 5, 1)),
    "all taps together": (TileLaunch(16, 16, 16, 1, TOGETHER=0), (2, 17, 3, 3)),
    "tiles of more units": (TileLaunch(16, 16, 16, 2), (3, 19, 3, 2)),
    "fragments": (TileLaunch(16, 16, 16, 1, 4, num_stages=1, CHUNK=2), (6, 2, 3, 4)),
    "fragments of more units": (TileLaunch(16, 32, 16, 2, 4, num_stages=1, CHUNK=8), (2, 35, 3, 3)),
    "whole fragments": (TileLaunch(16, 32, 16, 1, 4, num_stages=1, CHUNK=12), (1, 64, 2, 2)),
    "tiles of parts together": (TileLaunch(16, 16, 16, 1, TOGETHER=4), (2, 35, 3, 3)),
}


HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_diagonal_variants_equal_the_pixel_loop(variant, half, device):
    """Each in float32 and, from the other side, in one of the halves, which take turns."""
    number = list(VARIANTS).index(variant)
    dtype, reverse = HALVES[number % 2] if half else torch.float32, bool((number // 2 + half) % 2)
    launch, size = VARIANTS[variant]
    gates, weight, grad = problem(*size, 2, dtype, device)
    inputs = (gates.double(), weight.double(), grad.double())
    hidden, grad_gates, _ = gradients(lambda g, w: diagonal_pixels(g, w, reverse), *inputs)
    check(diagonal(gates, weight, grad, reverse, launch), (hidden, hidden, grad_gates), dtype)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_row_variants_equal_the_pixel_loop(variant, half, device):
    dtype = HALVES[list(VARIANTS).index(variant) % 2] if half else torch.float32
    launch, (batch, units, width, height) = VARIANTS[variant]
    taps = 5 if "stream" in variant or "long" in variant else 3
    gates, weight, grad = problem(batch, units, height, width, taps, dtype, device)
    hidden, grad_gates, _ = gradients(row_pixels, gates.double(), weight.double(), grad.double())
    check(rows(gates, weight, grad, launch), (hidden, hidden, grad_gates), dtype)


@pytest.mark.parametrize(
    ("dtype", "reverse"),
    [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True), (torch.float16, False)],
    ids=str,
)
def test_the_operation_and_all_its_gradients(dtype, reverse, device):
    gates, weight, grad = problem(3, 5, 4, 3, 2, dtype, device)
    inputs = (gates.double(), weight.double(), grad.double())
    truth = gradients(lambda g, w: diagonal_pixels(g, w, reverse), *inputs)
    for recompute in (False, True):
        operation = functools.partial(diagonal_lstm, reverse=reverse, recompute=recompute, impl="triton")
        check(gradients(operation, gates, weight, grad), truth, dtype)
    with torch.no_grad():
        check([diagonal_lstm(gates, weight, reverse=reverse, impl="triton")], truth[:1], dtype)


@pytest.mark.parametrize("taps", [1, 3, 7])
def test_the_row_operation_and_all_its_gradients(taps, device):
    gates, weight, grad = problem(3, 5, 4, 3, taps, torch.float32, device)
    truth = gradients(row_pixels, gates.double(), weight.double(), grad.double())
    for recompute in (False, True):
        operation = functools.partial(row_lstm, recompute=recompute, impl="triton")
        check(gradients(operation, gates, weight, grad), truth, torch.float32)


def test_operators_pass_opcheck(device):
    gates, weight, grad = problem(2, 3, 2, 3, 2, torch.float32, device)
    tests = ("test_schema", "test_faketensor")
    for name, reverse in (("diagonal", [False]), ("row", [])):
        weight = weight[..., :1] if name == "row" else weight
        forward, saving, backward = (
            getattr(torch.ops.fastgen, f"{name}_lstm{part}").default for part in ("", "_saving", "_backward")
        )
        torch.library.opcheck(forward, (gates, weight, *reverse, True), test_utils=tests)
        torch.library.opcheck(saving, (gates, weight, *reverse, True), test_utils=tests)
        _, activated, cell = saving(gates, weight, *reverse, True)
        torch.library.opcheck(backward, (grad, activated, cell, weight, *reverse, True), test_utils=tests)


@pytest.mark.parametrize("size", [(1, 1, 1, 1), (2, 1, 1, 5), (2, 1, 4, 1), (0, 2, 3, 3)], ids=str)
def test_dimensions_of_one_and_no_images(size, device):
    gates, weight, grad = problem(*size, 2, torch.float32, device)
    truth = gradients(diagonal_pixels, gates.double(), weight.double(), grad.double())
    found = gradients(lambda g, w: diagonal_lstm(g, w, impl="triton"), gates, weight, grad)
    for one, other in zip(found, truth, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)
    truth = gradients(row_pixels, gates.double(), weight[..., :1].double(), grad.double())
    found = gradients(lambda g, w: row_lstm(g, w, impl="triton"), gates, weight[..., :1], grad)
    for one, other in zip(found, truth, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)


def spread(tensor):
    """The same values, every stride doubled and more, NaN between them."""
    wide = torch.full([2 * size + 1 for size in tensor.shape], torch.nan, dtype=tensor.dtype, device=tensor.device)
    view = wide[tuple(slice(1, None, 2) for _ in tensor.shape)]
    return view.copy_(tensor)


@pytest.mark.parametrize("launch", [ScanLaunch(4, 4, 16, 1, 4), TileLaunch(16, 16, 16, 2)], ids=["scan", "tiles"])
@pytest.mark.parametrize(
    "run", [lambda *inputs: diagonal(*inputs[:3], False, inputs[3]), rows], ids=["diagonal", "row"]
)
def test_any_strides(launch, run, device):
    inputs = problem(2, 3, 4, 3, 3 if run is rows else 2, torch.float32, device)
    expected = run(*inputs, launch)
    for change in (spread, lambda t: t.transpose(0, -1).contiguous().transpose(0, -1)):
        for one, other in zip(run(*map(change, inputs), launch), expected, strict=True):
            assert torch.equal(one, other)
            assert run is rows or one.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_saturated_gates_and_nan(device):
    """Gates of any size give finite states, and a NaN reaches what depends on it and no other pixel."""
    gates, weight, grad = problem(1, 3, 3, 4, 2, torch.float32, device)
    gates = gates * 1e4
    truth = gradients(diagonal_pixels, gates.double(), weight.double(), grad.double())[:2]
    launch = ScanLaunch(4, 4, 16, 1, 4)
    _, hidden, grad_gates = diagonal(gates, weight, grad, False, launch)
    torch.testing.assert_close(hidden.double(), truth[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad_gates.double(), truth[1], rtol=1e-4, atol=1e-6)
    gates[0, 0, 1, 2] = torch.nan
    hidden = diagonal_kernels.forward(gates, weight, False, save=False, choice=launch)[0]
    assert torch.equal(hidden.isnan().any(1)[0].cpu(), diagonal_pixels(gates, weight).isnan().any(1)[0].cpu())


def test_small_states_keep_their_precision(device):
    """Near 0 the hyperbolic tangent must not cancel."""
    gates, weight, _ = problem(1, 4, 3, 3, 2, torch.float32, device)
    gates[:, 12:] *= 1e-6
    truth = diagonal_pixels(gates.double(), weight.double() * 0)
    found = diagonal_kernels.forward(gates, weight * 0, False, save=False, choice=ScanLaunch(4, 4, 16, 1, 4))[0]
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("batch", "lanes", "units", "dtype", "kind"),
    [
        (16, 28, 16, torch.bfloat16, ScanLaunch),
        (16, 32, 64, torch.bfloat16, ScanLaunch),
        (16, 64, 64, torch.float16, ScanLaunch),
        (16, 64, 63, torch.float16, TileLaunch),
        (16, 200, 16, torch.bfloat16, TileLaunch),
        (16, 32, 128, torch.bfloat16, TileLaunch),
        (16, 28, 16, torch.float32, ScanLaunch),
        (16, 64, 16, torch.float32, TileLaunch),
        (16, 32, 64, torch.float32, TileLaunch),
        (5, 1, 1, torch.float32, ScanLaunch),
        (1, 3, 65, torch.float32, TileLaunch),
    ],
)
def test_the_choice_covers_the_problem(batch, lanes, units, dtype, kind):
    """All of it in one launch."""
    launch = choose(torch.empty(batch, 1, dtype=dtype), lanes, units)
    assert isinstance(launch, kind)
    if kind is ScanLaunch:
        assert lanes <= launch.LANES and max(units, 16) <= launch.U and launch.IMAGES * launch.LANES >= 16
        assert launch.programs * launch.IMAGES <= max(batch + launch.IMAGES - 1, launch.IMAGES)
    else:
        assert 0 < launch.programs <= batch


@pytest.mark.parametrize("generation", [0, 8, 9, 10, 12])
@pytest.mark.parametrize("taps", [1, 2, 3, 5, 7])
def test_tiles_take_all_taps_and_fit_shared_memory(generation, taps):
    """Of half precision: as many parts as lie in shared memory at once, each of weights and states."""
    limit = {0: 64, 8: 99, 9: 227, 10: 227, 12: 99}[generation]
    for units, backward in itertools.product((16, 32, 64, 128, 300), (False, True)):
        launch = tile_launch_of(generation, 132, False, 16, 32, units, taps, backward)
        assert taps % launch.TOGETHER == 0 and not (backward and launch.TOGETHER > 1)
        rows = launch.U * (1 if backward else 4) + launch.M
        parts = 1 if generation == 0 else 2
        assert parts * launch.TOGETHER * rows * launch.K * 2 <= limit * 1024


@pytest.mark.gpu
@pytest.mark.parametrize("units", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_repetition_gives_the_same_bits(units, dtype):
    """A race between the states' writers and readers shows as a result that changes, or is wrong."""
    gates, weight, grad = problem(37, units, 29, 31, 2, dtype, "cuda")
    gates *= 0.5
    truth = gradients(diagonal_lstm, gates.double(), weight.double(), grad.double())
    first = gradients(lambda g, w: diagonal_lstm(g, w, impl="triton"), gates, weight, grad)
    for one, other in zip(first, truth, strict=True):
        error = (one.double() - other).abs().max() / other.abs().max()
        assert error < 32 * torch.finfo(dtype).eps, error
    for _ in range(50):
        again = gradients(lambda g, w: diagonal_lstm(g, w, impl="triton"), gates, weight, grad)
        assert all(torch.equal(one, other) for one, other in zip(again, first, strict=True))
    first = gradients(lambda g, w: row_lstm(g, w, impl="triton"), gates, weight[..., :1], grad)
    for _ in range(50):
        again = gradients(lambda g, w: row_lstm(g, w, impl="triton"), gates, weight[..., :1], grad)
        assert all(torch.equal(one, other) for one, other in zip(again, first, strict=True))


@pytest.fixture
def tf32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def check_on_a_gpu(units, lanes, dtype, allowed):
    """What `choose` gives for so many units and lanes: both scans and their gradients, against float64."""
    gates, weight, grad = problem(3, units, lanes, 7, 2, dtype, "cuda")
    for operation in (diagonal_lstm, functools.partial(diagonal_lstm, reverse=True), row_lstm):
        if operation is row_lstm:  # its lanes are columns
            gates, grad, weight = gates.mT, grad.mT, problem(1, units, 1, 1, 3, dtype, "cuda")[1]
        truth = gradients(operation, gates.double(), weight.double(), grad.double())
        for one, other in zip(gradients(operation, gates, weight, grad), truth, strict=True):
            error = (one.double() - other).abs().max() / other.abs().max()
            assert error < allowed, (operation, error)


SIZES = [(16, 28), (16, 64), (16, 200), (32, 32), (32, 128), (64, 32), (64, 64), (63, 64), (64, 100), (65, 20)]


@pytest.mark.gpu
@pytest.mark.parametrize(("units", "lanes"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_choice_is_right(units, lanes, dtype):
    check_on_a_gpu(units, lanes, dtype, 32 * torch.finfo(dtype).eps)


@pytest.mark.gpu
@pytest.mark.parametrize(("units", "lanes"), SIZES)
def test_every_choice_is_right_where_tf32_is_allowed(units, lanes, tf32):
    check_on_a_gpu(units, lanes, torch.float32, 32 * 2**-11)


@pytest.mark.gpu
def test_streams_of_many_images():
    gates, weight, grad = problem(1500, 8, 9, 7, 2, torch.float32, "cuda")
    truth = gradients(diagonal_lstm, gates.double(), weight.double(), grad.double())
    found = gradients(lambda g, w: diagonal_lstm(g, w, impl="triton"), gates, weight, grad)
    for one, other in zip(found, truth, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("operation", [diagonal_lstm, row_lstm])
def test_offsets_beyond_two_to_the_31(operation):
    """The last of so many images that its elements lie beyond 2^31 equals the same image alone."""
    side, units = 64, 16
    batch = 2**31 // (4 * units * side * side) + 2
    gates = torch.zeros(batch, side, side, 4 * units, dtype=torch.bfloat16, device="cuda").permute(0, 3, 1, 2)
    taps = 2 if operation is diagonal_lstm else 3
    weight = torch.randn(4 * units, units, taps, dtype=torch.bfloat16, device="cuda") / 8
    gates[-1] = torch.randn(4 * units, side, side, device="cuda")
    with torch.no_grad():
        assert torch.equal(operation(gates, weight)[-1:], operation(gates[-1:].clone(), weight))


@pytest.mark.gpu
@pytest.mark.parametrize("units", [16, 128])
def test_captures_in_a_cuda_graph(units):
    gates, weight, _ = problem(4, units, 12, 10, 2, torch.bfloat16, "cuda")
    with torch.no_grad():
        expected = [diagonal_lstm(gates, weight), row_lstm(gates, weight[..., :1])]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = [diagonal_lstm(gates, weight), row_lstm(gates, weight[..., :1])]
        for one in captured:
            one.fill_(torch.nan)
        graph.replay()
    for one, other in zip(captured, expected, strict=True):
        assert torch.equal(one, other)
