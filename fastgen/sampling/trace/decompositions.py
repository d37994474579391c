"""Operators written out as simpler ones, which have rules: average pooling, resampling, distances, normalization.

Each takes the operator and its arguments, and gives its result, or NotImplemented for arguments that it cannot take.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
MOST_DIFFERENCES = 2**20  # elements up to which a distance is computed from differences, which rounds least
MOST_WEIGHTS = 2**24  # of a resampling that does not go dimension by dimension


def _many(sizes: Sequence[int], rank: int) -> list[int]:
    return list(sizes) * (rank if len(sizes) == 1 else 1)


def _windows(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> tuple[int, int]:
    """How many windows a pooling has along a dimension, and how far the last reaches beyond it."""
    reach = dilation * (kernel - 1) + 1
    room = size + 2 * padding - reach
    count = (-(-room // stride) if ceil_mode else room // stride) + 1
    if ceil_mode and (count - 1) * stride >= size + padding:
        count -= 1
    return count, max(0, (count - 1) * stride + reach - size - padding)


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
    """Average pooling as a convolution of each channel by itself, divided by how many elements a window holds."""
    rank = int(func._schema.name[-2])
    kernel, padding = _many(kernel, rank), _many(padding, rank)
    stride = _many(stride, rank) if stride else kernel
    pads: list[int] = []
    count = torch.ones(())
    for size, k, s, p in zip(x.shape[-rank:], kernel, stride, padding, strict=True):
        number, after = _windows(size, k, s, p, 1, ceil_mode)
        first = torch.arange(number) * s - p
        low, high = (-p, size + p) if count_include_pad else (0, size)
        count = count.unsqueeze(-1) * ((first + k).clamp(max=high) - first.clamp(min=low))
        pads = [p, after, *pads]
    if divisor_override:
        count = torch.full_like(count, divisor_override)
    x, channels, lead = (aten.constant_pad_nd(x, pads) if any(pads) else x), x.shape[-rank - 1], x.shape[: -rank - 1]
    same = bool((count == count.flatten()[0]).all())
    share = 1 / float(count.flatten()[0]) if same else 1.0
    weight = torch.full((channels, 1, *kernel), share, dtype=x.dtype, device=x.device)
    found = aten.convolution(
        x.reshape(-1, *x.shape[-rank - 1 :]), weight, None, stride, [0] * rank, [1] * rank, False, [0] * rank, channels
    )
    found = found if same else found / count.to(x)
    return found.reshape(*lead, *found.shape[1:])


def maximum(
    func: Any,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> Any:
    """Max pooling of what has been padded with what is less than all."""
    kernel, padding, dilation = _many(kernel, 2), _many(padding, 2), _many(dilation, 2)
    stride = _many(stride, 2) if stride else kernel
    pads: list[int] = []
    for size, k, s, p, d in zip(x.shape[-2:], kernel, stride, padding, dilation, strict=True):
        pads = [p, _windows(size, k, s, p, d, ceil_mode)[1], *pads]
    if not any(pads):
        return func(x, kernel, stride, [0], dilation) if ceil_mode else NotImplemented
    width = x.shape[-1] + pads[0] + pads[1]
    lowest = -math.inf if x.is_floating_point() else torch.iinfo(x.dtype).min
    found, places = func(aten.constant_pad_nd(x, pads, lowest), kernel, stride, [0], dilation)
    return found, (places // width - pads[2]) * x.shape[-1] + places % width - pads[0]


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


def by_grid(func: Any, x: Tensor, grid: Tensor, *args: Any) -> Tensor:
    """Sampling at constant places: a product with the constant weights of all places."""
    size, rank = math.prod(x.shape[2:]), x.dim() - 2
    if not torch.equal(grid, grid[:1].expand_as(grid)) or size * grid[0].numel() // rank > MOST_WEIGHTS:
        return NotImplemented
    units = torch.eye(size, dtype=x.dtype, device=x.device).view(1, size, *x.shape[2:])
    weights = func(units, grid[:1], *args)[0].flatten(1)
    rows = x.flatten(2)
    return torch.bmm(rows, weights.expand(len(rows), -1, -1)).view(*x.shape[:2], *grid.shape[1:-1])


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


def folded(
    func: Any,
    x: Tensor,
    size: Sequence[int],
    kernel: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> Tensor:
    """Sums of patches at their places: a transposed convolution that puts every element where it belongs."""
    taps = math.prod(kernel)
    channels = x.shape[-2] // taps
    places, extra = [], []
    for n, k, d, p, s in zip(size, kernel, dilation, padding, stride, strict=True):
        room = n + 2 * p - d * (k - 1) - 1
        places.append(room // s + 1)
        extra.append(room % s)
    weight = torch.eye(taps, dtype=x.dtype, device=x.device).view(taps, 1, *kernel).repeat(channels, 1, 1, 1)
    patches = x.reshape(-1, x.shape[-2], *places)
    found = aten.convolution(patches, weight, None, stride, padding, dilation, True, extra, channels)
    return found.reshape(*x.shape[:-2], *found.shape[1:])


def distances(func: Any, a: Tensor, b: Tensor, p: float = 2.0, mode: int | None = None) -> Tensor:
    """Between all rows of a (..., P, D) and of b (..., R, D): (..., P, R)."""
    if p == 2 and a[..., 0].numel() * b.shape[-2] * b.shape[-1] > MOST_DIFFERENCES:
        squares = (a * a).sum(-1, keepdim=True) + (b * b).sum(-1).unsqueeze(-2) - 2 * torch.matmul(a, b.mT)
        return squares.clamp(min=0).sqrt()
    apart = (a.unsqueeze(-2) - b.unsqueeze(-3)).abs()
    if p == math.inf:
        return apart.amax(-1)
    if p == 0:
        return (apart != 0).to(apart.dtype).sum(-1)
    return apart.sum(-1) if p == 1 else (apart * apart).sum(-1).sqrt() if p == 2 else (apart**p).sum(-1) ** (1 / p)


def bucketized(func: Any, x: Any, boundaries: Tensor, *, out_int32: bool = False, right: bool = False) -> Tensor:
    """How many boundaries lie below x, or not above it."""
    return searched(func, boundaries, x, out_int32=out_int32, right=right)


def searched(
    func: Any,
    sequence: Tensor,
    x: Any,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Tensor | None = None,
) -> Tensor:
    if sorter is not None or not isinstance(x, Tensor):
        return NotImplemented
    row = sequence if sequence.dim() == 1 else sequence.unsqueeze(-2)
    below = row <= x.unsqueeze(-1) if right or side == "right" else row < x.unsqueeze(-1)
    return below.sum(-1, dtype=torch.int32 if out_int32 else torch.int64)


def trilinear(
    func: Any,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    expand_a: Sequence[int],
    expand_b: Sequence[int],
    expand_c: Sequence[int],
    summed: Sequence[int],
    unroll: int = 1,
) -> Tensor:
    for d in expand_a:
        a = a.unsqueeze(d)
    for d in expand_b:
        b = b.unsqueeze(d)
    for d in expand_c:
        c = c.unsqueeze(d)
    return (a * b * c).sum(list(summed)) if summed else a * b * c


def randomized_relu(
    func: Any, x: Tensor, noise: Tensor, lower: float = 0.125, upper: float = 1 / 3, training: bool = False, *_: Any
) -> Tensor:
    return NotImplemented if training else aten.leaky_relu(x, (lower + upper) / 2)


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


def as_real(func: Any, x: Tensor) -> Tensor:
    return aten.view_as_real_copy(x)


def as_complex(func: Any, x: Tensor) -> Tensor:
    return aten.complex(x[..., 0], x[..., 1])


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
    "grid_sampler_2d": by_grid,
    "grid_sampler_3d": by_grid,
    "col2im": folded,
    "_cdist_forward": distances,
    "_euclidean_dist": distances,
    "bucketize": bucketized,
    "searchsorted": searched,
    "_trilinear": trilinear,
    "rrelu_with_noise": randomized_relu,
    "native_group_norm": group_norm,
    "std": variance,
    "var_mean": variance,
    "std_mean": variance,
    "view_as_real": as_real,
    "view_as_complex": as_complex,
}
