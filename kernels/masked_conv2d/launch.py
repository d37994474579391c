"""The masked convolution forward and backward: what runs, in which order.

Forward: pack the weights (small), then one product with all that follows in its finish. Backward: a pass that leads
back through the activation, then the gradient of the input (pack, one product), that of the weight (one product, one
sum), those of the biases (one sum). Work and traffic of a layer are counted in benchmarks/masked_conv2d.py.

What depends on shapes, strides, dtypes and the mask is found on the first call with them and looked up later. On a GPU
each product is then tried once on a few images and compared with cuDNN; compilers have produced silently wrong code
for single configurations on single chips.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastgen.kernels.common import cdiv
from fastgen.kernels.masked_conv2d.backward import masked_conv2d_activation_backward_kernel, masked_conv2d_bias_kernel
from fastgen.kernels.masked_conv2d.config import Choice, precision_of
from fastgen.kernels.masked_conv2d.products import (
    Convolve,
    Launches,
    WeightGradient,
    Weights,
    pixel_steps,
    side_by_side,
    unit_of,
)
from fastgen.kernels.masked_conv2d.walk import POINTWISE, Geometry, known_walk, refuse_in_capture

MAX_PIXELS = 2**31 - 2**25  # pixels are counted in 32 bits, with room for the last blocks; offsets in 64
PASS_PROGRAMS = 1024  # of the pass, about; a constant, so that sums do not depend on the chip
RECORDS = 4096  # kept; beyond, all are found anew

_records: dict[Any, Any] = {}
_trusted: dict[Any, bool] = {}


def forget() -> None:
    """What was found for shapes and devices, and what was tried; for tests, and after a search."""
    _records.clear()
    _trusted.clear()


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


def forward(
    x: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    condition: Tensor | None,
    residual: Tensor | None,
    other: Tensor | None,
    other_weight: Tensor | None,
    geometry: tuple[tuple[int, int], ...],
    activation: str,
    keep: str,
    choice: Choice | None = None,
) -> tuple[Tensor, Tensor | None]:
    """activation(conv(x, weight) + conv1x1(other, other_weight) + bias + condition) + residual, and what is kept.

    x (B, I, H, W), weight (O, I, kh, kw), bias (O,), condition (B, O), residual like the result, other (B, C, H', W'),
    other_weight (O, C, 1, 1). keep: "", with ReLU "sign" (what passes, bool), with a gate "valve" (the second half's
    input) or "both" halves'; the second result is None for "". choice: instead of what is chosen.

    Raises:
        ValueError: more than MAX_PIXELS pixels: split the batch.
    """
    walk = known_walk(mask, weight.shape, 2 if activation == "gated" else 1)
    x = readable(x)
    if other is not None and not side_by_side(other):
        other = other.contiguous(memory_format=torch.channels_last)
    key = (
        "forward", walk, geometry, activation, keep, kind_of(x), kind_of(weight), kind_of(residual), kind_of(other),
        None if mask is None else mask.stride(), None if other_weight is None else other_weight.stride(),
        bias is None or bias.data_ptr() % 16 == 0, condition is None or condition.data_ptr() % 16 == 0,
        x.get_device(), precision_of(x.device, x.dtype), choice,
    )  # fmt: skip

    def make() -> Convolve:
        whole = Geometry(*geometry)
        size = (x.shape[0], weight.shape[0] // walk.parts, *result_size(x, weight, whole))
        check_pixels(x, size)
        options = {"activation": activation, "keep": keep, "residual": residual, "other": other}
        options["other_strides"] = () if other_weight is None else other_weight.stride()
        tensors = (x, weight, mask, bias, condition, residual, other, other_weight)
        return tried(Convolve, (x,), (weights_of(weight, mask, walk, whole), size), options, tensors, choice)

    record = _recorded(key, x, make)
    if not all(record.size):
        out, kept = record.results(x)
    else:
        bias = None if bias is None else bias.contiguous()
        condition = None if condition is None else condition.contiguous()
        out, kept = record(x, weight, mask, bias, condition, residual, other, other_weight)
    return out, kept if keep else None


def readable(x: Tensor) -> Tensor:
    """x (B, C, H, W), channels-last where it must be: the few channels of an image are read as they lie."""
    return x if x.shape[1] < 16 or side_by_side(x) else x.contiguous(memory_format=torch.channels_last)


def weights_of(weight: Tensor, mask: Tensor | None, walk: Any, geometry: Geometry) -> Weights:
    return Weights(weight.shape, weight.stride(), None if mask is None else mask.stride(), walk, geometry)


def result_size(x: Tensor, weight: Tensor, geometry: Geometry) -> tuple[int, ...]:
    return tuple(
        (x.shape[2 + a] + 2 * geometry.padding[a] - geometry.dilation[a] * (weight.shape[2 + a] - 1) - 1)
        // geometry.stride[a]
        + 1
        for a in range(2)
    )


def check_pixels(x: Tensor, size: tuple[int, ...]) -> None:
    if max(size[0] * size[2] * size[3], x.shape[0] * x.shape[2] * x.shape[3]) > MAX_PIXELS:
        raise ValueError(f"x has more than {MAX_PIXELS} pixels, {tuple(x.shape)}: split the batch")


class Backward:
    """The gradients of one kind of call; constructed with the tensors of the first."""

    def __init__(self, grad, grad_pre, x, weight, mask, kept, other, other_weight, geometry, saved, wanted) -> None:
        of_x, of_weight, of_bias, of_condition, of_other, of_other_weight = self.wanted = wanted
        parts = 2 if saved in ("valve", "both") else 1
        batch, rows, height, width = grad.shape
        self.saved, self.rows = saved, parts * rows
        walk = known_walk(mask, weight.shape, parts)
        weights = weights_of(weight, mask, walk, Geometry(*geometry))
        dense = grad.is_contiguous(memory_format=torch.channels_last) and grad.data_ptr() % 16 == 0
        # The product for the weight adds up for the bias where nothing else must be done with the gradient.
        alone = saved == "none" and dense and not of_condition
        products = of_x or of_weight or of_other or of_other_weight
        written = products and not (saved == "none" and side_by_side(grad) and (dense or not of_bias))
        like = torch.empty_strided(
            (batch, self.rows, height, width),
            (height * width * self.rows, 1, width * self.rows, self.rows),
            dtype=grad.dtype,
            device=grad.device,
        )
        sums = grad if products and not written else like
        self.of_weight = self.of_x = self.of_other = self.of_other_weight = None
        if of_weight:
            read = readable(x)
            self.of_weight = tried(
                WeightGradient, (sums, read), (weights,), {"adds_up": of_bias and alone}, (sums, read, weight, mask)
            )
        adds_up = self.of_weight is not None and self.of_weight.adds_up
        if of_x:
            options = {"mirrored": True}
            self.of_x = tried(Convolve, (sums,), (weights, tuple(x.shape)), options, (sums, weight, mask))
        if other is not None:
            pointwise = weights_of(other_weight, None, known_walk(None, other_weight.shape, parts), POINTWISE)
            if of_other:
                arguments = (pointwise, tuple(other.shape))
                self.of_other = tried(Convolve, (sums,), arguments, {"mirrored": True}, (sums, other_weight, None))
            if of_other_weight:
                read = readable(other)
                tensors = (sums, read, other_weight, None)
                self.of_other_weight = tried(WeightGradient, (sums, read), (pointwise,), {"adds_up": False}, tensors)
        self.total = None if not ((of_bias or of_condition) and not adds_up) else "image" if of_condition else "all"
        self.passes = None
        self.written = (like.shape, like.stride()) if written else None
        if self.written or self.total:
            self._plan_pass(grad, grad_pre, kept, batch if of_condition else 1)
        self.bias = None
        if of_bias or of_condition:
            self._plan_biases(batch)

    def _plan_pass(self, grad: Tensor, grad_pre: Tensor | None, kept: Tensor, groups: int) -> None:
        batch, rows, height, width = grad.shape
        blocks = (32, 64) if rows > 32 else (128, 16)
        group = batch * height * width // groups
        row_blocks = cdiv(rows, blocks[1])
        shares = max(1, min(cdiv(group, blocks[0]), PASS_PROGRAMS // (groups * row_blocks) or 1))
        steps = cdiv(cdiv(group, blocks[0]), shares)
        shares = cdiv(group, steps * blocks[0])
        self.sums = (groups, shares, self.rows)
        pitch = 2 * rows if self.saved == "both" else rows
        maps = [grad] if grad_pre is None else [grad, grad_pre]
        unit = min(unit_of(one, rows) for one in maps)
        strides = [(0, 0, 0), (0, 0, 0)]
        strides[: len(maps)] = [pixel_steps(one, unit) for one in maps]
        channels = [one.stride(1) for one in maps] + [1] * (2 - len(maps))
        arguments = (
            group,
            shares,
            steps,
            height,
            width,
            rows // unit,
            pitch // unit,
            *strides[0],
            *strides[1],
            *channels,
        )
        constants = {"SAVED": self.saved, "UNIT": unit, "PIXELS": blocks[0], "ROWS": blocks[1]}
        grid = (groups * shares, row_blocks)
        self.passes = Launches(masked_conv2d_activation_backward_kernel, grid, arguments, **constants)

    def _plan_biases(self, batch: int) -> None:
        groups, count, rows = self.sums if self.total else self.of_weight.sums
        blocks = cdiv(rows, 128)
        self.bias = Launches(masked_conv2d_bias_kernel, (blocks, 1), (groups * count, rows), ROWS=128)
        self.condition = Launches(masked_conv2d_bias_kernel, (blocks, groups), (count, rows), ROWS=128)

    def __call__(self, grad, grad_pre, x, weight, mask, out, kept, other, other_weight) -> list[Tensor | None]:
        of_x, of_weight, of_bias, of_condition, of_other, of_other_weight = self.wanted
        sums, totals = grad, None
        if self.passes is not None:
            if self.written is not None:
                sums = torch.empty_strided(*self.written, dtype=grad.dtype, device=grad.device)
            if self.total:
                totals = torch.empty(self.sums, dtype=torch.float32, device=grad.device)
            first, second = {
                "none": (None, None), "relu": (out, None), "sign": (kept, None), "valve": (out, kept),
            }.get(self.saved) or kept.chunk(2, 1)  # fmt: skip
            self.passes(grad, grad_pre, first, second, sums if self.written is not None else None, totals)
        found: list[Tensor | None] = [None] * 6
        if of_x:
            found[0] = self.of_x(sums, weight, mask)[0]
        if of_weight:
            found[1], added = self.of_weight(sums, readable(x), weight, mask)
            totals = added if totals is None else totals
        if of_other:
            found[4] = self.of_other(sums, other_weight, None)[0]
        if of_other_weight:
            found[5] = self.of_other_weight(sums, readable(other), other_weight, None)[0]
        if of_bias:
            found[2] = torch.empty(weight.shape[0], dtype=weight.dtype, device=weight.device)
            self.bias(totals, found[2])
        if of_condition:
            found[3] = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
            self.condition(totals, found[3])
        return found


def backward(
    grad: Tensor | None,
    grad_pre: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    out: Tensor,
    kept: Tensor,
    other: Tensor | None,
    other_weight: Tensor | None,
    geometry: tuple[tuple[int, int], ...],
    saved: str,
    wanted: tuple[bool, ...],
) -> list[Tensor | None]:
    """Gradients of x, weight, bias, condition, other and other_weight, as `wanted`; the rest are None.

    grad: of the result, grad_pre: of the sums where these were kept and used; one is not None. saved: what the forward
    kept, or its activation where it kept nothing. out is of the result's shape; it is read for "relu" and "valve".
    """
    if out.numel() == 0:
        shapes = (x, weight, weight[:, 0, 0, 0], weight.new_empty(out.shape[0], weight.shape[0]), other, other_weight)
        return [
            torch.zeros_like(one) if asked and one is not None else None
            for one, asked in zip(shapes, wanted, strict=True)
        ]
    if grad is None:
        assert grad_pre is not None, "autograd asks for no gradient of nothing"
        grad, grad_pre, saved = grad_pre, None, "none"
    key = (
        "backward", known_walk(mask, weight.shape, 2 if saved in ("valve", "both") else 1), geometry, saved, wanted,
        kind_of(grad), kind_of(grad_pre), kind_of(x), kind_of(weight), kind_of(other), kind_of(other_weight),
        out.data_ptr() % 16, kept.data_ptr() % 16, None if mask is None else mask.stride(), x.get_device(),
        precision_of(x.device, x.dtype),
    )  # fmt: skip
    arguments = (grad, grad_pre, x, weight, mask, kept, other, other_weight, geometry, saved, wanted)
    record = _recorded(key, x, lambda: Backward(*arguments))
    return record(grad, grad_pre, x, weight, mask, out, kept, other, other_weight)


def explain(x: Tensor, weight: Tensor, mask: Tensor | None, geometry: Geometry, activation: str) -> str:
    """A line a product of a layer: what will run and why."""
    walk = known_walk(mask, weight.shape, 2 if activation == "gated" else 1)
    weights = weights_of(weight, mask, walk, geometry)
    x = readable(x)
    size = (x.shape[0], weight.shape[0], *result_size(x, weight, geometry))
    grad = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    products = {
        "result": Convolve(x, weights, (size[0], size[1] // walk.parts, *size[2:]), activation=activation),
        "gradient of the input": Convolve(grad, weights, tuple(x.shape), mirrored=True),
        "gradient of the weight": WeightGradient(grad, x, weights, adds_up=False),
    }
    lines = []
    for name, one in products.items():
        failed = one.choice.provider == "triton" and _trusted.get(_tried_as(one, x)) is False
        choice = Choice("cropped", one.choice.tile, "the kernel failed its check") if failed else one.choice
        what = f"triton, {choice.tile}" if choice.provider == "triton" else f"cuDNN, {choice.provider}"
        lines.append(f"{name}: {what} ({choice.why})")
    return "\n".join(lines)


# --- is it right on this device?


def tried(
    product: Any,
    read: tuple[Tensor, ...],
    fixed: tuple[Any, ...],
    options: dict[str, Any],
    tensors: tuple[Tensor | None, ...],
    choice: Choice | None = None,
) -> Any:
    """`product(*read, *fixed, **options)`, if it gives the numbers of cuDNN on this GPU, by descriptors or without; else
    the same by cuDNN, with a warning.

    read: the maps that it reads; tensors: the arguments of a call. It is tried on a few images of random numbers of the
    same shapes and strides, with the very kernel that will be launched, as sizes do not specialize it.
    """
    found = product(*read, *fixed, choice=choice, **options)
    if choice is not None or found.choice.provider != "triton" or not can_be_wrong(read[0]):
        return found
    for tile in dict.fromkeys((found.choice.tile, found.choice.tile._replace(tma=False))):
        one = found.choice._replace(tile=tile)
        made = product(*read, *fixed, choice=one, **options)
        key = _tried_as(made, read[0])
        if key not in _trusted:
            _trusted[key] = gives_the_right_numbers(product, fixed, options, tensors, one)
        if _trusted[key]:
            return made
    return product(*read, *fixed, choice=Choice("cropped", found.choice.tile, "the kernel failed its check"), **options)


def _tried_as(product: Any, x: Tensor) -> tuple[Any, ...]:
    layer = replace(product.layer, pixels=0)
    return (layer, product.choice.tile, *product.run.constants.items(), x.get_device())


def can_be_wrong(x: Tensor) -> bool:
    return x.is_cuda


def gives_the_right_numbers(
    product: Any,
    fixed: tuple[Any, ...],
    options: dict[str, Any],
    tensors: tuple[Tensor | None, ...],
    choice: Choice,
) -> bool:
    """And twice the same. A configuration that does not compile or launch does not; where memory is out, that is raised,
    as it says nothing about the kernel."""
    of_weight = product is WeightGradient
    x = tensors[0]
    assert x is not None
    images = max(1, min(x.shape[0], cdiv(4096, x.shape[2] * x.shape[3])))
    generator = torch.Generator(x.device).manual_seed(0)
    maps = (0, 1) if of_weight else (0, 4, 5, 6)
    few = []
    for i, one in enumerate(tensors):
        if one is not None and one.dtype != torch.bool:
            weight = not of_weight and i in (1, 7)  # such that sums of products are of size 1
            scale = (2 / one[0].numel()) ** 0.5 if weight else 1.0
            one = alike(one, images if i in maps else one.shape[0], scale, generator)
        few.append(one)
    sizes = [(images, *one[1:]) if type(one) is tuple else one for one in fixed]
    given = {
        name: few[{"residual": 5, "other": 6}[name]] if isinstance(one, Tensor) else one
        for name, one in options.items()
    }

    def run(provider: str) -> list[Tensor]:
        one = product(*few[: 1 + of_weight], *sizes, choice=choice._replace(provider=provider), **given)
        first, second = one(*few)
        if not of_weight:
            return [first, second] if options.get("keep") else [first]
        if not options["adds_up"]:
            return [first]
        return [first, few[0].double().sum((0, 2, 3)) if second is None else second.sum((0, 1))]

    try:
        expected, found, again = run("dense"), run("triton"), run("triton")
    except torch.OutOfMemoryError:
        raise
    except Exception as problem:  # too much shared memory, too many registers, a compiler's own failure
        warnings.warn(f"masked_conv2d: {choice.tile} does not run and is not used: {problem}", stacklevel=2)
        return False
    error = max(error_of(one, other) for one, other in zip(found, expected, strict=True))
    if error <= tolerance(x.dtype) and all(torch.equal(one, other) for one, other in zip(found, again, strict=True)):
        return True
    warnings.warn(f"masked_conv2d: {choice.tile} gives wrong results ({error:.1e}); it is not used", stacklevel=2)
    return False


def alike(x: Tensor, first: int, scale: float, generator: torch.Generator) -> Tensor:
    """Random values of the dtype, strides and shape of x, but for its first dimension."""
    shape = (first, *x.shape[1:])
    reach = 1 + sum((size - 1) * step for size, step in zip(shape, x.stride(), strict=True))
    values = torch.randn(reach, generator=generator, device=x.device) * scale
    return values.to(x.dtype).as_strided(shape, x.stride())


def error_of(found: Tensor, truth: Tensor) -> float:
    """Largest difference over the largest value; infinite where there is a NaN."""
    error = ((found.double() - truth).abs().max() / truth.double().abs().max().clamp(min=1e-30)).item()
    return error if error == error else float("inf")


def tolerance(dtype: torch.dtype) -> float:
    """Of `error_of`: cuDNN rounds as well, and in TF32 float32 has ten bits."""
    return 8e-3 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
