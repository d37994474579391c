import copy

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from fastgen.nn import MaskedConv2d
from fastgen.ops import causal_mask

LAYERS = [
    {"kernel_size": 3, "padding": 1, "mask_type": "A"},
    {"kernel_size": 3, "padding": 1, "mask_type": "B"},
    {"kernel_size": 7, "padding": 3, "mask_type": "A"},
    {"kernel_size": 1, "mask_type": "B"},
    {"kernel_size": 1, "mask_type": "A"},
    {"kernel_size": 3, "mask_type": "B"},
    {"kernel_size": 3, "padding": (2, 0), "mask_type": "A"},
    {"kernel_size": 5, "padding": 2, "stride": 2, "mask_type": "B"},
    {"kernel_size": 3, "padding": 2, "dilation": 2, "mask_type": "A"},
    {"kernel_size": 3, "padding": (1, 4), "dilation": (1, 3), "stride": (2, 1), "mask_type": "B"},
    {"kernel_size": (1, 3), "padding": (0, 1), "mask_type": "A"},
    {"kernel_size": (3, 1), "padding": "same", "mask_type": "A"},
    {"kernel_size": 3, "padding": "same", "dilation": 2, "mask_type": "B", "bias": False},
    {"kernel_size": 3, "padding": "valid", "mask_type": "B"},
]


def dense(layer, x):
    """What the layer stands for: an ordinary convolution of masked weights."""
    out = F.conv2d(x, layer.weight * layer.mask, layer.bias, layer.stride, layer.padding, layer.dilation)
    if layer.activation == "gated":
        return out[:, : out.shape[1] // 2].tanh() * out[:, out.shape[1] // 2 :].sigmoid()
    return out.relu() if layer.activation == "relu" else out


@pytest.mark.parametrize("activation", ["none", "relu", "gated"])
@pytest.mark.parametrize("colours", [1, 3])
@pytest.mark.parametrize("options", LAYERS, ids=str)
def test_equals_the_masked_convolution(options, colours, activation, device):
    layer = MaskedConv2d(3, 12, **options, data_channels=colours, activation=activation).double().to(device)
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64, device=device, requires_grad=True)
    inputs = [x, *layer.parameters()]
    expected = dense(layer, x)
    found = layer(x)
    grad = torch.randn_like(expected)
    torch.testing.assert_close(found, expected)
    for one, other in zip(
        torch.autograd.grad(found, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("colours", [1, 3])
@pytest.mark.parametrize("mask_type", ["A", "B"])
def test_the_gate_has_the_colour_order_in_both_halves(mask_type, colours):
    layer = MaskedConv2d(6, 12, 3, mask_type=mask_type, data_channels=colours, activation="gated")
    mask = causal_mask(mask_type, 6, 6, 3, colours)
    assert torch.equal(layer.mask, torch.cat((mask, mask)))
    plain = MaskedConv2d(6, 12, 3, mask_type=mask_type, data_channels=colours)
    assert torch.equal(plain.mask, causal_mask(mask_type, 12, 6, 3, colours))


def test_is_a_conv2d_with_its_names_and_initial_values():
    torch.manual_seed(3)
    conv = nn.Conv2d(3, 6, 3, padding=1)
    torch.manual_seed(3)
    layer = MaskedConv2d(3, 6, 3, padding=1, mask_type="A")
    assert isinstance(layer, nn.Conv2d)
    assert list(layer.state_dict()) == list(conv.state_dict())
    assert dict(layer.named_buffers()).keys() == {"mask"}
    for name, value in conv.state_dict().items():
        assert torch.equal(layer.state_dict()[name], value)


@pytest.mark.parametrize("kind", [torch.float32, torch.bool, torch.uint8, None])
def test_checkpoints_with_and_without_a_mask_load(kind):
    layer = MaskedConv2d(3, 6, 3, mask_type="A")
    state = {name: torch.randn_like(value) for name, value in layer.state_dict().items()}
    if kind is not None:
        state["mask"] = layer.mask.to(kind)
    given = dict(state)
    layer.load_state_dict(state)
    assert torch.equal(layer.weight, state["weight"])
    assert state.keys() == given.keys()
    model = nn.Sequential(nn.ReLU(), layer)
    model.load_state_dict({"1." + name: value for name, value in state.items()})
    assert list(model.state_dict()) == ["1.weight", "1.bias"]


def test_a_checkpoint_with_another_mask_is_refused():
    layer = MaskedConv2d(3, 6, 3, mask_type="A")
    state = {**layer.state_dict(), "mask": causal_mask("B", 6, 3, 3).float()}
    with pytest.raises(RuntimeError, match="mask is not the mask"):
        layer.load_state_dict(state)
    with pytest.raises(RuntimeError, match="mask is not the mask"):
        layer.load_state_dict({**state, "mask": torch.ones(2, 2)})


def test_follows_a_mask_that_is_written_into():
    layer = MaskedConv2d(3, 6, 3, padding=1, mask_type="A")
    x = torch.randn(2, 3, 5, 5)
    layer(x)
    layer.mask.fill_(True)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, layer.bias, padding=1))
    copied = copy.deepcopy(layer)
    copied.mask[:, :, 1:] = False
    torch.testing.assert_close(copied(x), dense(copied, x))
    layer.mask = causal_mask("B", 6, 3, 3)
    torch.testing.assert_close(layer(x), dense(layer, x))


