"""The masked convolution forward and backward: what runs, in which order.

Forward: one kernel packs the weights, and one computes the product and all that follows it. Backward: through an
activation a pass computes the gradient of the sums from that of the result; then come the gradient of the input
(packing, one product) and those of weight and bias (one product, one kernel that adds shares). The work and traffic of
a layer are counted in benchmarks/cases/masked_conv2d.py.

The kernels read maps that are dense and channels-last; others are copied. The first call with some shapes, strides,
dtypes and mask plans what runs; later calls look the plan up.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgen.kernels.common import cdiv
from fastgen.kernels.maps import result_size
from fastgen.kernels.masked_conv2d import check
from fastgen.kernels.masked_conv2d.backward import masked_conv2d_activation_backward_kernel
from fastgen.kernels.masked_conv2d.config import precision_of
from fastgen.kernels.masked_conv2d.layout import Launches, as_map, channels_last, unit_of
from fastgen.kernels.masked_conv2d.products import Convolve, WeightGradient, Weights, products_of
from fastgen.kernels.masked_conv2d.walk import Geometry, known_walk, refuse_in_capture, seen_walk

MAX_PIXELS = 2**31 - 2**25  # pixels are counted in 32 bits, with room for the last blocks; offsets in 64
CALLS = 4096  # kinds of calls that are kept; beyond, all are planned anew

Pairs = tuple[tuple[int, int], ...]  # stride, padding, dilation
Tensors = tuple[Tensor | None, ...]


class Call(NamedTuple):
    """The plan of calls of one kind. copies: the places of tensors that the kernels cannot read as they lie, and what
    copies them. gradients: the plans of the gradients of calls of this kind."""

    run: Callable[..., Any]
    copies: list[tuple[int, Callable[[Tensor], Tensor]]]
    gradients: dict[Any, "Call"]


Calls = dict[Any, Call]
_calls: Calls = {}


def forget() -> None:
    """Drops all plans and all results of checks; for tests, and after a search."""
    _calls.clear()
    check._trusted.clear()


def as_weight(weight: Tensor) -> Tensor:
    """Contiguous, or channels-last."""
    return weight if weight.is_contiguous(memory_format=torch.channels_last) else weight.contiguous()


READ = (as_map, as_weight, Tensor.contiguous, Tensor.contiguous, Tensor.contiguous, as_map, as_map, Tensor.contiguous)
READ_BACKWARD = (as_map, as_map, as_map, as_weight, Tensor.contiguous, as_map, as_map, as_map, Tensor.contiguous)


def laid_out(tensors: Tensors, copies: Sequence[tuple[int, Callable[[Tensor], Tensor]]]) -> list[Any]:
    copied: list[Any] = list(tensors)
    for place, copy in copies:
        copied[place] = copy(copied[place])
    return copied


def kinds_of(tensors: Tensors) -> list[Any]:
    """What a call is planned for, of each tensor."""
    return [t if t is None else (t.shape, t.stride(), t.dtype, t.device, t.data_ptr() % 16) for t in tensors]


def _new_call(calls: Calls, key: Any, x: Tensor, tensors: Tensors, reads: Sequence[Any], make: Any) -> Call:
    """make: of tensors that lie as they must, what runs for such."""
    refuse_in_capture(x, "chooses what runs the first time that it sees a shape, and cannot do so", "this shape")
    pairs = enumerate(zip(tensors, reads, strict=True))
    copies = [(i, read) for i, (t, read) in pairs if t is not None and read(t) is not t]
    if len(calls) >= CALLS:
        calls.clear()
    call = calls[key] = Call(make(*laid_out(tensors, copies)), copies, {})
    return call


# --- the result


def forward(
    x: Tensor, weight: Tensor, mask: Tensor | None, bias: Tensor | None, condition: Tensor | None,
    residual: Tensor | None, other: Tensor | None, other_weight: Tensor | None,
    geometry: Pairs, activation: str, keep: str, check_all: Callable[..., None] | None = None,
) -> tuple[Tensor, Tensor | None, Calls]:  # fmt: skip
    """activation(conv(x, weight) + conv1x1(other, other_weight) + bias + condition), without an activation + residual,
    what is kept, and plans for `backward`.

    x (B, I, H, W), weight (O, I, kh, kw), bias (O,), condition (B, O), residual like the result, other (B, C, H', W'),
    other_weight (O, C, 1, 1). keep: "", or with a gate "valve" (the second half's input) or "both" halves'; the second
    result is None for "". check_all: is called with the tensors, geometry and activation before another kind of call is
    planned, or another mask is read.

    Raises:
        ValueError: more than MAX_PIXELS pixels: split the batch.
    """
    tensors: Any = (x, weight, mask, bias, condition, residual, other, other_weight)
    parts = 2 if activation == "gated" else 1
    kind = (geometry, activation, keep, precision_of(x.device, x.dtype), *kinds_of(tensors))
    call = _calls.get((seen_walk(mask, weight.shape, parts), kind))
    if call is None:
        if check_all is not None:
            check_all(*tensors, geometry, activation)
        walk = known_walk(mask, weight.shape, parts)

        def make(x: Tensor, weight: Tensor, *rest: Tensor | None) -> Any:
            height, width = result_size(x, weight, geometry)
            if x.shape[0] * max(height * width, x.shape[2] * x.shape[3]) > MAX_PIXELS:
                raise ValueError(f"x has more than {MAX_PIXELS} pixels, {tuple(x.shape)}: split the batch")
            size, weights = (weight.shape[0] // walk.parts, height, width), Weights.of(weight, walk, geometry)
            planned = partial(Convolve, weights=weights, size=size, activation=activation, keep=keep)
            return check.tried(planned, x, weight, *rest)

        key = (walk, kind)
        call = _calls.get(key) or _new_call(_calls, key, x, tensors, READ, make)
    if call.copies:
        tensors = laid_out(tensors, call.copies)
    out, kept = call.run(*tensors)
    return out, kept if keep else None, call.gradients


# --- the gradients


class Backward:
    """The gradients of one kind of call; constructed with the tensors of the first.

    Attributes:
        passes: the launches of the pass through the activation, or None without one.
        x_gradient, weight_gradient, other_gradient, other_weight_gradient: the products for what is wanted, else None.
    """

    passes: Any = None
    x_gradient: Any = None
    weight_gradient: Any = None
    other_gradient: Any = None
    other_weight_gradient: Any = None

    def __init__(
        self, grad, grad_pre, x, weight, mask, out, kept, other, other_weight, walk, geometry, saved, wanted
    ) -> None:
        wants_x, wants_weight, self.wants_bias, self.wants_condition, wants_other, wants_other_weight = wanted
        batch, rows, height, width = grad.shape
        self.saved, sums = saved, grad
        if saved != "none":
            self.layout = channels_last(batch, walk.parts * rows, height, width)
            sums = grad.new_empty_strided(*self.layout)
            unit, pixels, (high, wide) = (
                unit_of(grad, rows),
                batch * height * width,
                (32, 64) if rows > 32 else (128, 16),
            )
            self.passes = Launches(
                masked_conv2d_activation_backward_kernel, (cdiv(pixels, high), cdiv(rows, wide)),
                (pixels, rows // unit), SAVED=saved, UNIT=unit, PIXELS=high, ROWS=wide,
            )  # fmt: skip
        weights = Weights.of(weight, walk, geometry)
        if wants_weight:
            make: Any = partial(WeightGradient, weights=weights, adds_up=self.wants_bias)
            self.weight_gradient = check.tried(make, sums, x, weight, mask)
        if wants_x:
            make = partial(Convolve, weights=weights, size=tuple(x.shape[1:]), mirrored=True)
            self.x_gradient = check.tried(make, sums, weight, mask)
        if other is not None:
            pointwise = Weights.pointwise(other_weight, walk.parts)
            if wants_other:
                make = partial(Convolve, weights=pointwise, size=tuple(other.shape[1:]), mirrored=True)
                self.other_gradient = check.tried(make, sums, other_weight, mask)
            if wants_other_weight:
                make = partial(WeightGradient, weights=pointwise, adds_up=False)
                self.other_weight_gradient = check.tried(make, sums, other, other_weight, mask)

    def __call__(self, grad, grad_pre, x, weight, mask, out, kept, other, other_weight) -> list[Tensor | None]:
        sums = grad
        if self.passes is not None:
            sums = grad.new_empty_strided(*self.layout)
            self.passes(grad, grad_pre, kept if self.saved == "both" else out, kept, sums)
        gradients: list[Tensor | None] = [None] * 6
        if self.x_gradient is not None:
            gradients[0] = self.x_gradient(sums, weight, mask)[0]
        if self.weight_gradient is not None:
            gradients[1], gradients[2] = self.weight_gradient(sums, x, weight, mask)
        elif self.wants_bias:
            gradients[2] = sums.sum((0, 2, 3))
        if self.wants_condition:
            gradients[3] = sums.sum((2, 3))
        if self.other_gradient is not None:
            gradients[4] = self.other_gradient(sums, other_weight, mask)[0]
        if self.other_weight_gradient is not None:
            gradients[5] = self.other_weight_gradient(sums, other, other_weight, mask)[0]
        return gradients


def backward(
    grad: Tensor | None, grad_pre: Tensor | None, x: Tensor, weight: Tensor, mask: Tensor | None, out: Tensor | None,
    kept: Tensor | None, other: Tensor | None, other_weight: Tensor | None, geometry: Pairs, saved: str,
    wanted: tuple[bool, ...], known: Calls | None = None,
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of x, weight, bias, condition, other and other_weight, as `wanted`; the rest are None.

    grad: of the result, grad_pre: of the sums where these were kept and used; one is not None. saved: what the forward
    kept, or its activation where it kept nothing. out: the result, read for "relu" and "valve". known: what the call of
    `forward` with these tensors returned.
    """
    if grad is None:
        assert grad_pre is not None, "autograd asks for no gradient of nothing"
        grad, grad_pre, saved = grad_pre, None, "none"
    tensors: Any = (grad, grad_pre, x, weight, mask, out, kept, other, other_weight)
    parts = 2 if saved in ("valve", "both") else 1
    # What was saved may come back with other strides: hooks on saved tensors copy it.
    strides = [t if t is None else t.stride() for t in (x, out, kept, other)]
    key: Any = (saved, wanted, precision_of(x.device, x.dtype), *strides, *kinds_of((weight, grad, grad_pre)))
    calls = known
    if calls is None:
        calls, key = _calls, (key, geometry, known_walk(mask, weight.shape, parts), *kinds_of(tensors))
    call = calls.get(key)
    if call is None:
        walk = known_walk(mask, weight.shape, parts)
        make = partial(Backward, walk=walk, geometry=geometry, saved=saved, wanted=wanted)
        call = _new_call(calls, key, x, tensors, READ_BACKWARD, make)
    if call.copies:
        tensors = laid_out(tensors, call.copies)
    return call.run(*tensors)


def explain(x: Tensor, weight: Tensor, mask: Tensor | None, geometry: Geometry, activation: str) -> str:
    """A line a product of a layer: what will run and why."""
    names = {"out": "result", "in": "gradient of the input", "weight": "gradient of the weight"}
    lines = []
    planned = products_of(as_map(x), as_weight(weight), mask, geometry, activation, "")
    for direction, (make, tensors) in planned.items():
        product = make(*tensors)
        provider, tile, why = product.choice
        if provider == "triton" and check._trusted.get(check.key_of(product, x)) is False:
            provider, why = "cropped", check.FAILED
        runs = f"triton, {tile}" if provider == "triton" else f"cuDNN, {provider}"
        lines.append(f"{names[direction]}: {runs} ({why})")
    return "\n".join(lines)
