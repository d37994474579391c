"""The masked convolution forward and backward: what runs, in which order.

Forward: pack the weights (small), then one product with all that follows in its finish. Backward: a pass that leads
back through the activation, then the gradient of the input (pack, one product), that of the weight (one product, one
sum), those of the biases (one sum). Work and traffic of a layer are counted in benchmarks/masked_conv2d.py.

What depends on shapes, strides, dtypes and the mask is found on the first call with them and looked up later.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastgen.kernels.common import cdiv
from fastgen.kernels.masked_conv2d import check
from fastgen.kernels.masked_conv2d.backward import masked_conv2d_activation_backward_kernel
from fastgen.kernels.masked_conv2d.config import precision_of
from fastgen.kernels.masked_conv2d.products import (
    Convolve,
    Launches,
    WeightGradient,
    Weights,
    channels_last,
    contiguous,
    pixel_steps,
    side_by_side,
    sum_of,
    unit_of,
)
from fastgen.kernels.masked_conv2d.walk import POINTWISE, Geometry, known_walk, refuse_in_capture

MAX_PIXELS = 2**31 - 2**25  # pixels are counted in 32 bits, with room for the last blocks; offsets in 64
PASS_PROGRAMS = 1024  # of the pass, about; a constant, so that sums do not depend on the chip
RECORDS = 4096  # kept; beyond, all are found anew

_records: dict[Any, Any] = {}


def forget() -> None:
    """What was found for shapes and devices, and what was tried; for tests, and after a search."""
    _records.clear()
    check._trusted.clear()


def kind_of(x: Tensor | None) -> tuple[Any, ...] | None:
    """What a launch is made for, of a tensor: all but its values and where it lies, but for its alignment."""
    return None if x is None else (x.shape, x.stride(), x.dtype, x.data_ptr() % 16 == 0)


def _recorded(key: tuple[Any, ...], x: Tensor, make: Callable[[], Any]) -> Any:
    found = _records.get(key)
    if found is None:
        refuse_in_capture(x, "chooses what runs the first time that it sees a shape, and cannot do so", "this shape")
        if len(_records) >= RECORDS:
            _records.clear()
        found = _records[key] = make()
    return found


def readable(x: Tensor) -> Tensor:
    """x (B, C, H, W), channels-last where it must be: the few channels of an image are read as they lie."""
    return x if x.shape[1] < 16 or side_by_side(x) else x.contiguous(memory_format=torch.channels_last)


def result_size(x: Tensor, weight: Tensor, geometry: Geometry) -> tuple[int, int]:
    """(height, width); ValueError where there are more than MAX_PIXELS pixels."""
    height, width = (
        (x.shape[2 + a] + 2 * geometry.padding[a] - geometry.dilation[a] * (weight.shape[2 + a] - 1) - 1)
        // geometry.stride[a]
        + 1
        for a in range(2)
    )
    if x.shape[0] * max(height * width, x.shape[2] * x.shape[3]) > MAX_PIXELS:
        raise ValueError(f"x has more than {MAX_PIXELS} pixels, {tuple(x.shape)}: split the batch")
    return height, width


def forward(
    x: Tensor, weight: Tensor, mask: Tensor | None, bias: Tensor | None, condition: Tensor | None,
    residual: Tensor | None, other: Tensor | None, other_weight: Tensor | None,
    geometry: tuple[tuple[int, int], ...], activation: str, keep: str,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """activation(conv(x, weight) + conv1x1(other, other_weight) + bias + condition) + residual, and what is kept.

    x (B, I, H, W), weight (O, I, kh, kw), bias (O,), condition (B, O), residual like the result, other (B, C, H', W'),
    other_weight (O, C, 1, 1). keep: "", with ReLU "sign" (what passes, bool), with a gate "valve" (the second half's
    input) or "both" halves'; the second result is None for "".

    Raises:
        ValueError: more than MAX_PIXELS pixels: split the batch.
    """
    walk = known_walk(mask, weight.shape, 2 if activation == "gated" else 1)
    x = readable(x)
    if other is not None and not side_by_side(other):
        other = other.contiguous(memory_format=torch.channels_last)
    weight, mask = weight.contiguous(), None if mask is None else mask.contiguous()
    bias, condition = None if bias is None else bias.contiguous(), None if condition is None else condition.contiguous()
    other_weight = None if other_weight is None else other_weight.contiguous()
    key = (
        walk, geometry, activation, keep, weight.shape, x.get_device(), precision_of(x.device, x.dtype), kind_of(x),
        kind_of(residual), kind_of(other), weight.data_ptr() % 16, mask is None or mask.data_ptr() % 16,
        bias is None or bias.data_ptr() % 16, condition is None or condition.data_ptr() % 16,
        other_weight is None or other_weight.data_ptr() % 16,
    )  # fmt: skip
    tensors = (x, weight, mask, bias, condition, residual, other, other_weight)

    def make() -> Convolve:
        weights = Weights(weight.shape, walk, Geometry(*geometry))
        size = (weight.shape[0] // walk.parts, *result_size(x, weight, weights.geometry))
        options: dict[str, Any] = {"weights": weights, "size": size, "activation": activation, "keep": keep}
        return check.tried(partial(Convolve, **options), *tensors)

    record = _recorded(key, x, make)
    out, kept = record(*tensors) if all(record.size) else record.results(x)
    return out, kept if keep else None


class Backward:
    """The gradients of one kind of call; constructed with the tensors of the first.

    The attributes `of_*` are the products for what is wanted, else None. `passes` is the pass through the activation,
    `written` whether it writes the gradient of the sums, and `total` what it adds up for: "image" for each image, "all"
    for all images, None for none; then the product for the weight may do that.
    """

    of_x: Any = None
    of_weight: Any = None
    of_other: Any = None
    of_other_weight: Any = None
    passes: Any = None

    def __init__(
        self, grad, grad_pre, x, weight, mask, out, kept, other, other_weight, walk, geometry, saved, wanted
    ) -> None:
        of_x, of_weight, of_bias, of_condition, of_other, of_other_weight = self.wanted = wanted
        batch, rows, height, width = grad.shape
        self.saved, self.rows = saved, walk.parts * rows
        self.layout = channels_last(batch, self.rows, height, width)
        dense = grad.is_contiguous(memory_format=torch.channels_last) and grad.data_ptr() % 16 == 0
        products = of_x or of_weight or of_other or of_other_weight
        self.written = products and not (saved == "none" and side_by_side(grad) and (dense or not of_bias))
        sums = self._empty_sums(grad) if self.written else grad
        weights = Weights(weight.shape, walk, Geometry(*geometry))
        if of_weight:
            adds_up = of_bias and saved == "none" and dense and not of_condition
            make: Any = partial(WeightGradient, weights=weights, adds_up=adds_up)
            self.of_weight = check.tried(make, sums, readable(x), weight, mask)
        if of_x:
            make = partial(Convolve, weights=weights, size=tuple(x.shape[1:]), mirrored=True)
            self.of_x = check.tried(make, sums, weight, mask)
        if other is not None:
            pointwise = Weights(other_weight.shape, known_walk(None, other_weight.shape, walk.parts), POINTWISE, False)
            if of_other:
                make = partial(Convolve, weights=pointwise, size=tuple(other.shape[1:]), mirrored=True)
                self.of_other = check.tried(make, sums, other_weight, mask)
            if of_other_weight:
                make = partial(WeightGradient, weights=pointwise, adds_up=False)
                self.of_other_weight = check.tried(make, sums, readable(other), other_weight, mask)
        added = self.of_weight is not None and self.of_weight.adds_up
        self.total = None if added or not (of_bias or of_condition) else "image" if of_condition else "all"
        if self.written or self.total:
            self._plan_pass(grad, grad_pre, batch if of_condition else 1)
        if of_bias or of_condition:
            (shares, groups, rows), _ = self.sums if self.total else self.of_weight.sums
            self.bias = sum_of(shares * groups, rows, rows, (1, rows, 1, 1))
            self.condition = sum_of(shares, rows, rows, (groups, rows, 1, 1))

    def _empty_sums(self, grad: Tensor) -> Tensor:
        return torch.empty_strided(*self.layout, dtype=grad.dtype, device=grad.device)

    def _plan_pass(self, grad: Tensor, grad_pre: Tensor | None, groups: int) -> None:
        batch, rows, height, width = grad.shape
        pixels, width_of_block = (32, 64) if rows > 32 else (128, 16)
        group, row_blocks = batch * height * width // groups, cdiv(rows, width_of_block)
        shares = max(1, min(cdiv(group, pixels), PASS_PROGRAMS // (groups * row_blocks) or 1))
        steps = cdiv(cdiv(group, pixels), shares)
        shares = cdiv(group, steps * pixels)
        self.sums = contiguous(shares, groups, self.rows)
        maps = [grad] if grad_pre is None else [grad, grad_pre]
        unit = min(unit_of(one, rows) for one in maps)
        strides = [*(pixel_steps(one, unit) for one in maps), (0, 0, 0)]
        channels = [one.stride(1) for one in maps] + [1] * (2 - len(maps))
        pitch = 2 * rows if self.saved == "both" else rows
        sizes = (group, shares, groups, steps, height, width, rows // unit, pitch // unit)
        self.passes = Launches(
            masked_conv2d_activation_backward_kernel, (groups * shares, row_blocks),
            (*sizes, *strides[0], *strides[1], *channels), SAVED=self.saved, UNIT=unit, PIXELS=pixels,
            ROWS=width_of_block,
        )  # fmt: skip

    def __call__(self, grad, grad_pre, x, weight, mask, out, kept, other, other_weight) -> list[Tensor | None]:
        of_x, of_weight, of_bias, of_condition, of_other, of_other_weight = self.wanted
        sums, totals = grad, None
        if self.passes is not None:
            if self.written:
                sums = self._empty_sums(grad)
            if self.total:
                totals = torch.empty_strided(*self.sums, dtype=torch.float32, device=grad.device)
            saved = self.saved
            maps = {"relu": (out, None), "sign": (kept, None), "valve": (out, kept)}.get(saved, (None, None))
            first, second = kept.chunk(2, 1) if saved == "both" else maps
            self.passes(grad, grad_pre, first, second, sums if self.written else None, totals)
        found: list[Tensor | None] = [None] * 6
        if of_x:
            found[0] = self.of_x(sums, weight, mask)[0]
        if of_weight:
            found[1], added = self.of_weight(sums, readable(x), weight, mask)
            totals = added if totals is None else totals
        if of_other:
            found[4] = self.of_other(sums, other_weight, mask)[0]
        if of_other_weight:
            found[5] = self.of_other_weight(sums, readable(other), other_weight, mask)[0]
        if of_bias:
            found[2] = torch.empty_strided((self.rows,), (1,), dtype=weight.dtype, device=weight.device)
            self.bias(totals, mask, found[2])
        if of_condition:
            found[3] = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
            self.condition(totals, mask, found[3])
        return found


def backward(
    grad: Tensor | None, grad_pre: Tensor | None, x: Tensor, weight: Tensor, mask: Tensor | None, out: Tensor,
    kept: Tensor, other: Tensor | None, other_weight: Tensor | None, geometry: tuple[tuple[int, int], ...],
    saved: str, wanted: tuple[bool, ...],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of x, weight, bias, condition, other and other_weight, as `wanted`; the rest are None.

    grad: of the result, grad_pre: of the sums where these were kept and used; one is not None. saved: what the forward
    kept, or its activation where it kept nothing. out is of the result's shape; it is read for "relu" and "valve".
    """
    if out.numel() == 0:
        shapes = (x, weight, weight[:, 0, 0, 0], weight.new_empty(out.shape[0], weight.shape[0]), other, other_weight)
        pairs = zip(shapes, wanted, strict=True)
        return [torch.zeros_like(one) if asked and one is not None else None for one, asked in pairs]
    if grad is None:
        assert grad_pre is not None, "autograd asks for no gradient of nothing"
        grad, grad_pre, saved = grad_pre, None, "none"
    walk = known_walk(mask, weight.shape, 2 if saved in ("valve", "both") else 1)
    weight, mask = weight.contiguous(), None if mask is None else mask.contiguous()
    other_weight = None if other_weight is None else other_weight.contiguous()
    key = (
        walk, geometry, saved, wanted, weight.shape, x.get_device(), precision_of(x.device, x.dtype), kind_of(grad),
        kind_of(grad_pre), kind_of(x), kind_of(other), out.data_ptr() % 16, kept.data_ptr() % 16,
        weight.data_ptr() % 16, mask is None or mask.data_ptr() % 16,
        other_weight is None or other_weight.data_ptr() % 16,
    )  # fmt: skip
    tensors = (grad, grad_pre, x, weight, mask, out, kept, other, other_weight)
    return _recorded(key, x, lambda: Backward(*tensors, walk, geometry, saved, wanted))(*tensors)


