"""The gradients: through each activation, by which kernels, and what is kept for them."""

import pytest
import torch

from fastgen.kernels.masked_conv2d import launch
from fastgen.kernels.masked_conv2d.products import WeightGradient
from fastgen.ops import causal_mask, masked_conv2d
from fastgen.ops.masked_conv2d import fused
from tests.ops.masked_conv2d_truth import gradients, problem, truth

pytestmark = pytest.mark.usefixtures("full_memory", "kernels_wherever_they_can")

EPSILON = {torch.float32: 2e-6, torch.bfloat16: 2**-7}
# What leads back through the activation: (activation, whether a residual is added).
SAVED = {
    "relu": ("relu", False), "relu and residual": ("relu", True), "valve": ("gated", False),
    "valve and residual": ("gated", True),
}  # fmt: skip


@pytest.fixture
def passes(monkeypatch):
    """What each pass through the activation leads back through."""
    calls = []
    kernel = launch.masked_conv2d_activation_backward_kernel

    class Noting:
        def __getitem__(self, grid):
            def run(*arguments, **constants):
                calls.append(constants["SAVED"])
                kernel[grid](*arguments, **constants)

            return run

    monkeypatch.setattr(launch, "masked_conv2d_activation_backward_kernel", Noting())
    return calls


def run(
    saved, kind="B", inputs=16, results=16, size=(1, 1), dtype=torch.float32, wanted=(True,) * 3, batch=2,
    channels_last=True, **options
):  # fmt: skip
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

    return gradients(found, asked, channels_last=channels_last), gradients(expected, asked)


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


@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize(("size", "geometry"), GEOMETRIES, ids=str)
def test_gradients_equal_the_definition(saved, size, geometry, passes):
    """With sizes that fill no tile, and fewer channels than a block of columns in every other case."""
    inputs = (3, 17)[(list(SAVED).index(saved) + GEOMETRIES.index((size, geometry))) % 2]
    check(*run(saved, "random" if size == (2, 3) else "B", inputs, 17, size, **geometry))
    assert passes == [saved.split()[0]]


@pytest.mark.parametrize("saved", ["valve", "none"])
def test_shares_of_many_pixels_are_added(saved, device):
    """1040 pixels: two shares of the weight, the last of them shorter."""
    x, weight, mask, _ = problem("B", 52, 3, 16, 4, 5, (1, 1), torch.float32, device)
    walk = launch.known_walk(mask, weight.shape, 1)
    grad = torch.randn(52, 16, 4, 5, device=device).contiguous(memory_format=torch.channels_last)
    assert WeightGradient(grad, x, weight, mask, walk=walk, adds_up=True).shares == 2
    check(*run(saved, batch=52, inputs=3))


@pytest.mark.parametrize("saved", [*SAVED, "none"])
def test_half_precision(saved):
    check(*run(saved, dtype=torch.bfloat16), torch.bfloat16)


@pytest.mark.parametrize("saved", SAVED)
def test_a_nan_of_the_result_stays_one(saved, device):
    """With a residual the sum was a NaN, which passes the gradient on, as in PyTorch."""
    activation, adds = SAVED[saved]
    x = torch.randn(1, 16, 1, 2, device=device)
    x[..., 0] = torch.nan
    weight = torch.randn(32, 16, 1, 1, device=device).requires_grad_()
    residual = torch.zeros(1, 16 if activation == "gated" else 32, 1, 2, device=device) if adds else None
    options = {"activation": activation, "residual": residual, "impl": "triton"}
    (of_weight,) = torch.autograd.grad(masked_conv2d(x, weight, None, **options).sum(), weight)
    assert of_weight.isnan().all()


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"size": (3, 3), "padding": 1},
        {"kind": "none"},
        {"kind": "A"},  # no channel is live
        {"wanted": (True, True, False)},
        {"wanted": (True, False, True)},
        {"wanted": (False, False, True)},
    ],
    ids=str,
)
def test_without_an_activation_there_is_no_pass(options, channels_last, passes):
    """The product for the weight adds up for the bias, or PyTorch where it is not asked for."""
    check(*run("none", channels_last=channels_last, **options))
    assert passes == []


