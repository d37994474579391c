"""What the scans of the diagonal and the Row LSTM share: the cell forward and backward, matrix products."""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x, FAST: tl.constexpr):
    if FAST:
        return 0.5 + 0.5 * tanh(0.5 * x, FAST)
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x, FAST: tl.constexpr):
    """FAST: one instruction of NVIDIA's special function unit, to 2^-11. Else to float32's precision, also near 0."""
    if FAST:
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    size = tl.abs(x)
    e = tl.exp(-2.0 * size)
    far = (1.0 - e) / (1.0 + e)
    q = x * x
    near = x * (1.0 + q * (-1 / 3 + q * (2 / 15 + q * (-17 / 315 + q * (62 / 2835 + q * (-1382 / 155925))))))
    return tl.where(size < 0.3, near, tl.where(x < 0, -far, far))


@triton.jit
def product(a, b, accumulator, PRECISION: tl.constexpr):
    """The interpreter multiplies bfloat16 wrongly: the precision "float32" widens first."""
    if PRECISION == "float32":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="ieee")
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def cell_forward(o, f, i, g, cell, FAST: tl.constexpr):
    """Gates before their activations and the previous cell state -> activated gates, cell state, hidden state."""
    o, f, i, g = sigmoid(o, FAST), sigmoid(f, FAST), sigmoid(i, FAST), tanh(g, FAST)
    cell = f * cell + i * g
    return o, f, i, g, cell, o * tanh(cell, FAST)


@triton.jit
def cell_backward(grad_hidden, grad_cell, o, f, i, g, cell, previous, FAST: tl.constexpr):
    """Gradients of the four gates before their activations, and of the previous cell state."""
    squashed = tanh(cell, FAST)
    grad_cell += grad_hidden * o * (1.0 - squashed * squashed)
    grad_o = grad_hidden * squashed * o * (1.0 - o)
    grad_f = grad_cell * previous * f * (1.0 - f)
    grad_i = grad_cell * g * i * (1.0 - i)
    grad_g = grad_cell * i * (1.0 - g * g)
    return grad_o, grad_f, grad_i, grad_g, grad_cell * f


@triton.jit
def load_gates(at, unit_stride, units, mask):
    """The tiles of o, f, i, g; `at` points to those of o, gates lie `units` channels apart."""
    gate = tl.full((), 1, tl.int64) * units * unit_stride
    o = tl.load(at, mask, other=0.0)
    f = tl.load(at + gate, mask, other=0.0)
    i = tl.load(at + 2 * gate, mask, other=0.0)
    g = tl.load(at + 3 * gate, mask, other=0.0)
    return o, f, i, g


@triton.jit
def widened(gates):
    o, f, i, g = gates
    return o.to(tl.float32), f.to(tl.float32), i.to(tl.float32), g.to(tl.float32)


@triton.jit
def offsets(image, row, column, image_stride, row_stride, column_stride, u, unit_stride):
    """(M, U), in 64 bits, of a map of any strides."""
    at = image.to(tl.int64) * image_stride + row.to(tl.int64) * row_stride + column.to(tl.int64) * column_stride
    return at[:, None] + u.to(tl.int64)[None, :] * unit_stride


@triton.jit
def store_gates(at, units, o, f, i, g, mask):
    kind: tl.constexpr = at.dtype.element_ty
    tl.store(at, o.to(kind), mask)
    tl.store(at + units, f.to(kind), mask)
    tl.store(at + 2 * units, i.to(kind), mask)
    tl.store(at + 3 * units, g.to(kind), mask)
