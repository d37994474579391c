"""What every op of the step language means, as a function of torch. The machines are held to these."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def _copy(x: Tensor, *, out: Tensor) -> Tensor:
    return out.copy_(x)


def _into(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """With an `out`, for functions whose own cannot be trusted with one that is not contiguous (torch 2.13's gelu)."""
    return lambda *args, out: out.copy_(function(*args))


def _as_tensor(x: Tensor | float, out: Tensor) -> Tensor:
    return x if isinstance(x, Tensor) else out.new_tensor(x)


# Of one operand or of two. Numbers may take the place of operands.
POINTWISE: dict[str, Callable[..., Tensor]] = {
    "copy": _copy,
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "maximum": _into(lambda a, b: a.clamp(min=b)),
    "minimum": _into(lambda a, b: a.clamp(max=b)),
    "neg": torch.neg,
    "relu": lambda x, out: torch.clamp_min(x, 0, out=out),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "exp": torch.exp,
    "expm1": torch.expm1,
    "log": torch.log,
    "silu": _into(F.silu),
    "gelu": _into(F.gelu),
    "gelu_tanh": _into(lambda x: F.gelu(x, approximate="tanh")),
    "elu": _into(lambda x, alpha: F.elu(x, alpha)),
    "leaky_relu": _into(lambda x, slope: F.leaky_relu(x, slope)),
    "square": torch.square,
    "abs": torch.abs,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal,
    "gate": _into(lambda a, b: a.tanh() * b.sigmoid()),
    "glu": _into(lambda a, b: a * b.sigmoid()),
    # Where the second operand is not 0, what the first holds does not count.
    "hide": _into(lambda x, hidden: x.masked_fill(hidden != 0, -math.inf)),
    "erase": lambda x, erased, out: out.copy_(torch.where(erased != 0, 0, _as_tensor(x, out))),
    "keep": lambda x, kept, out: out.copy_(torch.where(kept == 0, 0, _as_tensor(x, out))),
    "softplus": _into(F.softplus),
    "log1p": torch.log1p,
    "erf": torch.erf,
    # 1 where it is true, and 0 elsewhere.
    "eq": _into(lambda a, b: a == b),
    "lt": _into(lambda a, b: a < b),
    "le": _into(lambda a, b: a <= b),
}


def _normalized(x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=eps)


# Along the last dimension; the second are the numbers.
ROWWISE: dict[str, Callable[..., Tensor]] = {
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "normalized": _normalized,  # x minus its mean, over the root of its variance plus eps
    "sum": lambda x: x.sum(-1, keepdim=True),
    "mean": lambda x: x.mean(-1, keepdim=True),
    "amax": lambda x: x.amax(-1, keepdim=True),
}


def product(rows: Tensor, weight: Tensor, added: Tensor | None, out: Tensor) -> Tensor:
    """out (n, ..., N) = rows (n, ..., K) @ weight (K, N) + added; in a batch weight is (n, ..., K, N). All is taken in
    the dtype of `out`."""
    rows, weight = rows.to(out.dtype), weight.to(out.dtype)
    added = None if added is None else added.to(out.dtype)
    if weight.dim() == 2 and rows.dim() == 2:
        if added is None:
            return torch.mm(rows, weight, out=out)
        return torch.addmm(added, rows, weight, out=out)
    if weight.dim() == 2:
        found = torch.mm(rows.reshape(-1, len(weight)), weight).view(out.shape)
    else:
        found = torch.matmul(rows, weight)
    return out.copy_(found) if added is None else torch.add(found, added, out=out)


def lookup(table: Tensor, index: Tensor, out: Tensor, of_images: bool) -> Tensor:
    """table (R, D), or (n, R, D) of each image; index (n, ...)"""
    if not of_images:
        return out.copy_(table[index])
    index = torch.where(index < 0, index + table.shape[1], index)
    rows = index.flatten(1).unsqueeze(-1).expand(-1, -1, table.shape[-1])
    return out.copy_(table.gather(1, rows).view(out.shape))


def rowwise(op: str, source: Tensor, numbers: tuple[Any, ...], out: Tensor) -> Tensor:
    wide = torch.promote_types(source.dtype, out.dtype)
    return out.copy_(ROWWISE[op](source.to(wide), *numbers))
