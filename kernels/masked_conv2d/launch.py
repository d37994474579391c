"""The masked convolution forward and backward: what runs, in which order.

Forward: one kernel packs the weights, and one computes the product and all that follows it. Backward: through an
activation a pass computes the gradient of the sums from that of the result; then come the gradient of the input
(packing, one product) and those of weight and bias (one product, one kernel that adds shares). The work and traffic of
a layer are counted in benchmarks/cases/masked_conv2d.py.

The kernels read maps that are dense and channels-last, at multiples of 16 bytes; others are copied. The first call with
some shapes, dtypes and mask plans what runs; later calls look the plan up.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastgen.kernels.common import Launches, cdiv
from fastgen.kernels.maps import channels_last, empties, result_size
from fastgen.kernels.masked_conv2d import check
from fastgen.kernels.masked_conv2d.backward import masked_conv2d_activation_backward_kernel
from fastgen.kernels.masked_conv2d.config import precision_of
from fastgen.kernels.masked_conv2d.products import Convolve, WeightGradient, products_of, unit_of
from fastgen.kernels.masked_conv2d.walk import known_reading, known_walk, read, refuse_in_capture

MAX_PIXELS = 2**31 - 2**25  # pixels are counted in 32 bits, with room for the last blocks; offsets in 64
PLANS = 4096  # kinds of calls that are kept; beyond, all are planned anew

Pairs = tuple[tuple[int, int], ...]  # stride, padding, dilation
Plans = dict[Any, Any]
Tensors = tuple[Tensor | None, ...]
Reads = Sequence[Callable[[Tensor], Tensor]]
_plans: Plans = {}


def forget() -> None:
    """Drops all plans and all results of checks; for tests, and after a search."""
    _plans.clear()
    check.trusted.clear()


def dense(x: Tensor, order: torch.memory_format = torch.contiguous_format) -> Tensor:
    """In an order of memory, at a multiple of 16 bytes, for which kernels are compiled."""
    x = x.contiguous(memory_format=order)
    return x.clone() if x.data_ptr() % 16 else x


def as_map(x: Tensor) -> Tensor:
    return dense(x, torch.channels_last)


# How tensors must lie.
READ = (as_map, dense, dense, dense, dense, as_map, as_map, dense)
READ_BACKWARD = (as_map, as_map, as_map, dense, dense, as_map, as_map, as_map, dense)


def kinds_of(tensors: Tensors) -> list[Any]:
    """What a call is planned for, of each tensor."""
    return [t if t is None else (t.shape, t.stride(), t.dtype, t.get_device(), t.data_ptr() % 16) for t in tensors]


def laid_out(tensors: Any, copies: list[tuple[int, Callable[[Tensor], Tensor]]]) -> Any:
    """With copies of those tensors, by place, that the kernels cannot read as they lie."""
    for place, copy in copies:
        tensors = (*tensors[:place], copy(tensors[place]), *tensors[place + 1 :])
    return tensors


def planned(plans: Plans, key: Any, tensors: Any, reads: Reads, make: Callable[..., Any]) -> Any:
    """What `make` makes of tensors that lie as they must, kept for calls of this kind, with the copies they need."""
    x = tensors[0]
    refuse_in_capture(x, "chooses what runs the first time that it sees a shape, and cannot do so", "this shape")
    pairs = enumerate(zip(tensors, reads, strict=True))
    copies = [(i, read) for i, (t, read) in pairs if t is not None and read(t) is not t]
    if len(plans) >= PLANS:
        plans.clear()
    with torch.cuda.device(x.get_device()):
        plan = make(*laid_out(tensors, copies))
    plan.copies, plan.device = copies, x.get_device()
    plans[key] = plan
    return plan


def run(plan: Any, tensors: Any) -> Any:
    if plan.copies:
        tensors = laid_out(tensors, plan.copies)
    device = plan.device
    if device >= 0 and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return plan.run(*tensors)
    return plan.run(*tensors)


def forward(
    x: Tensor, weight: Tensor, mask: Tensor | None, bias: Tensor | None, condition: Tensor | None,
    residual: Tensor | None, other: Tensor | None, other_weight: Tensor | None,
    geometry: Pairs, activation: str, keep: str, check_all: Callable[..., None] | None = None,
) -> tuple[Tensor, Tensor | None, Plans]:  # fmt: skip
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
    kinds = kinds_of((x, weight, bias, condition, residual, other, other_weight))
    key = (known_reading(mask), geometry, activation, keep, precision_of(x), *kinds)
    plan = _plans.get(key)
    if plan is None:
        if check_all is not None:
            check_all(*tensors, geometry, activation)
        key = (read(mask), *key[1:])
        plan = _plans.get(key)
    if plan is None:
        walk = known_walk(mask, weight.shape, 2 if activation == "gated" else 1, geometry)
        height, width = result_size(x, weight, geometry)
        if x.shape[0] * max(height * width, x.shape[2] * x.shape[3]) > MAX_PIXELS:
            raise ValueError(f"x has more than {MAX_PIXELS} pixels, {tuple(x.shape)}: split the batch")
        size = weight.shape[0] // walk.parts, height, width
        whole = partial(Convolve, walk=walk, size=size, activation=activation, keep=keep)
        plan = planned(_plans, key, tensors, READ, partial(check.tried, whole))
    out, kept = run(plan, tensors)
    return out, kept, plan.gradients


class Backward:
    """The gradients of one kind of call: a pass through the activation, or none, and the products for what is wanted.
    Constructed with the tensors of the first."""

    def __init__(self, grad, grad_pre, x, weight, mask, out, kept, other, other_weight, *, walk, saved, wanted) -> None:
        wants_x, wants_weight, self.wants_bias, self.wants_condition, wants_other, wants_other_weight = wanted
        batch, rows, height, width = grad.shape
        self.passes, sums = None, grad
        if saved != "none":
            self.new_sums = empties(grad, channels_last(batch, walk.parts * rows, height, width))
            sums, unit, pixels = self.new_sums(), unit_of(grad, rows), batch * height * width
            high, wide = (32, 64) if rows > 32 else (128, 16)
            self.passes = Launches(
                masked_conv2d_activation_backward_kernel, (cdiv(pixels, high), cdiv(rows, wide)),
                (pixels, rows // unit), SAVED=saved, UNIT=unit, PIXELS=high, ROWS=wide,
            )  # fmt: skip

        def pair(x: Tensor, weight: Tensor, walk: Any, wants_x: bool, wants_weight: bool, adds_up: bool) -> list[Any]:
            """The products for the gradients of a map and of a weight."""
            of_weight = partial(WeightGradient, walk=walk, adds_up=adds_up), (sums, x, weight, mask)
            of_x = partial(Convolve, walk=walk, size=x.shape[1:], mirrored=True), (sums, weight, mask)
            makes = ((wants_x, *of_x), (wants_weight, *of_weight))
            return [check.tried(make, *tensors) if wanted else None for wanted, make, tensors in makes]

        self.x, self.weight = pair(x, weight, walk, wants_x, wants_weight, self.wants_bias)
        self.other = self.other_weight = None
        if other is not None:
            pointwise = known_walk(None, other_weight.shape, walk.parts)
            wants = wants_other, wants_other_weight, False
            self.other, self.other_weight = pair(other, other_weight, pointwise, *wants)

    def run(self, grad, grad_pre, x, weight, mask, out, kept, other, other_weight) -> list[Tensor | None]:
        sums = grad
        if self.passes is not None:
            sums = self.new_sums()
            self.passes.start(grad, grad_pre, out, kept, sums)
        of_weight, of_bias = (None, None) if self.weight is None else self.weight.run(sums, x, weight, mask)
        return [
            self.x and self.x.run(sums, weight, mask)[0],
            of_weight,
            sums.sum((0, 2, 3)) if self.wants_bias and of_bias is None else of_bias,
            sums.sum((2, 3)) if self.wants_condition else None,
            self.other and self.other.run(sums, other_weight, mask)[0],
            self.other_weight and self.other_weight.run(sums, other, other_weight, mask)[0],
        ]


def backward(
    grad: Tensor | None, grad_pre: Tensor | None, x: Tensor, weight: Tensor, mask: Tensor | None, out: Tensor | None,
    kept: Tensor | None, other: Tensor | None, other_weight: Tensor | None, geometry: Pairs, saved: str,
    wanted: tuple[bool, ...], plans: Plans | None = None,
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of x, weight, bias, condition, other and other_weight, as `wanted`; the rest are None.

    grad: of the result, grad_pre: of the sums where these were kept and used; one is not None. saved: what the forward
    kept, or its activation where it kept nothing. out: the result, read unless saved is "none". plans: what the call of
    `forward` with these tensors returned.
    """
    if grad is None:
        assert grad_pre is not None, "autograd asks for no gradient of nothing"
        grad, grad_pre, saved = grad_pre, None, "none"
    tensors: Any = (grad, grad_pre, x, weight, mask, out, kept, other, other_weight)
    # What was saved may come back with other strides: hooks on saved tensors copy it.
    key: Any = (saved, wanted, precision_of(x), *[t if t is None else (t.stride(), t.data_ptr() % 16) for t in tensors])
    if plans is None:
        plans, key = _plans, (key, geometry, read(mask), *kinds_of((grad, grad_pre, x, weight, other, other_weight)))
    plan = plans.get(key)
    if plan is None:
        walk = known_walk(mask, weight.shape, 2 if saved in ("valve", "both") else 1, geometry)
        plan = planned(plans, key, tensors, READ_BACKWARD, partial(Backward, walk=walk, saved=saved, wanted=wanted))
    return run(plan, tensors)


def explain(x: Tensor, weight: Tensor, mask: Tensor | None, geometry: Pairs, activation: str) -> str:
    """A line a product of a layer: what will run and why."""
    names = {"out": "result", "in": "gradient of the input", "weight": "gradient of the weight"}
    lines = []
    for direction, (make, tensors) in products_of(as_map(x), dense(weight), mask, geometry, activation).items():
        provider, tile, why = check.tried(make, *tensors).choice
        lines.append(f"{names[direction]}: {f'triton, {tile}' if provider == 'triton' else 'cuDNN'} ({why})")
    return "\n".join(lines)
