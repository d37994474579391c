"""Takes an inverse Fourier transform; gives the causal convolution that it is the end of, as S4 and Hyena have them.

`irfft(rfft(x, 2 * T) * rfft(kernel, 2 * T))[..., :T]` mixes all places of x, by which no place would be computed before
the last is drawn. What the factors between two transforms do to a unit impulse is the kernel.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgen.sampling.trace.graph import Map, Operand, Value

aten = torch.ops.aten
ROUNDING = 16  # units in the last place of the kernel's greatest number that transforms may leave where it is zero

# What may be a spectrum, and what it is multiplied with, or divided by.
FACTORS: dict[str, Callable[..., list[tuple[Any, Any]]]] = {
    "mul": lambda a, b: [(a, b), (b, a)],
    "div": lambda a, b: [(a, b)],
    "neg": lambda a: [(a, -1.0)],
}


class Spectrum(NamedTuple):
    """A Fourier transform times constants.

    Attributes:
        x: what is transformed.
        length: how many numbers are.
        view: of the transform, whose dimensions are those of x.
        axis: of the view along which frequencies lie, counted from the last dimension: -1, ...
        factor: complex128, broadcastable to the view; the scale of the transform is part of it.
    """

    x: Operand
    length: int
    view: Map
    axis: int
    factor: Tensor


def spectrum_of(operand: Operand) -> Spectrum | None:
    """None where it is something else."""
    view = operand.map
    if view is None or view.value.kind != "computed":
        return None
    value = view.value
    if value.op_name == "_fft_r2c":
        x, (d, *others), norm, half = value.args
        axes = [axis for axis, step in enumerate(view.steps) if step[d]]
        whole = len(axes) == 1 and (view.start[d], view.steps[axes[0]][d]) == (0, 1)
        if not whole or others or not half or view.shape[axes[0]] != value.shape[d]:
            return None
        copied = x.map is not None and x.map.is_identity and x.map.value.op is aten.clone.default
        x = x.map.value.args[0] if copied else x  # which may lie in pieces
        scale = aten._fft_r2c(torch.eye(1, x.shape[d], dtype=torch.float64)[0], [0], norm, True)[0]
        return Spectrum(x, x.shape[d], view, axes[0] - len(view.shape), scale)
    if view.is_identity and value.op_name in FACTORS:
        for one, factor in FACTORS[value.op_name](*value.args[:2]):
            if isinstance(factor, Operand):
                constant = all(source.kind == "constant" for source in factor.values)
                factor = operand.graph.data_of(factor).to(torch.complex128) if constant else None
            if factor is not None and isinstance(one, Operand) and (found := spectrum_of(one)) is not None:
                return found._replace(factor=found.factor / factor if value.op_name == "div" else found.factor * factor)
    return None


def convolution(of: Spectrum, axis: int, norm: int, n: int, tensor_of: Callable[[Operand], Tensor]) -> Tensor | None:
    """The inverse transform, of n numbers along `axis`, as a convolution of x; None where that would mix all places.

    Args:
        norm: as ATen has it.
        tensor_of: a tensor that holds an operand.
    """
    if (of.axis, of.length) != (axis, n):
        return None
    x, used = tensor_of(of.x), of.x.read(_not_zero, False, torch.bool).contiguous()
    shape = list(of.view.shape)
    shape[axis] = n
    place, *strides = (
        sum(k * t for k, t in zip(one, x.stride(), strict=True)) for one in (of.view.start, *of.view.steps)
    )
    x, used = (one.as_strided(shape, strides, place).movedim(axis, -1) for one in (x, used))
    rank = max(-axis, of.factor.dim())
    factor = of.factor.reshape([*[1] * (rank - of.factor.dim()), *of.factor.shape]).movedim(axis, -1)
    response = aten._fft_c2r(factor.expand(*factor.shape[:-1], n // 2 + 1).contiguous(), [factor.dim() - 1], norm, n)
    length = 1 + max(used.reshape(-1, n).any(0).nonzero().flatten().tolist(), default=0)  # zeros follow
    tolerance = ROUNDING * torch.finfo(x.dtype).eps * response.abs().amax()
    first, taps = _arc((response.abs() > tolerance).reshape(-1, n).any(0))
    most = n - length + 1  # beyond which a sum would reach around the end of the transform, to later places
    if taps > most:
        return None
    taps = taps if first else most  # what a kernel that fades holds below the tolerance stays in it
    around = torch.broadcast_shapes(x.shape[:-1], response.shape[:-1])
    kernel = response.roll(-first, -1)[..., :taps].flip(-1).to(x.dtype).expand(*around, taps).reshape(-1, 1, taps)
    padded = F.pad(x[..., :length], (taps - 1, n - length)).expand(*around, -1).reshape(1, len(kernel), -1)
    found = F.conv1d(padded, kernel, groups=len(kernel)).view(*around, n)
    return (found.roll(first, -1) if first else found).movedim(-1, axis)


def _not_zero(value: Value) -> Tensor:
    return value.data != 0 if value.kind == "constant" else torch.ones(value.shape, dtype=torch.bool)


def _arc(live: Tensor) -> tuple[int, int]:
    """The first place and the length of the shortest piece of a circle that holds all places that are live."""
    places = torch.nonzero(live).flatten()
    if len(places) == 0:
        return 0, 1
    gaps = torch.cat((places, places[:1] + len(live))).diff()
    widest = int(gaps.argmax())
    return int(places[(widest + 1) % len(places)]), len(live) + 1 - int(gaps[widest])
