"""What the diagonal and the Row LSTM share: one cell, forward and backward, and the checks of their arguments."""

import torch
from torch import Tensor

from fastgen.kernels.maps import empty_map
from fastgen.ops._implementation import uses_triton

Offsets = list[tuple[int, int]]  # (rows, columns) from a pixel to the state of each tap


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the cell state and of all sums: float32, and float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def lstm_cell(pre: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The LSTM cell (van den Oord et al. 2016, equation 3), channels last.

    Args:
        pre: gates before their activations, in the order o, f, i, g, (..., 4h).
        cell: the previous cell state (..., h).

    Returns:
        The activated gates (..., 4h), the new cell state and the hidden state, (..., h) each.
    """
    units = cell.shape[-1]
    activated = torch.cat((pre[..., : 3 * units].sigmoid(), pre[..., 3 * units :].tanh()), -1)
    o, f, i, g = activated.chunk(4, -1)
    cell = f * cell + i * g
    return activated, cell, o * cell.tanh()


def lstm_cell_backward(
    grad_hidden: Tensor, grad_cell: Tensor, activated: Tensor, cell: Tensor, previous: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `lstm_cell` with respect to (pre, previous cell state), from what it gave and the previous state."""
    o, f, i, g = activated.chunk(4, -1)
    squashed = cell.tanh()
    grad_cell = grad_cell + grad_hidden * o * (1 - squashed.square())
    grad_pre = torch.cat(
        (
            grad_hidden * squashed * o * (1 - o),
            grad_cell * previous * f * (1 - f),
            grad_cell * g * i * (1 - i),
            grad_cell * i * (1 - g.square()),
        ),
        -1,
    )
    return grad_pre, grad_cell * f


def check_arguments(gates: Tensor, weight: Tensor) -> None:
    """Raises TypeError or ValueError where gates (B, 4h, H, W) and weight (4h, h, taps) are not tensors that fit."""
    for name, tensor in (("gates", gates), ("weight", weight)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a float tensor, got {kind}")
    _check_shapes(gates.shape, weight.shape)
    if gates.dtype != weight.dtype:
        raise TypeError(f"gates and weight must have the same dtype, got {gates.dtype} and {weight.dtype}")
    if gates.device != weight.device:
        raise ValueError(f"gates is on {gates.device}, weight on {weight.device}; expected the same device")


def _check_shapes(gates: torch.Size, weight: torch.Size) -> None:
    if len(gates) != 4 or gates[1] == 0 or gates[1] % 4 or 0 in gates[2:]:
        raise ValueError(f"gates must have the shape (B, 4h, H, W) with h, H, W >= 1, got {tuple(gates)}")
    units = gates[1] // 4
    if len(weight) != 3 or weight[:2] != (4 * units, units):
        raise ValueError(
            f"weight must have the shape (4h, h, taps) = ({4 * units}, {units}, taps) for gates of the shape "
            f"{tuple(gates)}, got {tuple(weight)}"
        )


def needs_gradient(gates: Tensor, weight: Tensor) -> bool:
    return torch.is_grad_enabled() and (gates.requires_grad or weight.requires_grad)


def runs_triton(impl: str, gates: Tensor) -> bool:
    """`uses_triton`, with float64 left to the definition; TypeError where impl="triton" asks for it."""
    triton = uses_triton(impl, gates)
    if triton and gates.dtype == torch.float64:
        if impl == "triton":
            raise TypeError("gates is float64, which the Triton kernel does not take: use impl='auto' or 'reference'")
        return False
    return triton


def own(maps: Tensor) -> Tensor:
    """A copy in the layout of the scans, channels-last, that is no view."""
    return empty_map(maps, *maps.shape[1:]).copy_(maps)


def weight_gradient(grad_gates: Tensor, hidden: Tensor, offsets: Offsets) -> Tensor:
    """(4h, h, taps) by one large matrix product over all pixels; offsets: (rows, columns) to each tap's neighbour."""
    batch, units, height, width = hidden.shape
    states = hidden.permute(0, 2, 3, 1)
    neighbours = states.new_zeros(batch, height, width, len(offsets), units)
    for tap, (down, right) in enumerate(offsets):
        rows = range(max(0, -down), height - max(0, down))
        columns = range(max(0, -right), width - max(0, right))
        if rows and columns:
            of = states[:, rows.start + down : rows.stop + down, columns.start + right : columns.stop + right]
            neighbours[:, rows.start : rows.stop, columns.start : columns.stop, tap] = of
    product = grad_gates.permute(0, 2, 3, 1).flatten(0, 2).T @ neighbours.flatten(3).flatten(0, 2)
    return product.unflatten(1, (len(offsets), units)).transpose(1, 2)
