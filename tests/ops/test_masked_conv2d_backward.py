"""The two ways back through the activation, by a pass and on loading: each is right, and the cheaper one is taken."""

from functools import partial

import pytest
import torch

from fastgen.kernels import masked_conv2d as kernels
from fastgen.kernels.masked_conv2d_activation import through_activation
from fastgen.kernels.masked_conv2d_config import Layer, Tile, meets, on_load
from fastgen.kernels.masked_conv2d_grad import shares_of
from fastgen.ops import masked_conv2d
from fastgen.ops.masked_conv2d import fused
from tests.ops.masked_conv2d_truth import gradients, problem, truth

pytestmark = pytest.mark.usefixtures("full_memory")

EPSILON = {torch.float32: 2e-6, torch.bfloat16: 2**-7}
# What leads back through the activation: (activation, whether a residual is added).
SAVED = {"relu": ("relu", False), "sign": ("relu", True), "valve": ("gated", False)}


@pytest.fixture
def passes(monkeypatch):
    """What each pass is asked for: (whether it writes, which sums)."""
    calls = []

    def counted(incoming, grad_pre, write, sums):
        calls.append((write, sums))
        return through_activation(incoming, grad_pre, write, sums)

    monkeypatch.setattr(kernels, "through_activation", counted)
    return calls


def run(
    saved, kind="B", inputs=16, results=16, size=(1, 1), dtype=torch.float32, wanted=(True,) * 3, batch=2, **options
):
    """(found, expected): the result and the gradients of x, weight and bias, as far as wanted, by the kernels."""
    activation, adds = SAVED.get(saved, ("none", False))
    outputs = 2 * results if activation == "gated" else results
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, weight, mask, bias = problem(kind, batch, inputs, outputs, 4, 5, size, dtype, device)
    asked = [one.detach().requires_grad_(need) for one, need in zip((x, weight, bias), wanted, strict=True)]
    geometry = {name: options.pop(name) for name in ("stride", "padding", "dilation") if name in options}
    shape = truth(x, weight, mask, bias, activation, **geometry).shape
    residual = torch.randn(shape, device=device).to(dtype) if adds else None

    def expected(x, weight, bias):
        return truth(x, weight, mask, bias, activation, residual=residual, **geometry)

    def found(x, weight, bias):
        given = {"activation": activation, "residual": residual, "impl": "triton", **geometry, **options}
        return masked_conv2d(x, weight, mask, bias, **given)

    return gradients(found, asked, channels_last=True), gradients(expected, asked)


def check(found, expected, dtype=torch.float32):
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and one.dtype == dtype
        assert (one.detach().double() - other).abs().max() <= 4 * EPSILON[dtype] * max(1.0, other.abs().max().item())


GEOMETRIES = [
    ((1, 1), {}),
    ((1, 3), {"padding": (0, 1)}),
    ((3, 3), {"padding": (2, 1), "stride": 2}),
    ((2, 3), {"padding": 2, "dilation": (1, 2)}),
]


@pytest.mark.parametrize("way", ["on load", "pass"])
@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize(("size", "geometry"), GEOMETRIES, ids=str)
@pytest.mark.parametrize("inputs", [3, 17])
def test_both_ways_equal_the_definition(way, saved, size, geometry, inputs, passes, monkeypatch):
    """With sizes that fill no tile; which way is cheaper does not matter here."""
    taken = way == "on load"
    monkeypatch.setattr(kernels, "_on_load", lambda *arguments, **more: (taken, taken))
    check(*run(saved, "random" if size == (2, 3) else "B", inputs, 17, size, **geometry))
    assert passes == ([] if taken else [(True, "all")])


@pytest.mark.parametrize("saved", ["valve", "none"])
def test_shares_of_many_pixels_are_added(saved, passes):
    """1040 pixels: two shares, the last of them shorter."""
    assert shares_of(1040, Tile(32, 16, 16, 4, 1), 1) == (2, 17)
    check(*run(saved, batch=52, inputs=3))
    assert passes == []


@pytest.mark.parametrize("saved", [*SAVED, "none"])
def test_half_precision_on_load(saved, passes):
    check(*run(saved, dtype=torch.bfloat16), torch.bfloat16)
    assert passes == []


@pytest.mark.parametrize("saved", SAVED)
def test_a_nan_of_the_result_stays_one(saved, device):
    """On loading; with a residual the sum was a NaN, which passes the gradient on, as in PyTorch."""
    activation, adds = SAVED[saved]
    x = torch.randn(1, 16, 1, 2, device=device)
    x[..., 0] = torch.nan
    weight = torch.randn(32, 16, 1, 1, device=device).requires_grad_()
    residual = torch.zeros(1, 32, 1, 2, device=device) if adds else None
    options = {"activation": activation, "residual": residual, "impl": "triton"}
    (of_weight,) = torch.autograd.grad(masked_conv2d(x, weight, None, **options).sum(), weight)
    assert of_weight.isnan().all()


