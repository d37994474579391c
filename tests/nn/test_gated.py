import pytest
import torch
from torch.nn import functional as F

from fastgen.nn import GatedMaskedBlock, gated


def textbook(block, mask_type, vertical, horizontal, condition):
    """Figure 2 of the paper with unmasked weights, padded and cropped: the rows above, and the pixels to the left."""
    kernel = block.vertical.kernel_size[0]
    reach = kernel // 2
    rows = reach + (mask_type == "B")
    above = F.conv2d(F.pad(vertical, (reach, reach, reach, 0)), block.vertical.weight[:, :, :rows], block.vertical.bias)
    above = above[:, :, : vertical.shape[2]]
    weight = block.horizontal.weight.clone()
    weight[~block.horizontal.mask] = 0
    beside = F.conv2d(F.pad(horizontal, (reach, 0, 0, 0)), weight[..., : reach + 1])
    if condition is not None:
        first, second = block.condition.weight[condition][:, :, None, None].chunk(2, 1)
        above, beside = above + first, beside + second
    pre = beside + F.conv2d(above, block.across.weight, block.across.bias)
    a, b = pre.chunk(2, 1)
    out = F.conv2d(a.tanh() * b.sigmoid(), block.output.weight * block.output.mask, block.output.bias)
    a, b = above.chunk(2, 1)
    return a.tanh() * b.sigmoid(), out + horizontal if block.residual else out


@pytest.mark.parametrize("n_classes", [None, 4])
@pytest.mark.parametrize("colours", [1, 3])
@pytest.mark.parametrize(("mask_type", "kernel_size"), [("A", 7), ("A", 3), ("B", 3), ("B", 5)])
def test_equals_the_cropped_stacks(mask_type, kernel_size, colours, n_classes):
    inputs = colours if mask_type == "A" else 6
    block = GatedMaskedBlock(
        inputs, 6, kernel_size, mask_type=mask_type, data_channels=colours, n_classes=n_classes
    ).double()
    vertical, horizontal = torch.randn(2, 2, inputs, 6, 5, dtype=torch.float64).unbind()
    condition = None if n_classes is None else torch.tensor([3, 1])
    found = block(vertical, horizontal, condition)
    expected = textbook(block, mask_type, vertical, horizontal, condition)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("hook", [False, True])
@pytest.mark.parametrize(("mask_type", "colours", "n_classes"), [("A", 3, None), ("B", 1, 2)])
def test_the_fused_block_equals_the_composition(mask_type, colours, n_classes, hook, monkeypatch):
    """Compares outputs and gradients in the interpreter; with a hook, the layer of the hook is called."""
    inputs = colours if mask_type == "A" else 6
    block = GatedMaskedBlock(inputs, 6, 3, mask_type=mask_type, data_channels=colours, n_classes=n_classes)
    calls = []
    if hook:
        block.across.register_forward_hook(lambda *_: calls.append(1))
    maps = [torch.randn(2, inputs, 4, 5, requires_grad=True) for _ in range(2)]
    condition = None if n_classes is None else torch.tensor([1, 0])
    variables = [*maps, *block.parameters()]

    def results():
        out = block(*maps, condition)
        grads = torch.autograd.grad([out[0].square().sum(), out[1].sin().sum()], variables)
        return [*out, *grads]

    expected = results()
    calls.clear()
    monkeypatch.setattr(gated, "runs_triton", lambda impl, x: True)
    found = results()
    assert len(calls) == hook
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("mask_type", ["A", "B"])
def test_what_each_stack_sees(mask_type):
    block = GatedMaskedBlock(3, 6, 3, mask_type=mask_type, data_channels=3).double()
    inputs = [torch.randn(1, 3, 5, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    vertical, horizontal = block(*inputs)

    def seen(out, source):
        grad = torch.autograd.grad(out.sum(), source, retain_graph=True, allow_unused=True)[0]
        return torch.zeros(3, 5, 5, dtype=torch.bool) if grad is None else (grad != 0)[0]

    rows, columns = torch.arange(5)[:, None], torch.arange(5)
    near = ((rows - 2).abs() <= 1) & ((columns - 2).abs() <= 1)
    above = near & (rows < 2 if mask_type == "A" else rows <= 2)
    assert torch.equal(seen(vertical[..., 2, 2], inputs[0]), above.expand(3, 5, 5))
    assert not seen(vertical[..., 2, 2], inputs[1]).any()
    for colour in range(3):
        group = horizontal[:, 2 * colour : 2 * colour + 2, 2, 2]
        assert torch.equal(seen(group, inputs[0]), above.expand(3, 5, 5))
        left = (rows == 2) & (columns == 1)
        for source in range(3):
            centre = source < colour if mask_type == "A" else source <= colour
            expected = left | ((rows == 2) & (columns == 2) & centre)
            assert torch.equal(seen(group, inputs[1])[source], expected)


def test_dropout_only_in_training():
    block = GatedMaskedBlock(4, 4, dropout=0.5)
    x = torch.randn(1, 4, 5, 5)
    assert not torch.equal(block(x, x)[1], block(x, x)[1])
    block.eval()
    assert torch.equal(block(x, x)[1], block(x, x)[1])


@pytest.mark.parametrize("kernel_size", [1, 4, (3, 3)])
def test_bad_kernel_size_is_named(kernel_size):
    with pytest.raises(ValueError, match="kernel_size"):
        GatedMaskedBlock(4, 4, kernel_size)
