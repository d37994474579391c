"""The diagonal LSTM (van den Oord et al. 2016, section 3.2) over a whole image, a diagonal at a time.

The pixels of a diagonal i + j = d need only the diagonal before, so that an image takes H + W - 1 steps. The tensor is
never skewed: a diagonal is an index.
"""

import torch
from torch import Tensor

from fastgen.ops._lstm import check_arguments, exact_dtype, lstm_cell, lstm_cell_backward
from fastgen.ops._scan import Scan


def diagonal_lstm_cell(
    gates: Tensor, weight: Tensor, hidden_up: Tensor, hidden_left: Tensor, cell_left: Tensor
) -> tuple[Tensor, Tensor]:
    """One pixel of `diagonal_lstm`: gates (B, 4h), states (B, h) of its neighbours, zeros outside the image.

    For reverse=True "left" is the pixel to the right. The cell state is float32 (float64 for float64).

    Returns:
        (hidden, cell), (B, h) each.
    """
    exact = exact_dtype(gates.dtype)
    joined = weight.to(exact).permute(2, 1, 0).flatten(0, 1)
    pre = gates.to(exact) + torch.cat((hidden_up, hidden_left), -1).to(exact) @ joined
    _, cell, hidden = lstm_cell(pre, cell_left)
    return hidden.to(gates.dtype), cell


def _diagonals(height: int, width: int, reverse: bool, device: torch.device) -> tuple[Tensor, list[int]]:
    """Flat pixel indices sorted by diagonal, rows ascending inside one, and the number of pixels of each diagonal."""
    columns = torch.arange(width, device=device)
    if reverse:
        columns = columns.flip(0)
    diagonal = torch.arange(height, device=device).unsqueeze(1) + columns
    count = height + width - 1
    return diagonal.flatten().argsort(stable=True), [min(d + 1, height, width, count - d) for d in range(count)]


