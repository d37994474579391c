"""Whether a product gives the right numbers on this very device: compilers have produced silently wrong code for single
configurations on single chips.

A product is tried on a few images of random numbers of the same shapes and strides, with the very kernel that will be
launched, as sizes do not specialize it. The truth is cuDNN's convolution in float64. The error, over the largest value
of the result, may be twice or so of what the kernel's own arithmetic loses (u: half of torch.finfo.eps):

    half precision      the sums are float32 and rounded once, by u; tanh.approx of the gate in bfloat16 adds u / 8
    TF32                both factors lose their last 13 bits: on average 0.35 * 2^-10 of each is cut off, which all
                        results lose alike, and 0.3 * 2^-10 or so is random
    float32             sums of n products in a row err by about 0.4 u sqrt(n), the gate by some u more

A wrong tap or channel changes some result by one product or more. With n products of random numbers the largest result
is about 5 sqrt(n) and the largest product about 10, so that this is an error of 2 / sqrt(n): 2 % for n = 10,000, three
times what is allowed in bfloat16.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastgen.kernels.common import cdiv
from fastgen.kernels.masked_conv2d.config import Choice

FAILED = "the kernel failed its check"
PIXELS = 4096  # of the images that a product is tried on, about

trusted: dict[Any, bool] = {}  # by kernel, constants and device


def can_be_wrong(x: Tensor) -> bool:
    return x.is_cuda


def tried(make: Callable[..., Any], x: Tensor, *tensors: Tensor | None) -> Any:
    """`make(x, *tensors)`, a product, if it gives the right numbers, with descriptors or without; else by cuDNN, with a
    warning. Each compiled kernel is tried once."""
    product = make(x, *tensors)
    if not product.by_kernels or not can_be_wrong(x):
        return product
    tile = product.choice.tile
    for one in dict.fromkeys((tile, tile._replace(tma=False))):
        candidate = make(x, *tensors, choice=product.choice._replace(tile=one))
        key = (replace(candidate.layer, pixels=0), one, *candidate.main.constants.items(), x.get_device())
        if key not in trusted:
            trusted[key] = is_right(make, (x, *tensors), candidate.choice)
        if trusted[key]:
            return candidate
    return make(x, *tensors, choice=Choice("cudnn", tile, FAILED))


def is_right(make: Callable[..., Any], tensors: tuple[Tensor | None, ...], choice: Choice) -> bool:
    """Whether all errors are within `tolerance` and a second run gives the same bits. What does not compile or launch
    is not right. Where memory is out, that is raised: it says nothing about the kernel."""
    few = few_images(make(*tensors, choice=choice), tensors)
    product = make(*few, choice=choice)
    problem = ""
    try:
        found, again = results(product.run(*few)), results(product.run(*few))
        error = error_of(product, found, few)
        if error > tolerance(product) or not all(map(torch.equal, found, again)):
            problem = f"gives wrong results ({error:.1e}); it is not used"
    except torch.OutOfMemoryError:
        raise
    except Exception as failure:  # too much shared memory, too many registers, a compiler's own failure
        problem = f"does not run and is not used: {failure}"
    if problem:
        warnings.warn(f"masked_conv2d: {choice.tile} {problem}", stacklevel=2)
    return not problem


def few_images(product: Any, tensors: tuple[Any, ...]) -> list[Any]:
    """Random numbers of the dtypes, strides and shapes of a product's tensors, which are dense, for fewer images."""
    x = tensors[0]
    images = max(1, cdiv(PIXELS, x.shape[2] * x.shape[3]))
    generator = torch.Generator(x.device).manual_seed(0)
    few = list(tensors)
    for place, tensor in enumerate(tensors):
        if tensor is not None and tensor.dtype != torch.bool:
            scale = (2 / tensor[0].numel()) ** 0.5 if place in product.kernels else 1.0  # so that sums are of size 1
            like = tensor[:images] if place in product.maps else tensor
            few[place] = torch.empty_like(like).normal_(0, scale, generator=generator)
    return few


def results(written: tuple[Tensor | None, ...]) -> list[Tensor]:
    """What a product returns, without what is not there."""
    return [one for one in written if one is not None]


def error_of(product: Any, found: list[Tensor], tensors: Any) -> float:
    """Largest difference of results from those in float64, over the largest value; infinite where there is a NaN."""
    doubles = [t.double() if t is not None and t.is_floating_point() else t for t in tensors]
    errors = [
        ((one.double() - true).abs().max() / true.abs().max().clamp(min=1e-30)).item()
        for one, true in zip(found, results(product.by_cudnn(*doubles)), strict=True)
    ]
    return math.inf if any(error != error for error in errors) else max(errors)


def tolerance(product: Any) -> float:
    """What `error_of` may be."""
    dtype = product.layer.dtype
    if product.layer.precision == "tf32":
        return 2**-9
    return torch.finfo(dtype).eps * (16 + math.sqrt(product.terms) if dtype == torch.float32 else 1)
