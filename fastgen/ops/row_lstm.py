"""The Row LSTM (van den Oord et al. 2016, section 3.1) over a whole image, a row at a time."""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgen.ops._lstm import check_arguments, exact_dtype, lstm_cell, lstm_cell_backward
from fastgen.ops._scan import Scan


def row_lstm_cell(gates: Tensor, weight: Tensor, hidden_above: Tensor, cell_above: Tensor) -> tuple[Tensor, Tensor]:
    """One pixel of `row_lstm`: gates (B, 4h), hidden_above (B, h, k) the states above, cell_above (B, h).

    The k states are centred on the pixel, zeros outside the image. The cell state is float32 (float64 for float64).

    Returns:
        (hidden, cell), (B, h) each.
    """
    exact = exact_dtype(gates.dtype)
    pre = gates.to(exact) + hidden_above.to(exact).flatten(1) @ weight.to(exact).flatten(1).T
    _, cell, hidden = lstm_cell(pre, cell_above)
    return hidden.to(gates.dtype), cell


def _scan(gates: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, activated gates and cell states of the whole image, in the layout channels-last."""
    batch, _, _, width = gates.shape
    units, taps = weight.shape[1:]
    exact = exact_dtype(gates.dtype)
    kernel = weight.to(exact)
    hidden = gates.new_zeros(batch, width, units)
    cell = hidden.to(exact)
    rows = []
    for terms in gates.unbind(2):
        above = F.conv1d(hidden.transpose(1, 2).to(exact), kernel, padding=taps // 2)
        activated, cell, hidden = lstm_cell((terms.to(exact) + above).transpose(1, 2), cell)
        hidden = hidden.to(gates.dtype)
        rows.append((hidden, activated.to(gates.dtype), cell))
    hiddens, activateds, cells = (torch.stack(maps, 1).permute(0, 3, 1, 2) for maps in zip(*rows, strict=True))
    return hiddens, activateds, cells


def _scan_backward(grad_hidden: Tensor, activated: Tensor, cell: Tensor, weight: Tensor) -> Tensor:
    """Gradient of the gates, from the last row to the first."""
    exact = cell.dtype
    taps = weight.shape[2]
    batch, units, height, width = cell.shape
    kernel = weight.to(exact).transpose(0, 1).flip(2)
    from_below = cell.new_zeros(batch, units, width)
    grad_cell = cell.new_zeros(batch, width, units)
    grads: list[Tensor] = []
    for row in reversed(range(height)):
        previous = cell[:, :, row - 1] if row else torch.zeros_like(cell[:, :, 0])
        grad_pre, grad_cell = lstm_cell_backward(
            (grad_hidden[:, :, row].to(exact) + from_below).transpose(1, 2),
            grad_cell,
            activated[:, :, row].to(exact).transpose(1, 2),
            cell[:, :, row].transpose(1, 2),
            previous.transpose(1, 2),
        )
        from_below = F.conv1d(grad_pre.transpose(1, 2), kernel, padding=taps // 2)
        grads.append(grad_pre.to(grad_hidden.dtype))
    return torch.stack(grads[::-1], 1).permute(0, 3, 1, 2)


def row_lstm_reference(gates: Tensor, weight: Tensor) -> Tensor:
    """The definition: arguments and result as in `row_lstm`, any float dtype, differentiable by autograd.

    One 1-d convolution a row. Half precision keeps the cell state and the sums in float32.
    """
    return _scan(gates, weight)[0]


def _check(gates: Tensor, weight: Tensor) -> None:
    check_arguments(gates, weight)
    if weight.shape[2] % 2 == 0:
        raise ValueError(f"weight must have an odd number of taps, (4h, h, k), got {tuple(weight.shape)}")


_operation = Scan(
    "row_lstm",
    "",
    _check,
    _scan,
    _scan_backward,
    lambda taps: [(-1, tap - taps // 2) for tap in range(taps)],
    "fastgen.kernels.lstm.row",
)


def row_lstm(gates: Tensor, weight: Tensor, *, recompute: bool = False, impl: str = "auto") -> Tensor:
    """The Row LSTM of PixelRNN (van den Oord et al. 2016, section 3.1): each pixel sees k states of the row above.

    With pre(i) = gates(i) + conv1d(hidden(i-1), weight, "same" zero padding), split into o, f, i, g:
    c(i, j) = sigmoid(f) * c(i-1, j) + sigmoid(i) * tanh(g), hidden = sigmoid(o) * tanh(c). Above the image both are 0.

    Args:
        gates: input-to-state terms, bias included, (B, 4h, H, W) in the order o, f, i, g, of any strides; the kernel
            reads them fastest channels-last.
        weight: state-to-state weights (4h, h, k), k odd; tap t multiplies the state at column j + t - k // 2.
        recompute: run the scan again in the backward, as in `diagonal_lstm`.
        impl: "auto" is Triton on CUDA tensors (not for float64), the PyTorch definition elsewhere.

    Returns:
        hidden (B, h, H, W), of the dtype of gates, channels-last. Cell states and sums are float32 (float64 for
        float64). Under autocast both arguments are taken in the autocast dtype.

    Raises:
        TypeError: gates or weight is no float tensor, or their dtypes differ (outside autocast).
        ValueError: shapes or devices that do not fit, an even k, an unknown impl.
        RuntimeError: impl="triton" where it cannot run; a second derivative outside impl="reference".
    """
    return _operation(gates, weight, recompute=recompute, impl=impl)
