"""The kernels through the public function: in the interpreter without a GPU, with tiles so small that there are
several, none of which a size divides. What has no name of its own in a test id is spread over the combinations."""

import mmap

import pytest
import torch

from fastgen.kernels.maps import empties
from fastgen.kernels.masked_conv2d import launch, products
from fastgen.kernels.masked_conv2d.config import Choice, Tile
from fastgen.ops import masked_conv2d
from fastgen.ops.masked_conv2d import fused, gate
from tests.ops.masked_conv2d_truth import ACTIVATIONS, GEOMETRIES, check, far_apart, gradients, problem, strided, truth

pytestmark = pytest.mark.usefixtures("full_memory", "kernels_wherever_they_can")


def pairs_of(*kinds):
    """Each kind of mask with each geometry; the activations take turns, so that each meets every kind and geometry."""
    names = ("kind", "geometry", "activation")
    turns = [
        (kind, geometry, ACTIVATIONS[(i + j) % len(ACTIVATIONS)])
        for i, kind in enumerate(kinds)
        for j, geometry in enumerate(GEOMETRIES)
    ]
    return pytest.mark.parametrize(names, turns, ids=str)


@pytest.fixture(params=["pointers", "descriptors"])
def path(request, monkeypatch):
    if request.param == "pointers":
        monkeypatch.setattr(products, "has_tma", lambda chip: False)
    return request.param


def test_memory_is_filled():
    assert empties(torch.ones(1), ((5,), (1,)))().isnan().all()


@pairs_of("A-rgb", "B", "random", "none")
def test_equals_the_definition(kind, geometry, activation, device):
    """With channels of an image."""
    x, weight, mask, bias = problem(kind, 2, 3, 18, 6, 4, dtype=torch.float32, device=device)
    expected = gradients(lambda x, w, b: truth(x, w, mask, b, activation, **geometry), (x, weight, bias))
    options = {"activation": activation, "impl": "triton", **geometry}
    found = gradients(lambda x, w, b: masked_conv2d(x, w, mask, b, **options), (x, weight, bias))
    check(found, expected)
    assert (found[2][~mask] == 0).all()


@pairs_of("A", "B-rgb", "random", "none")
def test_all_that_can_be_added_equals_the_definition(kind, geometry, activation, device, monkeypatch):
    """With blocks of channels, which come in units of 16 bytes or not: an image's own bias and a residual beside the
    bias. Every other one by pointers."""
    if (GEOMETRIES.index(geometry) + (kind in ("A", "random"))) % 2:
        monkeypatch.setattr(products, "has_tma", lambda chip: False)
    channels = 18 if GEOMETRIES.index(geometry) in (1, 4) else 24
    x, weight, mask, bias = problem(kind, 2, channels, channels, 6, 4, dtype=torch.float32, device=device)
    condition = torch.randn(2, channels, device=device, requires_grad=True)
    residual = torch.randn_like(truth(x, weight, mask, bias, activation, **geometry), dtype=torch.float32)
    inputs = (x, weight, bias, condition, residual.requires_grad_())

    def expected(x, weight, bias, condition, residual):
        return truth(x, weight, mask, bias, activation, condition, residual, **geometry)

    def found(x, weight, bias, condition, residual):
        options = {"activation": activation, "condition": condition, "residual": residual, **geometry}
        return masked_conv2d(x, weight, mask, bias, impl="triton", **options)

    results = gradients(found, inputs)
    check(results, gradients(expected, inputs))
    assert (results[2][~mask] == 0).all()


