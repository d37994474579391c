"""Operators written out as simpler ones, which have rules: pooling, resampling, distances, normalization.

Each takes the operator and its arguments, and gives its result, or NotImplemented for arguments that it cannot take.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
MOST_DIFFERENCES = 2**20  # elements up to which a distance is computed from differences, which rounds least


def _many(sizes: Sequence[int], rank: int) -> list[int]:
    return list(sizes) * (rank if len(sizes) == 1 else 1)


def _windows(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    outside: float = 0,
) -> Tensor:
    """The windows of a pooling over the last dimensions of x, as views: (..., *windows, *elements of each)."""
    rank = len(kernel)
    pads: list[int] = []
    reaches = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    for size, reach, s, p in zip(x.shape[-rank:], reaches, stride, padding, strict=True):
        room = size + 2 * p - reach
        count = (-(-room // s) if ceil_mode else room // s) + 1
        if ceil_mode and (count - 1) * s >= size + p:  # a window that would see nothing but padding
            count -= 1
        pads = [p, max(0, (count - 1) * s + reach - size - p), *pads]
    first = x.dim() - rank
    x = aten.constant_pad_nd(x, pads, outside) if any(pads) else x
    for k, (reach, s, d) in enumerate(zip(reaches, stride, dilation, strict=True)):
        x = x.unfold(first + k, reach, s)[..., ::d]
    return x


def average(
    func: Any,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """The mean of windows, each divided by how many elements it holds where that is not all of them."""
    rank = int(func._schema.name[-2])
    kernel, padding = _many(kernel, rank), _many(padding, rank)
    given = (kernel, _many(stride, rank) if stride else kernel, padding, [1] * rank, ceil_mode)
    dims = list(range(-rank, 0))
    if not ceil_mode and divisor_override is None and (count_include_pad or not any(padding)):
        return _windows(x, *given).mean(dims)
    room = torch.ones([size + 2 * p * count_include_pad for size, p in zip(x.shape[-rank:], padding, strict=True)])
    held = [0] * rank if count_include_pad else padding
    count = _windows(room.to(x), *given[:2], held, *given[3:]).sum(dims)
    return _windows(x, *given).sum(dims) / (divisor_override or count)


def maximum(
    func: Any,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    """The greatest of windows, and the number of its place."""
    kernel = _many(kernel, 2)
    given = (kernel, _many(stride, 2) if stride else kernel, _many(padding, 2), _many(dilation, 2), ceil_mode)
    windows = _windows(x, *given, -math.inf if x.is_floating_point() else torch.iinfo(x.dtype).min)
    found = windows.amax((-2, -1))
    numbers = torch.arange(x.shape[-2:].numel(), device=x.device).view(x.shape[-2:])
    places = torch.where(windows == found[..., None, None], _windows(numbers, *given), numbers.numel())
    return found, places.amin((-2, -1))


def resampled(func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Interpolation, or adaptive average pooling, as a product with a matrix along each dimension.

    The weights of a dimension are what becomes of its unit vectors, constant along the other dimensions: all weights
    of one result sum to one along each dimension.
    """
    name = func._schema.name
    rank = int(name[name.rindex("d") - 1])
    flat = x.reshape(-1, *x.shape[-rank:])
    for d, size in enumerate(x.shape[-rank:]):
        units = torch.eye(size, dtype=x.dtype, device=x.device).view(
            size, *[size if k == d else 1 for k in range(rank)]
        )
        responses = func(units.expand(size, *x.shape[-rank:]).unsqueeze(0), *args, **kwargs)[0]
        weights = responses.movedim(1 + d, 1).flatten(2)[:, :, 0]  # (size, new size)
        before, after = flat.shape[: 1 + d], flat.shape[2 + d :]
        if after:
            rows = flat.reshape(math.prod(before), size, math.prod(after))
            found = torch.bmm(weights.mT.expand(len(rows), -1, -1), rows)
        else:
            rows = flat.reshape(len(flat), -1, size)
            found = torch.bmm(rows, weights.expand(len(rows), -1, -1))
        flat = found.view(*before, -1, *after)
    return flat.view(*x.shape[:-rank], *flat.shape[1:])