def test_the_cheaper_way_is_taken(passes, device):
    """In the interpreter's tiles of 16 rows and columns, as many as a layer here has, so that each tap loads once."""
    every, none = (True,) * 3, []
    write, add = (True, "all"), (False, "all")
    for saved, options, expected in [
        ("valve", {}, none),  # once in either product
        ("valve", {"size": (1, 2), "padding": (0, 1), "kind": "all"}, none),
        ("valve", {"size": (1, 3), "padding": (0, 1), "kind": "all"}, [write]),
        ("valve", {"size": (2, 2), "kind": "all", "wanted": (False, True, True)}, none),  # four times in one of them
        ("valve", {"size": (7, 7), "padding": 3, "inputs": 1, "kind": "A", "wanted": (False, True, True)}, none),
        ("valve", {"inputs": 20}, none),
        ("relu", {}, none),
        ("relu", {"inputs": 20}, [write]),
        ("sign", {"inputs": 20}, none),
        ("valve", {"wanted": (True, False, False)}, none),
        ("valve", {"wanted": (True, False, True)}, [write]),  # nothing else adds up for the bias
        ("valve", {"wanted": (False, False, True)}, [add]),
        ("valve", {"kind": "none"}, [write]),  # rows that no program sees, but whose bias has a gradient
        ("valve", {"kind": "none", "wanted": (True, True, False)}, none),
        ("valve", {"results": 17}, [write]),  # odd strides
        ("relu", {"results": 17}, [write]),
        ("none", {}, none),  # the product for the weight adds up
        ("none", {"size": (3, 3), "padding": 1}, [add]),
        ("none", {"wanted": (True, False, True)}, [add]),
        ("none", {"wanted": (False, False, True)}, [add]),
        ("none", {"kind": "none"}, [add]),
        ("none", {"results": 17}, [write]),
    ]:
        passes.clear()
        check(*run(saved, **{"wanted": every, **options}))
        assert passes == expected, (saved, options)
    for activation in ("none", "gated"):  # an image's own bias
        passes.clear()
        condition = torch.randn(2, 32, device=device, requires_grad=True)
        x, weight, mask, _ = problem("B", 2, 16, 32, 4, 5, (1, 1), torch.float32, device)
        layer = partial(masked_conv2d, mask=mask, activation=activation, impl="triton")
        gradients(lambda x, w, c, layer=layer: layer(x, w, condition=c), (x, weight, condition), channels_last=True)
        assert passes == [(activation == "gated", "image")]


def test_where_cudnn_was_measured_faster_it_gets_the_pass(passes, monkeypatch):
    chosen = kernels.choose
    layers = []

    def measured(device, layer, precision):
        layers.append(layer)
        provider = "dense" if layer.direction == "in" and layer.saved == "none" else "triton"
        return provider, chosen(device, layer, precision)[1]

    monkeypatch.setattr(kernels, "choose", measured)
    check(*run("valve"))
    assert passes == [(True, "all")]
    after = [layer for layer in layers if layer.direction == "in" and layer.saved == "none"]
    assert (after[0].channels, after[0].rows, after[0].parts) == (32, 16, 1)
    assert any(layer.saved == "valve" for layer in layers)


@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_what_is_counted(saved, itemsize):
    """The bytes of an element's way, counted one after the other."""
    maps, parts = {"relu": (2, 1), "sign": (1, 1), "valve": (3, 2)}[saved]
    loaded = maps * itemsize + (saved == "sign")
    for times in range(1, 20):
        by_pass = loaded + parts * itemsize
        direct = 0
        for _ in range(times):
            by_pass += parts * itemsize
            direct += loaded
        assert on_load(saved, itemsize, times) == (direct < by_pass)


def test_how_often_a_product_loads_the_gradient():
    tile = Tile(64, 128, 32, 4, 3)
    layer = Layer("in", torch.bfloat16, 256, 2, 128, 5, 1000, 1, False, "valve")
    assert meets(layer, tile) == 5 * 2
    weight = Layer("weight", torch.bfloat16, 128, 2, 100, 5, 1000, 1, False, "valve")
    assert meets(weight, tile) == 5 * 4
    assert meets(Layer("weight", torch.bfloat16, 128, 2, 3, 24, 1000, 1, False, "valve"), tile) == 3  # gathered


@pytest.mark.parametrize(
    ("activation", "adds", "kept"), [("relu", False, 0), ("relu", True, 1), ("gated", False, 4), ("gated", True, 8)]
)
def test_what_is_kept_for_the_backward(activation, adds, kept, device):
    """Bytes a result beside input, weight and the result itself, in float32; nothing where no gradient is recorded."""
    x, weight, mask, bias = problem("B", 2, 16, 32, 4, 5, (1, 1), torch.float32, device)
    results = 16 if activation == "gated" else 32
    residual = torch.randn(2, results, 4, 5, device=device) if adds else None
    saved = {}

    def note(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        options = {"activation": activation, "residual": residual, "impl": "triton"}
        out = masked_conv2d(x, weight, mask, bias, **options)
    known = {one.untyped_storage().data_ptr() for one in (x, weight, mask, out)}
    extra = [one for address, one in saved.items() if address not in known and one.numel()]
    assert sum(one.numel() * one.element_size() for one in extra) == kept * out.numel()
    assert (out.untyped_storage().data_ptr() in saved) == (not adds)
    geometry = ([1, 1], [0, 0], [1, 1])
    with torch.no_grad():
        assert fused(x, weight, mask, bias, geometry, activation, residual=residual)[1].numel() == 0


@pytest.mark.parametrize(("saved", "results"), [("none", 4), ("relu", 4), ("sign", 4), ("valve", 4), ("both", 4)])
def test_contract_of_the_backward_operator(saved, results, device):
    parts = 2 if saved in ("valve", "both") else 1
    x, weight, mask, _ = (
        one.detach() for one in problem("B", 2, 3, parts * results, 3, 3, dtype=torch.float32, device=device)
    )
    grad, out = (
        torch.randn(2, 2, results, 3, 3, device=device).permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    )
    kept = {"sign": out > 0, "both": torch.cat((out, grad), 1).contiguous(memory_format=torch.channels_last)}
    tensors = (grad, None, x, weight, mask, out, kept.get(saved, grad), None, None)
    arguments = (*tensors, [1, 1], [1, 1], [1, 1], saved, [True, True, True, False, False, False])
    torch.library.opcheck(torch.ops.fastgen.masked_conv2d_backward.default, arguments)