@pytest.mark.parametrize("channels", [48, 36])
@pytest.mark.parametrize("kind", ["A-rgb", "B-rgb"])
def test_groups_of_colours(kind, channels, device):
    """Groups of 16 channels: dead blocks of the centre tap are not visited; groups of 12: a tile of rows has two."""
    x, weight, mask, bias = problem(kind, 1, channels, channels, 4, 3, dtype=torch.float32, device=device)
    expected = gradients(lambda x, w, b: truth(x, w, mask, b, padding=1), (x, weight, bias))
    check(
        gradients(lambda x, w, b: masked_conv2d(x, w, mask, b, padding=1, impl="triton"), (x, weight, bias)), expected
    )


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (5, 5), (2, 4)], ids=str)
@pytest.mark.parametrize("inputs", [2, 17])
def test_any_kernel_size(size, inputs, device):
    x, weight, mask, bias = problem("random", 1, inputs, 3, 6, 5, size, torch.float32, device)
    expected = gradients(lambda x, w, b: truth(x, w, mask, b, "relu"), (x, weight, bias))
    found = gradients(lambda x, w, b: masked_conv2d(x, w, mask, b, activation="relu", impl="triton"), (x, weight, bias))
    check(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_half_precision(dtype, activation, path, device):
    x, weight, mask, bias = problem("B", 1, 16, 18, 5, 5, dtype=dtype, device=device)
    options = {"padding": 1, "activation": activation}
    expected = gradients(lambda x, w, b: truth(x, w, mask, b, **options), (x, weight, bias))
    found = gradients(lambda x, w, b: masked_conv2d(x, w, mask, b, impl="triton", **options), (x, weight, bias))
    check(found, expected, dtype)


@pytest.mark.parametrize("layout", ["sliced", "channels_last"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_image_s_own_bias_and_a_residual_of_any_strides(activation, layout, path, device):
    x, weight, mask, bias = problem("B", 3, 16, 20, 4, 5, dtype=torch.float32, device=device)
    condition = strided(torch.randn(3, 20, 1, 1, device=device), "sliced")[..., 0, 0]
    residual = strided(torch.randn(3, 10 if activation == "gated" else 20, 4, 5, device=device), layout)
    inputs = [x, weight, bias, condition.requires_grad_(), residual.requires_grad_()]

    def expected(x, weight, bias, condition, residual):
        return truth(x, weight, mask, bias, activation, condition, residual, padding=1)

    def found(x, weight, bias, condition, residual):
        return masked_conv2d(
            x,
            weight,
            mask,
            bias,
            padding=1,
            activation=activation,
            condition=condition,
            residual=residual,
            impl="triton",
        )

    check(gradients(found, inputs), gradients(expected, inputs))


@pytest.mark.parametrize("keep_pre", [False, True])
def test_a_second_map_and_the_sums_themselves(keep_pre, path, device):
    x, weight, mask, bias = problem("B", 2, 16, 36, 4, 5, dtype=torch.float32, device=device)
    other, other_weight = torch.randn(2, 20, 4, 5, device=device), torch.randn(36, 20, 1, 1, device=device) / 5
    inputs = [x, weight, bias, other.requires_grad_(), other_weight.requires_grad_()]

    def both(out, pre):
        return torch.cat((out, pre), 1) if keep_pre else out

    def expected(x, weight, bias, other, other_weight):
        pre = truth(x, weight, mask, bias, padding=1) + torch.conv2d(other.double(), other_weight.double())
        return both(gate(pre), pre)

    def found(x, weight, bias, other, other_weight):
        geometry = ((1, 1), (1, 1), (1, 1))
        options = {"other": other, "other_weight": other_weight, "keep_pre": keep_pre}
        return both(*fused(x, weight, mask, bias, geometry, "gated", **options))

    check(gradients(found, inputs), gradients(expected, inputs))


@pytest.mark.parametrize("inputs", [3, 17])
@pytest.mark.parametrize("layout", ["channels_last", "sliced", "expanded"])
def test_any_strides(layout, inputs, path, device):
    x, weight, mask, bias = problem("B", 2, inputs, 6, 5, 4, dtype=torch.float32, device=device)
    layout_of_weight = "channels_last" if layout == "channels_last" else "sliced"
    moved, moved_weight = strided(x.detach(), layout).requires_grad_(), strided(weight.detach(), layout_of_weight)
    inputs = (moved, moved_weight.requires_grad_(), bias)
    expected = gradients(lambda x, w, b: truth(x, w, mask, b, "gated", padding=1), inputs)
    call = lambda x, w, b: masked_conv2d(x, w, mask, b, padding=1, activation="gated", impl="triton")  # noqa: E731
    check(gradients(call, inputs), expected)
    # The incoming gradient has strides of its own: of a sum they are 0.
    (found,) = torch.autograd.grad(call(*inputs).sum(), moved)
    (wanted,) = torch.autograd.grad(truth(moved, moved_weight, mask, bias, "gated", padding=1).sum(), moved)
    check([found], [wanted])


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes memory for all that lies between, which is not there")
def test_offsets_beyond_32_bits(monkeypatch):
    """The last tap sees a pixel 2^31 elements after the first one's; what lies between is seen by none."""
    monkeypatch.setattr(products, "has_tma", lambda chip: False)  # descriptors count in 64 bits themselves
    far = 2**27
    memory = torch.frombuffer(mmap.mmap(-1, 32 * (far + 1)), dtype=torch.float16)
    x = memory.view(1, far + 1, 1, 16).permute(0, 3, 1, 2)
    near, weight, mask, bias = problem("all", 1, 16, 16, 2, 1, (2, 1), torch.float16)
    x[:, :, 0], x[:, :, far] = near[:, :, 0].detach(), near[:, :, 1].detach()
    call = lambda w, b: masked_conv2d(x, w, mask, b, dilation=(far, 1), impl="triton")  # noqa: E731
    expected = gradients(lambda w, b: truth(near.detach(), w, mask, b), (weight, bias))
    check(gradients(call, (weight, bias)), expected, torch.float16)


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
@pytest.mark.skipif(torch.cuda.is_available(), reason="takes memory for all that lies between, which is not there")
def test_offsets_beyond_32_bits_in_the_weight(dim):
    sizes = [3 if axis == dim else 1 for axis in range(4)]
    x, weight, _, bias = problem("all", 2, sizes[1], sizes[0], 4, 4, tuple(sizes[2:]), torch.float16)
    moved = far_apart(weight.detach(), dim).requires_grad_()
    mask = far_apart(torch.ones(weight.shape, dtype=torch.bool), dim)
    found = gradients(lambda x, w, b: masked_conv2d(x, w, mask, b, impl="triton"), (x, moved, bias))
    check(found, gradients(lambda x, w, b: truth(x, w, mask, b), (x, weight, bias)), torch.float16)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (1, 3, 1, 1), (2, 17, 1, 4), (1, 1, 2, 2)], ids=str)
def test_empty_and_size_one(shape, activation, device):
    batch, inputs, height, width = shape
    x, weight, mask, bias = problem("B", batch, inputs, 2, height, width, dtype=torch.float32, device=device)
    options = {"padding": 1, "activation": activation}
    expected = gradients(lambda x, w, b: truth(x, w, mask, b, **options), (x, weight, bias))
    check(
        gradients(lambda x, w, b: masked_conv2d(x, w, mask, b, impl="triton", **options), (x, weight, bias)), expected
    )


def test_an_image_without_a_batch_a_mask_or_a_bias(device):
    x, weight, _, bias = problem("all", dtype=torch.float32, device=device)
    for activation in ("gated", "relu"):
        found = masked_conv2d(x[0], weight, None, activation=activation, residual=None, impl="triton")
        check([found], [truth(x[:1], weight, torch.tensor(1, device=device), None, activation)[0]])
    condition, residual = torch.randn(6, device=device), torch.randn(6, 4, 3, device=device)
    found = masked_conv2d(x[0], weight, None, bias, condition=condition, residual=residual, impl="triton")
    wanted = truth(x[:1], weight, torch.tensor(1, device=device), bias)[0] + condition[:, None, None] + residual
    check([found], [wanted])


def test_masked_weights_and_unseen_pixels_take_no_part_whatever_their_value(device):
    x, weight, mask, bias = problem("A", 1, 17, 4, 4, 4, dtype=torch.float32, device=device)
    call = lambda x, w, b: masked_conv2d(x, w, mask, b, padding=1, impl="triton")  # noqa: E731
    expected = gradients(call, (x, weight, bias))
    with torch.no_grad():
        weight[~mask] = torch.nan
    for one, other in zip(gradients(call, (x, weight, bias)), expected, strict=True):
        assert torch.equal(one, other)
    x.data[:, :, -1, -1] = torch.nan  # the last pixel is seen by none
    assert torch.equal(call(x, weight, bias), expected[0])


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_extremes_of_the_gate(device):
    """Saturated and far out: no NaN where there is none in the definition."""
    x = torch.tensor([0.0, 1e-4, -1e-4, 0.29, 0.31, -5, 9, 30, -100, 1e4, -1e4], device=device).view(1, 1, 1, -1)
    x = x.expand(1, 2, 1, 11).contiguous().requires_grad_()
    weight = torch.tensor([[1.0, 0], [0, -1.0], [0.5, 0], [0, 1.0]], device=device).view(4, 2, 1, 1).requires_grad_()
    call = lambda x, w: masked_conv2d(x, w, None, activation="gated", impl="triton")  # noqa: E731
    expected = gradients(lambda x, w: truth(x, w, torch.tensor(1, device=device), None, "gated"), (x, weight))
    found = gradients(call, (x, weight))
    check(found, expected)
    small = found[0].double()[..., 1:3]
    torch.testing.assert_close(small, expected[0][..., 1:3], rtol=1e-6, atol=0)
    x.data[..., 3] = torch.nan
    out = call(x, weight)
    assert out[..., 3].isnan().all() and out[..., :3].isfinite().all()


def test_only_wanted_gradients(device):
    x, weight, mask, bias = problem("B", 1, 16, 4, 3, 3, dtype=torch.float32, device=device)
    expected = gradients(lambda x, w, b: truth(x, w, mask, b, "gated"), (x, weight, bias))
    for index, name in enumerate(("x", "weight", "bias")):
        tensors = [one.detach().requires_grad_(i == index) for i, one in enumerate((x, weight, bias))]
        found = gradients(lambda x, w, b: masked_conv2d(x, w, mask, b, activation="gated", impl="triton"), tensors)
        check(found[1:], expected[index + 1 : index + 2])
        assert [one.requires_grad for one in tensors].index(True) == index, name


def test_a_mask_that_is_written_into_is_read_again(device):
    x, weight, mask, bias = problem("A", 1, 16, 4, 4, 4, dtype=torch.float32, device=device)
    check([masked_conv2d(x, weight, mask, bias, impl="triton")], [truth(x, weight, mask, bias)])
    mask.fill_(True)
    check([masked_conv2d(x, weight, mask, bias, impl="triton")], [truth(x, weight, mask, bias)])
    mask.zero_()
    check([masked_conv2d(x, weight, mask, bias, impl="triton")], [truth(x, weight, mask, bias)])


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_cudnn_where_it_was_measured_faster(geometry, monkeypatch, device):
    x, weight, mask, bias = problem("A", 2, 5, 6, 7, 5, dtype=torch.float32, device=device)
    other, other_weight = None, None
    size = truth(x, weight, mask, bias, **geometry).shape
    if geometry.get("stride", 1) == 1:
        other, other_weight = torch.randn(*size, device=device), torch.randn(6, 6, 1, 1, device=device)
    inputs = (x, weight, bias, torch.randn(2, 6, device=device, requires_grad=True))

    def call(x, weight, bias, condition):
        geometry = tuple(pair if isinstance(pair, tuple) else (pair, pair) for pair in pairs)
        return fused(
            x, weight, mask, bias, geometry, "gated", condition=condition, other=other, other_weight=other_weight
        )[0]

    pairs = (geometry.get("stride", 1), geometry.get("padding", 0), geometry.get("dilation", 1))
    expected = gradients(call, inputs)
    chosen = Choice("cudnn", Tile(32, 16, 16, 4, 1), "a test")
    monkeypatch.setattr(products, "choose", lambda *asked: chosen)
    launch.forget()
    check(gradients(call, inputs), [one.double() for one in expected])