def convolution_by_patches(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    """A convolution whose weights are computed: a product of matrices with all patches."""
    rank = weight.dim() - 2
    if transposed or rank > 2:
        return NotImplemented
    if rank == 1:
        x, kernel = x.unsqueeze(-2), weight.unsqueeze(-2)
        steps = [1, *stride], [0, *padding], [1, *dilation]
        return convolution_by_patches(x, kernel, bias, *steps, False, [0, 0], groups).squeeze(-2)
    sizes = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, p, d, s in zip(x.shape[2:], weight.shape[2:], padding, dilation, stride, strict=True)
    ]
    patches = aten.im2col(x, list(weight.shape[2:]), dilation, padding, stride).unflatten(1, (groups, -1))
    found = torch.matmul(weight.reshape(groups, len(weight) // groups, -1), patches)
    found = found.reshape(len(x), -1, *sizes)
    return found if bias is None else found + bias.view(-1, 1, 1)


def distances(func: Any, a: Tensor, b: Tensor, p: float = 2.0, mode: int | None = None) -> Tensor:
    """Between all rows of a (..., P, D) and of b (..., R, D): (..., P, R)."""
    if p != 2:
        return NotImplemented
    if a[..., 0].numel() * b.shape[-2] * b.shape[-1] > MOST_DIFFERENCES:
        squares = (a * a).sum(-1, keepdim=True) + (b * b).sum(-1).unsqueeze(-2) - 2 * torch.matmul(a, b.mT)
        return squares.clamp(min=0).sqrt()
    apart = a.unsqueeze(-2) - b.unsqueeze(-3)
    return (apart * apart).sum(-1).sqrt()


def product_of_three(func: Any, a: Tensor, b: Tensor, c: Tensor, *given: list[int]) -> Tensor:
    """The sum of a product, as of nn.Bilinear; given: what dimensions a, b and c lack, and which are summed."""
    dims = range(a.dim() + len(given[0]))
    kept = [[d for d in dims if d not in left_out] for left_out in given[:4]]
    return torch.einsum(a, kept[0], b, kept[1], c, kept[2], kept[3])


def group_norm(
    func: Any,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    batch: int,
    channels: int,
    places: int,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.reshape(batch, groups, -1)
    mean = rows.mean(-1, keepdim=True)
    rstd = (aten.var.correction(rows, [-1], correction=0, keepdim=True) + eps).rsqrt()
    found = ((rows - mean) * rstd).view(x.shape)
    along = (1, channels, *[1] * (x.dim() - 2))
    found = found if weight is None else found * weight.view(along)
    found = found if bias is None else found + bias.view(along)
    return found, mean.squeeze(-1), rstd.squeeze(-1)


def variance(func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Variance or standard deviation, alone or with the mean."""
    name = func._schema.name
    if func._overloadname != "correction":
        return NotImplemented
    dims = args[0] if args else kwargs.get("dim")
    options = {key: value for key, value in kwargs.items() if key != "dim"}
    spread = aten.var.correction(x, dims, **options)
    spread = spread.sqrt() if "std" in name else spread
    if not name.endswith("_mean"):
        return spread
    return spread, x.mean(list(range(x.dim())) if dims is None else dims, keepdim=options.get("keepdim", False))


def power(func: Any, x: Tensor, exponent: Any) -> Tensor:
    """GELU's third power, by products as torch has it."""
    cube = not isinstance(exponent, Tensor) and exponent == 3 and x.is_floating_point()
    return x * x * x if cube else NotImplemented


def scaled_elu(func: Any, x: Tensor, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Tensor:
    return NotImplemented if scale == 1 or input_scale != 1 else aten.elu(x, alpha) * scale


def bucket(
    func: Any, x: Tensor, boundaries: Tensor, out_int32: bool = False, right: bool = False, side: str | None = None
) -> Any:
    """How many of the boundaries (K,) lie below each number, or with `right` not above it."""
    if not isinstance(x, Tensor) or boundaries.dim() != 1:
        return NotImplemented
    numbers = x.unsqueeze(-1)
    below = boundaries <= numbers if right or side == "right" else boundaries < numbers
    return below.sum(-1, dtype=torch.int32 if out_int32 else torch.int64)


def searched(func: Any, boundaries: Tensor, x: Tensor, *, sorter: Tensor | None = None, **options: Any) -> Any:
    return NotImplemented if sorter is not None else bucket(func, x, boundaries, **options)


def is_in(func: Any, x: Tensor, several: Any, assume_unique: bool = False, invert: bool = False) -> Any:
    if not isinstance(x, Tensor):
        return NotImplemented
    found = x.unsqueeze(-1) == (several.flatten() if isinstance(several, Tensor) else several)
    found = found.any(-1)
    return found.logical_not() if invert else found


def by_index(table: Tensor, indices: Sequence[Tensor | None]) -> Any:
    """table[:, i] by rows of the table with that dimension first, table[i, j] by those of both dimensions as one."""
    given = [(d, one) for d, one in enumerate(indices) if one is not None]
    if any(one.dtype in (torch.bool, torch.uint8) for _, one in given):
        return NotImplemented
    (first, one), *others = given
    if not others:
        if first == 0:
            return NotImplemented  # `index` itself
        rank = one.dim()
        found = aten.index.Tensor(table.movedim(first, 0), [one])
        return found.movedim(list(range(rank)), list(range(first, first + rank)))
    if [d for d, _ in given] != list(range(len(given))):
        return NotImplemented
    number: Any = 0
    for d, one in given:
        number = number * table.shape[d] + torch.where(one < 0, one + table.shape[d], one)
    return aten.index.Tensor(table.flatten(0, len(given) - 1), [number])


def by_gather(table: Tensor, dim: int, index: Tensor, sparse_grad: bool = False) -> Tensor:
    dim %= max(table.dim(), 1)
    numbers = torch.arange(table.numel(), device=table.device).view(table.shape).narrow(dim, 0, 1)
    for d, size in enumerate(index.shape):
        numbers = numbers if d == dim else numbers.narrow(d, 0, size)
    return aten.index.Tensor(table.reshape(-1), [index * math.prod(table.shape[dim + 1 :]) + numbers])


def by_select(table: Tensor, dim: int, index: Tensor) -> Tensor:
    return by_index(table.unsqueeze(0), [None] * (dim % table.dim() + 1) + [index])[0]


# Of a table that does not depend on the input: by `index` along its first dimension.
LOOKUPS: dict[str, Callable[..., Any]] = {
    "index": by_index,
    "gather": by_gather,
    "index_select": by_select,
    "take": lambda table, index: aten.index.Tensor(table.reshape(-1), [index]),
}

WRITTEN_OUT: dict[str, Callable[..., Any]] = {
    "avg_pool1d": average,
    "avg_pool2d": average,
    "avg_pool3d": average,
    "max_pool2d_with_indices": maximum,
    "upsample_linear1d": resampled,
    "upsample_bilinear2d": resampled,
    "upsample_trilinear3d": resampled,
    "upsample_bicubic2d": resampled,
    "_upsample_bilinear2d_aa": resampled,
    "_upsample_bicubic2d_aa": resampled,
    "adaptive_avg_pool1d": resampled,
    "_adaptive_avg_pool2d": resampled,
    "_adaptive_avg_pool3d": resampled,
    "_cdist_forward": distances,
    "_euclidean_dist": distances,
    "_trilinear": product_of_three,
    "native_group_norm": group_norm,
    "lerp": lambda func, start, end, weight: start + weight * (end - start),
    "pow": power,
    "floor_divide": lambda func, x, y: aten.div(x, y, rounding_mode="floor"),
    "bucketize": bucket,
    "searchsorted": searched,
    "isin": is_in,
    "elu": scaled_elu,
    "std": variance,
    "var_mean": variance,
    "std_mean": variance,
    "view_as_real": lambda func, x: aten.view_as_real_copy(x),
    "view_as_complex": lambda func, x: aten.complex(x[..., 0], x[..., 1]),
}