def explain(x: Tensor, weight: Tensor, mask: Tensor | None, geometry: Geometry, activation: str) -> str:
    """A line a product of a layer: what will run and why."""
    x = readable(x)
    weights = Weights(weight.shape, known_walk(mask, weight.shape, 2 if activation == "gated" else 1), geometry)
    size = (weight.shape[0] // weights.walk.parts, *result_size(x, weight, geometry))
    grad = torch.empty((x.shape[0], weight.shape[0], *size[1:]), dtype=x.dtype, device=x.device)
    grad = grad.contiguous(memory_format=torch.channels_last)
    products: dict[str, Any] = {
        "result": Convolve(x, weight, mask, weights=weights, size=size, activation=activation),
        "gradient of the input": Convolve(grad, weight, mask, weights=weights, size=tuple(x.shape[1:]), mirrored=True),
        "gradient of the weight": WeightGradient(grad, x, weight, mask, weights=weights, adds_up=False),
    }
    lines = []
    for name, one in products.items():
        provider, tile, why = one.choice
        if provider == "triton" and check._trusted.get(check.key_of(one, x)) is False:
            provider, why = "cropped", check.FAILED
        lines.append(f"{name}: {f'triton, {tile}' if provider == 'triton' else f'cuDNN, {provider}'} ({why})")
    return "\n".join(lines)
