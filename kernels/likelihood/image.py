"""What the likelihoods share: limits that keep values finite, addresses within an image, entries of the catalogue.

Arguments that the kernels of this folder share:

    params_ptr, target_ptr   the model's output and the image, in which an element (of a mixture: a pixel) has a number
    out_ptr                  nats, written: the map, or a partial sum of each program; `summed` adds these up
    upstream_ptr, grad_ptr   the gradient of the nats; that of params, written, of the same shape
    kept_ptr                 what the forward saves for the backward: maxima and sums
    elements, pixels         of an image
    blocks                   programs of an image; each has BLOCK elements
    n1, n2                   of the three dimensions (n0, n1, n2) that an element's number is taken apart into
    NAME_batch, NAME_plane   strides of tensor NAME: from image to image, from parameter to parameter of an element
    NAME_0, NAME_1, NAME_2   strides of the three dimensions
    MAP                      nats, or upstream gradients, are one number an element; otherwise one an image
    DENSE                    an image is one dense run in all tensors, so that no number is taken apart
"""

import functools
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastgen.kernels.catalogue_entry import Entry
from fastgen.kernels.likelihood import limits

LOGIT_LIMIT, DEVIATION_LIMIT = map(tl.constexpr, (limits.LOGIT_LIMIT, limits.DEVIATION_LIMIT))


@triton.jit
def saturate(x, low, high):
    """x limited to [low, high]; NaN stays NaN, which tl.clamp does not promise."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def log1p_series(y):
    """log(1 + y) for y in [-0.4, 1] by 2 artanh(y / (2 + y)): full float32 precision also where y is small."""
    s = y / (2 + y)
    q = s * s
    tail = 1 / 9 + q * (1 / 11 + q * (1 / 13 + q * (1 / 15)))
    return 2 * s * (1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * tail))))


@triton.jit
def image_offsets(element, n1, n2, stride_0, stride_1, stride_2, DENSE: tl.constexpr):
    """Offsets of flat element numbers within an image of (n0, n1, n2); dense images need no division.

    An image has fewer than 2^31 elements: the divisions are 32-bit (64-bit ones are calls), the offsets 64-bit."""
    if DENSE:
        return element.to(tl.int64) * stride_2
    row = element // n2
    offset = (row // n1).to(tl.int64) * stride_0 + (row % n1).to(tl.int64) * stride_1
    return offset + (element % n2).to(tl.int64) * stride_2


@triton.jit
def store_nll(
    out_ptr, nll, inside, image, block, blocks, strides, element, n1, n2, MAP: tl.constexpr, DENSE: tl.constexpr
):
    """Into the map of the batch and three image strides, or their sum into the partial sums (B, blocks)."""
    if MAP:
        at = out_ptr + image * strides[0] + image_offsets(element, n1, n2, strides[1], strides[2], strides[3], DENSE)
        tl.store(at, nll, mask=inside)
    else:
        tl.store(out_ptr + image * blocks + block, tl.sum(tl.where(inside, nll, 0.0), 0))


@triton.jit
def load_upstream(upstream_ptr, image, element, inside, strides, n1, n2, MAP: tl.constexpr, DENSE: tl.constexpr):
    """The upstream gradient of each element, of the batch stride and three image strides; without MAP the image's."""
    at = upstream_ptr + image * strides[0]
    if MAP:
        at += image_offsets(element, n1, n2, strides[1], strides[2], strides[3], DENSE)
        upstream = tl.load(at, inside, other=0.0)
    else:
        upstream = tl.load(at)
    return upstream


def upstream_strides(upstream: Tensor, rank: int) -> tuple[int, ...]:
    """Of the batch and of `rank` image dimensions: of a map (B, ...), or of (B,), which has none of an image."""
    return upstream.stride() if upstream.dim() > 1 else (*upstream.stride(), *[0] * rank)


def summed(out: Tensor, per_element: bool) -> Tensor:
    """What a launch has stored by `store_nll`, as the map or as one number an image."""
    return out if per_element else out.sum(1) if out.shape[1] > 1 else out.view(-1)


def collapse(sizes: tuple[int, ...], *strides: tuple[int, ...]) -> tuple[tuple[int, int, int], list[tuple[int, ...]]]:
    """At most three image dimensions in the order of the first tensor's memory, joined where all tensors allow it.

    Returns the sizes (n0, n1, n2) and each tensor's strides; n0 = n1 = 1 where the image is one dense run in all.
    """
    joined: list[tuple[int, list[int]]] = []
    for dim in sorted((d for d in range(len(sizes)) if sizes[d] > 1), key=lambda d: -strides[0][d]):
        inner = [stride[dim] for stride in strides]
        if joined and all(a == b * sizes[dim] for a, b in zip(joined[-1][1], inner, strict=True)):
            joined[-1] = (joined[-1][0] * sizes[dim], inner)
        else:
            joined.append((sizes[dim], inner))
    joined = [(1, [0] * len(strides))] * (3 - len(joined)) + joined
    n0, n1, n2 = (size for size, _ in joined)
    return (n0, n1, n2), [tuple(inner[tensor] for _, inner in joined) for tensor in range(len(strides))]


@functools.lru_cache(4096)
def addresses(
    sizes: tuple[int, ...], *strides: tuple[int, ...]
) -> tuple[tuple[bool, bool], tuple[int, int], tuple[int, ...]]:
    """How a kernel finds the elements of an image of these sizes in several tensors of these strides.

    Returns:
        Whether the image is one dense run in all of them, and if neighbours are then neighbours in memory in the
        first; n1 and n2 of `image_offsets`; of each tensor its leading strides and three of the image.
    """
    rank = len(sizes)
    (n0, n1, n2), image = collapse(sizes, *(stride[-rank:] for stride in strides))
    flat = [stride for all_of, three in zip(strides, image, strict=True) for stride in (*all_of[:-rank], *three)]
    dense = n0 == n1 == 1
    return (dense, dense and image[0][2] == 1), (n1, n2), tuple(flat)


def entry(
    kernel: Any,
    config: str,
    params: str,
    target: str,
    unit: tuple[str, ...],
    constants: dict[str, Any],
    *,
    num_warps: int = 4,
    multiples: bool = True,
) -> Entry:
    """A catalogue entry: types of params and target, the strides that are 1, the kernel's constants, whether sizes and
    the strides of images and planes are multiples of 16."""
    kinds = {"params_ptr": f"*{params}", "grad_ptr": f"*{params}", "target_ptr": f"*{target}"}
    kinds |= dict.fromkeys(("out_ptr", "upstream_ptr", "kept_ptr"), "*fp32") | dict.fromkeys(
        ("half", "log_half"), "fp32"
    )
    fixed = {**constants, **dict.fromkeys(unit, 1)}
    signature = {name: kinds.get(name, "i32") for name in kernel.arg_names if name not in fixed}
    suffixes = ("_batch", "_plane", "elements", "pixels") if multiples else ()
    aligned = tuple(name for name in signature if name.endswith(suffixes))
    return Entry(kernel, config, signature, fixed, aligned=aligned, num_warps=num_warps)