def test_any_mask():
    mask = torch.rand(4, 3, 3, 3) < 0.3
    layer = MaskedConv2d(3, 4, 3, padding=1, mask=mask)
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight * mask, layer.bias, padding=1))


def test_an_image_s_own_bias_and_a_residual():
    layer = MaskedConv2d(3, 6, 3, padding=1, mask_type="B", activation="relu")
    x, own, residual = torch.randn(2, 3, 5, 5), torch.randn(2, 6), torch.randn(2, 6, 5, 5)
    conv = F.conv2d(x, layer.weight * layer.mask, layer.bias, padding=1)
    torch.testing.assert_close(layer(x, own, residual), (conv + own[..., None, None]).relu() + residual)


def test_traces_to_plain_operators():
    layer = MaskedConv2d(3, 6, 3, padding=1, mask_type="B", data_channels=3, activation="gated")
    graph = make_fx(layer)(torch.randn(1, 3, 5, 5)).graph
    names = {str(node.target) for node in graph.nodes if node.op == "call_function"}
    assert all(name.startswith(("aten.", "<built-in function getitem")) for name in names)


def test_functional_call_and_an_ensemble():
    layers = [MaskedConv2d(3, 6, 3, padding=1, mask_type="A") for _ in range(2)]
    x = torch.randn(2, 3, 5, 5)
    zeros = {name: torch.zeros_like(value) for name, value in layers[0].named_parameters()}
    assert (torch.func.functional_call(layers[0], zeros, x) == 0).all()
    state = torch.func.stack_module_state(layers)
    found = torch.func.vmap(lambda *state: torch.func.functional_call(layers[0], state, x))(*state)
    for one, layer in zip(found, layers, strict=True):
        torch.testing.assert_close(one, layer(x))


def test_weights_that_are_computed():
    """By `torch.nn.utils.parametrize`, which takes them out of the parameters."""
    layer = MaskedConv2d(3, 6, 3, padding=1, mask_type="A")
    torch.nn.utils.parametrizations.weight_norm(layer)
    layer.parametrizations.weight.original0.data.mul_(2)
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(layer(x), dense(layer, x))


def test_compiles_into_one_graph():
    layer = MaskedConv2d(3, 6, 3, padding=1, mask_type="A", activation="relu")
    x = torch.randn(2, 3, 5, 5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_trains_in_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        layer = MaskedConv2d(3, 6, 3, padding=1, mask_type="A")
        x = torch.randn(2, 3, 5, 5)
        torch.nn.parallel.DistributedDataParallel(layer)(x).square().sum().backward()
        expected = torch.autograd.grad(dense(layer, x).square().sum(), layer.weight)[0]
        torch.testing.assert_close(layer.weight.grad, expected)
    finally:
        torch.distributed.destroy_process_group()


def test_moves_and_changes_dtype():
    layer = MaskedConv2d(3, 6, 3, padding=1, mask_type="A").bfloat16()
    assert layer.mask.dtype == torch.bool
    assert layer(torch.randn(1, 3, 4, 4).bfloat16()).dtype == torch.bfloat16
    assert MaskedConv2d(3, 6, 3, mask_type="A", device="meta")(torch.randn(1, 3, 4, 4, device="meta")).shape[1] == 6


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("activation", ["none", "gated"])
def test_has_its_mask_after_the_meta_device(assign, activation):
    options = {"mask_type": "A", "data_channels": 3, "activation": activation}
    expected = MaskedConv2d(3, 12, 3, **options)
    model = nn.Sequential(MaskedConv2d(3, 12, 3, **options, device="meta"))
    if not assign:
        model = model.to_empty(device="cpu")
    model.load_state_dict({"0." + name: value for name, value in expected.state_dict().items()}, assign=assign)
    assert torch.equal(model[0].mask, expected.mask)
    x = torch.randn(1, 3, 4, 4)
    assert torch.equal(model(x), expected(x))
    model[0].double()
    assert torch.equal(model[0].mask, expected.mask)


def test_loads_a_checkpoint_with_its_mask_after_the_meta_device():
    expected = MaskedConv2d(3, 12, 3, mask_type="B", data_channels=3)
    model = MaskedConv2d(3, 12, 3, mask_type="B", data_channels=3, device="meta")
    model.load_state_dict(expected.state_dict() | {"mask": expected.mask.float()}, assign=True)
    assert torch.equal(model.mask, expected.mask)
    again = model.to("meta").to_empty(device="cpu")
    assert torch.equal(again.mask, expected.mask)


def test_a_mask_of_the_users_own_is_lost_on_the_meta_device():
    model = MaskedConv2d(1, 2, 3, mask=torch.ones(2, 1, 3, 3, dtype=torch.bool), device="meta")
    with pytest.raises(RuntimeError, match="mask"):
        model.to_empty(device="cpu")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"mask_type": "C"}, "mask_type"),
        ({"mask_type": None}, "mask_type"),
        ({"kernel_size": 4}, "kernel_size"),
        ({"data_channels": 4}, "out_channels"),
        ({"activation": "elu"}, "activation"),
        ({"activation": "gated", "out_channels": 3}, "out_channels"),
        ({"mask_type": None, "mask": torch.ones(6, 3, 3, 3)}, "mask"),
        ({"mask_type": None, "mask": torch.ones(1, 1, 3, 3, dtype=torch.bool)}, "mask"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(changes, named):
    options = {"in_channels": 3, "out_channels": 6, "kernel_size": 3, "mask_type": "A", **changes}
    with pytest.raises(ValueError, match=named):
        MaskedConv2d(**options)