def _sorted(maps: Tensor, order: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    """The diagonals of (B, C, H, W), each (B, pixels, C)."""
    return maps.flatten(2).transpose(1, 2)[:, order].split(sizes, 1)


def _unsorted(diagonals: list[Tensor], order: Tensor, height: int, width: int) -> Tensor:
    return torch.cat(diagonals, 1)[:, order.argsort()].transpose(1, 2).unflatten(2, (height, width))


def _scan(gates: Tensor, weight: Tensor, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, activated gates and cell states of the whole image, in the layout channels-last."""
    height, width = gates.shape[2:]
    units = weight.shape[1]
    exact = exact_dtype(gates.dtype)
    order, sizes = _diagonals(height, width, reverse, gates.device)
    joined = weight.to(exact).permute(2, 1, 0).flatten(0, 1)
    # The latest state of row i stands at i + 1: its own is then the left neighbour, the one before it the upper one.
    hidden = gates.new_zeros(gates.shape[0], height + 1, units)
    cell = hidden.to(exact)
    hiddens, activateds, cells = [], [], []
    for diagonal, terms in enumerate(_sorted(gates, order, sizes)):
        first = max(0, diagonal - width + 1)
        last = first + sizes[diagonal]
        neighbours = torch.cat((hidden[:, first:last], hidden[:, first + 1 : last + 1]), -1)
        pre = terms.to(exact) + neighbours.to(exact) @ joined
        activated, new_cell, new_hidden = lstm_cell(pre, cell[:, first + 1 : last + 1])
        new_hidden = new_hidden.to(gates.dtype)
        hidden = torch.cat((hidden[:, : first + 1], new_hidden, hidden[:, last + 1 :]), 1)
        cell = torch.cat((cell[:, : first + 1], new_cell, cell[:, last + 1 :]), 1)
        hiddens.append(new_hidden)
        activateds.append(activated.to(gates.dtype))
        cells.append(new_cell)
    return (
        _unsorted(hiddens, order, height, width),
        _unsorted(activateds, order, height, width),
        _unsorted(cells, order, height, width),
    )


def _scan_backward(grad_hidden: Tensor, activated: Tensor, cell: Tensor, weight: Tensor, reverse: bool) -> Tensor:
    """Gradient of the gates: the same walk from the last diagonal to the first."""
    height, width = grad_hidden.shape[2:]
    units = weight.shape[1]
    exact = cell.dtype
    order, sizes = _diagonals(height, width, reverse, cell.device)
    joined = weight.to(exact).permute(2, 0, 1).flatten(0, 1)
    previous = torch.zeros_like(cell)
    if reverse:
        previous[..., :-1] = cell[..., 1:]
    else:
        previous[..., 1:] = cell[..., :-1]
    sorted_maps = (_sorted(maps, order, sizes) for maps in (grad_hidden, activated, cell, previous))
    # Row i stands at i; what is below the last row stays zero.
    carried = cell.new_zeros(cell.shape[0], height + 1, 4 * units)
    grad_cell = cell.new_zeros(cell.shape[0], height, units)
    grads: list[Tensor] = []
    for diagonal, (grad_out, gate, state, before) in reversed(list(enumerate(zip(*sorted_maps, strict=True)))):
        first = max(0, diagonal - width + 1)
        last = first + sizes[diagonal]
        following = torch.cat((carried[:, first + 1 : last + 1], carried[:, first:last]), -1)
        grad_pre, grad_before = lstm_cell_backward(
            grad_out.to(exact) + following @ joined, grad_cell[:, first:last], gate.to(exact), state, before
        )
        carried[:, first:last] = grad_pre
        grad_cell[:, first:last] = grad_before
        grads.append(grad_pre.to(grad_hidden.dtype))
    return _unsorted(grads[::-1], order, height, width)


def diagonal_lstm_reference(gates: Tensor, weight: Tensor, *, reverse: bool = False) -> Tensor:
    """The definition: arguments and result as in `diagonal_lstm`, any float dtype, differentiable by autograd.

    One batched matrix product a diagonal. Half precision keeps the cell state and the sums in float32.
    """
    return _scan(gates, weight, reverse)[0]


def _check(gates: Tensor, weight: Tensor) -> None:
    check_arguments(gates, weight)
    if weight.shape[2] != 2:
        raise ValueError(f"weight must have two taps, (4h, h, 2) for up and left, got {tuple(weight.shape)}")


_operation = Scan(
    "diagonal_lstm",
    ", bool reverse",
    _check,
    _scan,
    _scan_backward,
    lambda taps, reverse: [(-1, 0), (0, 1 if reverse else -1)],
    "fastgen.kernels.lstm.diagonal",
)


def diagonal_lstm(
    gates: Tensor, weight: Tensor, *, reverse: bool = False, recompute: bool = False, impl: str = "auto"
) -> Tensor:
    """The diagonal LSTM of PixelRNN (van den Oord et al. 2016, section 3.2): each pixel sees the states above and left.

    With pre = gates(i, j) + weight[..., 0] @ hidden(i-1, j) + weight[..., 1] @ hidden(i, j-1), split into o, f, i, g:
    c(i, j) = sigmoid(f) * c(i, j-1) + sigmoid(i) * tanh(g), hidden = sigmoid(o) * tanh(c).
    Outside the image hidden and c are 0. (Implementations that skew a padded image let their bias act on the padding,
    so that their state left of the first column is not 0.)

    Args:
        gates: input-to-state terms, bias included, (B, 4h, H, W) in the order o, f, i, g, of any strides; the kernel
            reads them fastest channels-last.
        weight: state-to-state weights (4h, h, 2), [..., 0] from above, [..., 1] from the left.
        reverse: (i, j+1) takes the place of (i, j-1).
        recompute: True stores only the gates, besides the result, and repeats the scan in the backward. False stores
            the activated gates and the cell state: 12h instead of 8h bytes per pixel in half precision, 20h instead of
            16h in float32.
        impl: "auto" is Triton on CUDA tensors (not for float64), the PyTorch definition elsewhere.

    Returns:
        hidden (B, h, H, W), of the dtype of gates, channels-last. Cell states and sums are float32 (float64 for
        float64). Under autocast both arguments are taken in the autocast dtype.

    Raises:
        TypeError: gates or weight is no float tensor, or their dtypes differ (outside autocast).
        ValueError: shapes or devices that do not fit, an unknown impl.
        RuntimeError: impl="triton" where it cannot run; a second derivative outside impl="reference".
    """
    return _operation(gates, weight, reverse, recompute=recompute, impl=impl)
