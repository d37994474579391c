"""The recurrences pixel by pixel, as literally as the paper states them: the truth for every implementation."""

import torch


def problem(batch, units, height, width, taps, dtype=torch.float64, device="cpu"):
    """Gates, a weight, and a gradient of the states."""
    gates = torch.randn(batch, 4 * units, height, width, dtype=torch.float64)
    weight = torch.randn(4 * units, units, taps, dtype=torch.float64) / units**0.5
    grad = torch.randn(batch, units, height, width, dtype=torch.float64)
    return tuple(tensor.to(device, dtype) for tensor in (gates, weight, grad))


def _cell(pre, cell):
    o, f, i, g = pre.chunk(4, -1)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


def diagonal_pixels(gates, weight, reverse=False):
    batch, channels, height, width = gates.shape
    outside = gates.new_zeros(batch, channels // 4)
    hidden, cell = {}, {}
    for i in range(height):
        for j in range(width - 1, -1, -1) if reverse else range(width):
            left = (i, j + 1) if reverse else (i, j - 1)
            pre = gates[:, :, i, j]
            pre = (
                pre + hidden.get((i - 1, j), outside) @ weight[..., 0].T + hidden.get(left, outside) @ weight[..., 1].T
            )
            hidden[i, j], cell[i, j] = _cell(pre, cell.get(left, outside))
    rows = [torch.stack([hidden[i, j] for j in range(width)], -1) for i in range(height)]
    return torch.stack(rows, -2)


def row_pixels(gates, weight):
    batch, channels, height, width = gates.shape
    taps = weight.shape[2]
    outside = gates.new_zeros(batch, channels // 4)
    hidden, cell = {}, {}
    for i in range(height):
        for j in range(width):
            pre = gates[:, :, i, j]
            for tap in range(taps):
                pre = pre + hidden.get((i - 1, j + tap - taps // 2), outside) @ weight[..., tap].T
            hidden[i, j], cell[i, j] = _cell(pre, cell.get((i - 1, j), outside))
    rows = [torch.stack([hidden[i, j] for j in range(width)], -1) for i in range(height)]
    return torch.stack(rows, -2)


def gradients(function, gates, weight, grad):
    """Result and both gradients, in the dtype of the arguments."""
    gates, weight = gates.detach().requires_grad_(), weight.detach().requires_grad_()
    hidden = function(gates, weight)
    return (hidden.detach(), *torch.autograd.grad(hidden, (gates, weight), grad.to(hidden.dtype)))
