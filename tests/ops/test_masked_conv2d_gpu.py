"""What only a GPU can show of the masked convolution: full-size tiles, big offsets, races, graphs, memory."""

import copy

import pytest
import torch

from fastgen.models import GatedPixelCNN, PixelCNN
from fastgen.nn import GatedMaskedBlock, MaskedConv2d
from fastgen.ops import causal_mask, masked_conv2d
from fastgen.ops.masked_conv2d import masked_conv2d_reference

pytestmark = pytest.mark.gpu


@pytest.fixture
def cuda():
    return torch.device("cuda")


def layer_inputs(device, dtype=torch.bfloat16, batch=8, channels=128, outputs=256, size=28):
    x = torch.randn(batch, size, size, channels, device=device, dtype=dtype).permute(0, 3, 1, 2).requires_grad_()
    mask = causal_mask("B", outputs, channels, 3).to(device)
    weight = (torch.randn(outputs, channels, 3, 3, device=device) / (4.5 * channels) ** 0.5).to(dtype).requires_grad_()
    return x, weight, mask, torch.randn(outputs, device=device, dtype=dtype).requires_grad_()


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gated"])
def test_the_way_back_through_the_activation_on_the_device(activation, residual, kernel, cuda):
    """Of a 1x1 and of a 3x3 kernel."""
    x, weight, mask, bias = layer_inputs(cuda)
    if kernel == 1:
        weight, mask = weight.detach()[..., :1, :1].contiguous().requires_grad_(), None
    options = {"padding": kernel // 2, "activation": activation}
    added = torch.randn_like(masked_conv2d_reference(x, weight, mask, bias, **options))
    options["residual"] = added if residual else None

    def run(call, *tensors):
        out = call(*tensors[:2], mask, tensors[2], **options)
        grad = torch.ones_like(out).contiguous(memory_format=torch.channels_last)
        return [out, *torch.autograd.grad(out, tensors, grad)]

    found = run(masked_conv2d, x, weight, bias)
    options["residual"] = added.double() if residual else None
    expected = run(masked_conv2d_reference, *(one.detach().double().requires_grad_() for one in (x, weight, bias)))
    for one, other in zip(found, expected, strict=True):
        error = (one.double() - other).abs().max() / other.abs().max()
        assert error <= 4 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("activation", ["none", "relu", "gated"])
def test_repeated_runs_are_bitwise_equal(activation, cuda):
    x, weight, mask, bias = layer_inputs(cuda)

    def run():
        out = masked_conv2d(x, weight, mask, bias, padding=1, activation=activation)
        return [out, *torch.autograd.grad(out.float().square().sum(), [x, weight, bias])]

    first = run()
    for _ in range(30):
        assert all(torch.equal(one, other) for one, other in zip(run(), first, strict=True))


def test_offsets_beyond_32_bits(cuda):
    """More than 2^31 elements in the input and in the result; the last images against the same ones alone."""
    batch = 2**31 // (128 * 32 * 32) + 3
    needed = 2 * 9 * batch * 128 * 32 * 32
    if torch.cuda.mem_get_info(cuda)[0] < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of free memory")
    mask = causal_mask("B", 256, 128, 3).to(cuda)
    weight = (torch.randn(256, 128, 3, 3, device=cuda) / 24).bfloat16()
    x = torch.empty(batch, 32, 32, 128, device=cuda, dtype=torch.bfloat16).normal_().permute(0, 3, 1, 2)
    options = {"padding": 1, "activation": "gated"}
    x.requires_grad_()
    weight.requires_grad_()
    out = masked_conv2d(x, weight, mask, **options)
    alone = x.detach()[-2:].clone(memory_format=torch.channels_last).requires_grad_()
    expected = masked_conv2d(alone, weight, mask, **options)
    torch.testing.assert_close(out[-2:], expected, rtol=0, atol=1e-2)
    grad = torch.zeros_like(out)
    grad[-2:] = 1
    of_x, of_weight = torch.autograd.grad(out, [x, weight], grad)
    alone_x, alone_weight = torch.autograd.grad(expected, [alone, weight], torch.ones_like(expected))
    torch.testing.assert_close(of_x[-2:], alone_x, rtol=0, atol=2e-2)
    torch.testing.assert_close(of_weight, alone_weight, rtol=1e-2, atol=1e-2 * alone_weight.abs().max().item())


def test_a_cuda_graph_replays_and_refuses_a_mask_it_cannot_read(cuda):
    layer = MaskedConv2d(128, 256, 3, padding=1, mask_type="B", activation="gated", device=cuda, dtype=torch.bfloat16)
    x = torch.randn(4, 128, 28, 28, device=cuda, dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        layer(x)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = layer(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(out, layer(x))
    fresh = layer.mask.clone()
    with pytest.raises(RuntimeError, match="before the capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        masked_conv2d(x, layer.weight, fresh, padding=1)


def test_the_hot_path_does_not_wait(cuda):
    x, weight, mask, bias = layer_inputs(cuda)

    def step():
        masked_conv2d(x, weight, mask, bias, padding=1, activation="gated").sum().backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_training_takes_no_more_memory_than_eager(cuda):
    def peak(call):
        x, weight, mask, bias = layer_inputs(cuda, batch=64)
        for _ in range(2):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            torch.autograd.grad(call(x, weight, mask, bias, padding=1, activation="gated").sum(), [x, weight, bias])
            torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    assert peak(masked_conv2d) <= peak(masked_conv2d_reference)


def test_works_in_cuda_graphs_of_inductor(cuda):
    """Which refuse what an operator allocates and keeps."""
    layer = MaskedConv2d(128, 256, 3, padding=1, mask_type="B", activation="gated", device=cuda, dtype=torch.bfloat16)
    x = torch.randn(4, 128, 28, 28, device=cuda, dtype=torch.bfloat16)
    compiled = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
    expected = layer(x)
    expected.sum().backward()
    wanted = layer.weight.grad.clone()
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        layer.weight.grad = None
        found = compiled(x)
        found.sum().backward()
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(layer.weight.grad, wanted)


def test_compiles_with_inductor_into_one_graph(cuda):
    x, weight, mask, bias = layer_inputs(cuda)
    compiled = torch.compile(lambda x: masked_conv2d(x.sin(), weight, mask, bias, padding=1).relu(), fullgraph=True)
    expected = masked_conv2d(x.sin(), weight, mask, bias, padding=1).relu()
    torch.testing.assert_close(compiled(x), expected, rtol=2e-2, atol=2e-2)
    compiled(x).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_block_and_the_models_equal_their_float64_selves(dtype, cuda):
    with torch.backends.cudnn.flags(allow_tf32=False):
        block = GatedMaskedBlock(48, 48, data_channels=3, n_classes=4)
        maps, condition = torch.randn(2, 5, 48, 9, 11), torch.tensor([0, 3, 1, 2, 0])
        expected = copy.deepcopy(block).double()(*maps.double(), condition)
        found = block.to(cuda, dtype)(*maps.to(cuda, dtype), condition.to(cuda))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.cpu().double(), other, rtol=0, atol=20 * torch.finfo(dtype).eps)
        for model in (
            PixelCNN((3, 8, 8), 4, channels=24, layers=2),
            GatedPixelCNN((3, 8, 8), 4, channels=24, layers=2),
        ):
            x = torch.randint(4, (2, 3, 8, 8))
            expected = copy.deepcopy(model).double()(x)
            found = model.to(cuda, dtype)(x.to(cuda)).cpu().double()
            torch.testing.assert_close(found, expected, rtol=0, atol=60 * torch.finfo(dtype).eps)


def test_the_block_runs_three_products(cuda):
    block = GatedMaskedBlock(128, 128).to(cuda, torch.bfloat16)
    maps = torch.randn(2, 8, 128, 32, 32, device=cuda, dtype=torch.bfloat16)
    maps = [one.contiguous(memory_format=torch.channels_last) for one in maps]
    with torch.no_grad():
        block(*maps)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            block(*maps)
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    products = [name for name in names if name == "masked_conv2d_kernel"]
    assert len(products) == 3
    assert len(names) <= 7, names  # and four times the packing of weights
