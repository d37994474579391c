"""What a model is conditioned on: its rows for a batch, an example, and what two conditions have in common."""

import inspect
import re
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

MOST_COPIED = 2**20  # numbers of a tensor


def as_tensors(condition: Any) -> Any:
    """NumPy's arrays as tensors, real numbers of torch's default type, and its integers as ints."""

    def of(leaf: Any) -> Any:
        if isinstance(leaf, np.integer):
            return int(leaf)
        if not isinstance(leaf, np.ndarray):
            return leaf
        found = torch.as_tensor(leaf)
        return found.to(torch.get_default_dtype()) if found.is_floating_point() else found

    return tree_map(of, condition)


def rows_for(condition: Any, n: int, device: torch.device | None = None) -> Any:
    """The condition of n images, on `device`.

    A tensor or an array has one row an image, or a single row for all; an int is the class of all images. Whatever else
    the pytree holds (and a tensor without dimensions) goes to the model unchanged.

    Raises:
        ValueError: a tensor has neither 1 nor n rows.
    """
    condition = as_tensors(condition)
    if isinstance(condition, int) and not isinstance(condition, bool):
        return torch.full((n,), condition, dtype=torch.long, device=device)

    def rows(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.dim() and leaf.shape[0] not in (1, n):
            hint = "; texts of different lengths are padded to one, in one tensor" if type(condition) is list else ""
            raise ValueError(
                f"condition has a tensor of shape {tuple(leaf.shape)}; expected {n} rows, one an image, or 1 for all"
                + hint
            )
        leaf = leaf.to(device)
        return leaf.expand(n, *leaf.shape[1:]) if leaf.dim() else leaf

    return tree_map(rows, condition)


def rows_for_some(condition: Any, n: int, device: torch.device | None = None) -> Any:
    """As `rows_for`, but for one image where there are none; tensors may have no rows then."""

    def of_one(leaf: Any) -> Any:
        empty = isinstance(leaf, Tensor) and leaf.shape[:1] == (0,)
        return leaf.new_zeros(1, *leaf.shape[1:]) if empty else leaf

    return rows_for(condition if n else tree_map(of_one, as_tensors(condition)), max(n, 1), device)


def copied(condition: Any) -> Any:
    """The same condition, all but large tensors in memory of their own, which a model may write into."""
    return tree_map(
        lambda leaf: leaf.clone() if isinstance(leaf, Tensor) and leaf.numel() <= MOST_COPIED else leaf, condition
    )


def rows_of(condition: Any, rows: slice | Tensor) -> Any:
    """The condition of some of its images: a slice of them, or their numbers."""
    return tree_map(lambda leaf: leaf[rows] if isinstance(leaf, Tensor) and leaf.dim() else leaf, condition)


def kind(condition: Any) -> Any:
    """What two conditions have in common that differ in nothing but the rows' values."""
    leaves, structure = tree_flatten(condition)

    def of(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.dtype, leaf.shape[1:] if leaf.dim() else leaf.item()

    return structure, [of(leaf) for leaf in leaves]


def example(condition: Any, device: torch.device) -> Any:
    """The condition of two images, from that of any number."""
    condition = as_tensors(condition)
    counts = {leaf.shape[0] for leaf in tree_leaves(condition) if isinstance(leaf, Tensor) and leaf.dim()}
    if counts - {1} and min(counts - {1}) >= 2:
        condition = rows_of(condition, slice(2))
    return rows_for(condition, 2, device)


def wants_condition(model: nn.Module, error: Exception) -> bool:
    """Whether `error`, raised by a call without a condition, may come from that: the model's forward has a second
    argument, and cannot do without it, or the error speaks of it or of None."""
    try:
        arguments = [
            one for one in inspect.signature(model.forward).parameters.values() if one.kind != one.KEYWORD_ONLY
        ]
    except ValueError:
        return False
    if len(arguments) < 2 or arguments[1].kind == arguments[1].VAR_KEYWORD:
        return False
    second = arguments[1]
    return second.default is second.empty or re.search(rf"\b{second.name}\b|None", str(error)) is not None
