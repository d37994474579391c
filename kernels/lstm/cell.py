"""What the scans of the diagonal and the Row LSTM share: the cell, matrix products, loads and stores of its maps.

A tile is (M, U): M pixels, whose places are `image`, `row` and `x`, and U units `u`. Four tiles are those of the gates
o, f, i, g. Arguments that the kernels of this folder share:

    gates_ptr        input-to-state terms (B, 4h, H, W), of any strides (gates_..._stride)
    weight_ptr       state-to-state weights, contiguous, in an order that each kernel chooses
    hidden_ptr       hidden states (B, H, W, h), contiguous
    activated_ptr    gates after their activations (B, H, W, 4h), contiguous
    cell_ptr         cell states (B, H, W, h), float32, contiguous
                     The forward writes these three, the last two to train only: else they are None.
    grad_hidden_ptr  gradient of the hidden states (B, h, H, W), of any strides (grad_..._stride)
    grad_gates_ptr   gradient of the gates before their activations (B, H, W, 4h), contiguous, which the backward writes
    batch, height, width, units, taps    B, H, W, h, and the neighbours whose states a pixel takes
    steps            of a program, over all of its images
    PRECISION, FAST  of `choice.arithmetic`; the sizes of tiles are those of `choice.ScanLaunch` and `TileLaunch`
"""

import triton
import triton.language as tl

from fastgen.kernels.common import tanh


@triton.jit
def sigmoid(x, FAST: tl.constexpr):
    if FAST:
        return 0.5 + 0.5 * tanh(0.5 * x, FAST)
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def gates_of(sums, M: tl.constexpr, U: tl.constexpr):
    """Products (4U, M), whose rows count units and the four gates of each, as four tiles (M, U).

    Weights are the left factor, so that these tiles come out in the layout of loads and stores: nothing is converted
    but the sums, once.
    """
    pairs = tl.permute(tl.reshape(sums, (U, 2, 2, M)), (3, 0, 1, 2))
    o_i, f_g = tl.split(pairs)
    o, i = tl.split(o_i)
    f, g = tl.split(f_g)
    return o, f, i, g


@triton.jit
def joined_gates(gates, M: tl.constexpr, U: tl.constexpr):
    """Four tiles (M, U) as one (M, 4U), whose columns count units and the four gates of each."""
    o, f, i, g = gates
    return tl.reshape(tl.join(tl.join(o, i), tl.join(f, g)), (M, 4 * U))


@triton.jit
def add_gates(terms, sums):
    """The gates before their activations, in float32: input-to-state terms and sums over states."""
    o, f = terms[0].to(tl.float32) + sums[0], terms[1].to(tl.float32) + sums[1]
    i, g = terms[2].to(tl.float32) + sums[2], terms[3].to(tl.float32) + sums[3]
    return o, f, i, g


@triton.jit
def cell_forward(gates, cell, FAST: tl.constexpr):
    """Gates before their activations and the previous cell state -> activated gates, cell state, hidden state."""
    o, f = sigmoid(gates[0], FAST), sigmoid(gates[1], FAST)
    i, g = sigmoid(gates[2], FAST), tanh(gates[3], FAST)
    cell = f * cell + i * g
    return (o, f, i, g), cell, o * tanh(cell, FAST)


@triton.jit
def cell_backward(grad_hidden, grad_cell, gates, cell, previous, FAST: tl.constexpr):
    """Gradients of the four gates before their activations, and of the previous cell state."""
    o, f, i, g = gates
    squashed = tanh(cell, FAST)
    grad_cell += grad_hidden * o * (1.0 - squashed * squashed)
    grad_o = grad_hidden * squashed * o * (1.0 - o)
    grad_f = grad_cell * previous * f * (1.0 - f)
    grad_i = grad_cell * g * i * (1.0 - i)
    grad_g = grad_cell * i * (1.0 - g * g)
    return (grad_o, grad_f, grad_i, grad_g), grad_cell * f


@triton.jit
def widened(gates):
    o, f, i, g = gates
    return o.to(tl.float32), f.to(tl.float32), i.to(tl.float32), g.to(tl.float32)


@triton.jit
def load_weights(weight_ptr, row, real, units, PARTS: tl.constexpr, U: tl.constexpr):
    """Rows `row` of a matrix of PARTS * units columns, each part padded to U columns; zeros where `real` is false."""
    k = tl.arange(0, PARTS * U)
    at = weight_ptr + row[:, None] * (PARTS * units) + (k // U * units + k % U)[None, :]
    return tl.load(at, real[:, None] & (k % U < units)[None, :], other=0.0)


@triton.jit
def offsets(strides, image, row, x, u):
    """Of a tile (M, U) in a map (B, units, H, W) of any strides, in 64 bits."""
    at = image.to(tl.int64) * strides[0] + row.to(tl.int64) * strides[2] + x.to(tl.int64) * strides[3]
    return at[:, None] + u.to(tl.int64)[None, :] * strides[1]


@triton.jit
def load_gates(at, unit_stride, units, mask):
    """Four tiles. `at` points to that of o; those of f, i and g lie `units` channels behind each other."""
    gate = tl.full((), 1, tl.int64) * units * unit_stride
    o = tl.load(at, mask, other=0.0)
    f = tl.load(at + gate, mask, other=0.0)
    i = tl.load(at + 2 * gate, mask, other=0.0)
    g = tl.load(at + 3 * gate, mask, other=0.0)
    return o, f, i, g


@triton.jit
def store_gates(at, units, gates, mask):
    kind: tl.constexpr = at.dtype.element_ty
    tl.store(at, gates[0].to(kind), mask)
    tl.store(at + units, gates[1].to(kind), mask)
    tl.store(at + 2 * units, gates[2].to(kind), mask)
    tl.store(at + 3 * units, gates[3].to(kind), mask)


@triton.jit
def load_terms(gates_ptr, strides, units, image, row, x, active, u):
    """The input-to-state terms of the four gates at `active` pixels."""
    at = gates_ptr + offsets(strides, image, row, x, u)
    return load_gates(at, strides[1], units, active[:, None] & (u < units)[None, :])


@triton.jit
def load_saved(maps, strides, units, image, row, x, pixel, to_previous, has_previous, cell, is_first, active, u):
    """What the backward reads at `active` pixels besides the gradients that it carries.

    Args:
        maps: grad_hidden_ptr, of those strides, activated_ptr and cell_ptr.
        to_previous: offset, in pixels, of the pixel whose cell state this one took, if it `has_previous`.
        cell: cell states that are known already; those of pixels that `is_first` marks are loaded.

    Returns:
        Gradient of the hidden state, cell state, previous cell state, the four activated gates.
    """
    mask = active[:, None] & (u < units)[None, :]
    at = pixel[:, None] * units + u[None, :]
    grad_hidden = tl.load(maps[0] + offsets(strides, image, row, x, u), mask, other=0.0)
    cell = tl.load(maps[2] + at, mask & is_first[:, None], other=cell)
    previous = tl.load(maps[2] + at + to_previous * units, mask & has_previous[:, None], other=0.0)
    o, f, i, g = load_gates(maps[1] + pixel[:, None] * (4 * units) + u[None, :], 1, units, mask)
    return grad_hidden, cell, previous, o, f, i, g