def test_what_was_saved_may_come_back_in_another_order_of_memory(device):
    """As from hooks that keep it on the CPU, in pinned memory; with the plans of a call that had no hooks."""
    x, weight, mask, bias = problem("B", 2, 16, 32, 4, 5, dtype=torch.float32, device=device)
    inputs = (x, weight, bias)
    call = lambda x, w, b: masked_conv2d(x, w, mask, b, padding=1, activation="gated", impl="triton")  # noqa: E731
    expected = gradients(call, inputs)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.contiguous(), lambda tensor: tensor):
        found = gradients(call, inputs)
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


def test_the_sums_for_the_bias_are_as_right_as_the_weight_with_colours(device):
    """Some tiles of rows have programs that find all their columns dead, and must not leave their sums unwritten."""
    x, weight, mask, bias = problem("A-rgb", 3, 48, 48, 7, 5, (1, 3), torch.float32, device)
    inputs = (x, weight, bias)
    found = gradients(lambda x, w, b: masked_conv2d(x, w, mask, b, padding=(0, 1), impl="triton"), inputs, 1, True)
    check(found, gradients(lambda x, w, b: truth(x, w, mask, b, padding=(0, 1)), inputs))


@pytest.mark.parametrize(
    ("activation", "adds", "kept"), [("relu", False, 0), ("relu", True, 4), ("gated", False, 4), ("gated", True, 8)]
)
def test_what_is_kept_for_the_backward(activation, adds, kept, device):
    """Bytes a result beside input, weight and the result itself, in float32; nothing where no gradient is recorded."""
    x, weight, mask, bias = problem("B", 2, 16, 32, 4, 5, (1, 1), torch.float32, device)
    x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
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
    geometry = ((1, 1), (0, 0), (1, 1))
    with torch.no_grad():
        assert fused(x, weight, mask, bias, geometry, activation, residual=residual)[1] is None


@pytest.mark.parametrize("saved", ["none", "relu", "valve", "both"])
def test_contract_of_the_backward_operator(saved, device):
    results, parts = 4, 2 if saved in ("valve", "both") else 1
    x, weight, mask, _ = (
        one.detach() for one in problem("B", 2, 3, parts * results, 3, 3, dtype=torch.float32, device=device)
    )
    grad, map_of_results = (
        torch.randn(2, 2, results, 3, 3, device=device).permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    )
    both = torch.cat((map_of_results, grad), 1).contiguous(memory_format=torch.channels_last)
    out, kept = {
        "none": (None, None), "relu": (map_of_results, None), "valve": (map_of_results, grad),
        "both": (map_of_results, both),
    }[saved]  # fmt: skip
    tensors = (grad, None, x, weight, mask, out, kept, None, None)
    arguments = (*tensors, [1, 1], [1, 1], [1, 1], saved, [True, True, True, False, False, False])
    torch.library.opcheck(torch.ops.fastgen.masked_conv2d_backward.default, arguments)


@pytest.mark.parametrize("activation", ["none", "gated"])
def test_an_image_s_own_bias_of_several_shares_of_pixels(activation, device):
    x, weight, mask, bias = problem("B", 2, 3, 6, 12, 13, (1, 1), torch.float32, device)
    inputs = (x, weight, bias, torch.randn(2, 6, device=device, requires_grad=True))
    options = {"activation": activation, "impl": "triton"}
    found = gradients(lambda x, w, b, c: masked_conv2d(x, w, mask, b, condition=c, **options), inputs)
    check(found, gradients(lambda x, w, b, c: truth(x, w, mask, b, activation, c), inputs))


def test_groups_of_colours_in_both_halves_of_a_gate(device):
    """Three blocks of channels a half: the gradient of the input leaves out the first ones of each."""
    x, weight, _, bias = problem("all", 1, 48, 96, 4, 3, (1, 3), torch.float32, device)
    mask = causal_mask("B", 48, 48, (1, 3), 3).repeat(2, 1, 1, 1).to(device)
    options = {"padding": (0, 1), "activation": "gated"}
    found = gradients(lambda x, w, b: masked_conv2d(x, w, mask, b, impl="triton", **options), (x, weight, bias))
    check(found, gradients(lambda x, w, b: truth(x, w, mask, b, **options), (x, weight, bias)))
