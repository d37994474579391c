"""Operators that only move elements: the same operator, run on the numbers of elements, says where each comes from.

The roll of a value with the elements 7, 8, 9 is an operand that reads the elements 9, 7, 8. A zero that an operator
puts in has the number 0.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fastgen.sampling.trace.graph import Operand
from fastgen.sampling.trace.operators import MOVEMENT, SOURCES
from fastgen.sampling.trace.storages import Storages, tensors_in

# These take no integers; float64 holds the numbers exactly.
FLOATS = ("upsample", "_upsample", "im2col", "replication", "reflection")


def moved(
    storages: Storages,
    func: Any,
    name: str,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    recorded: Sequence[Any],
    out: Tensor,
) -> Operand | None:
    """The result of an operator that only moves elements; None where it does more (indices that are computed).

    Args:
        storages: what tensors hold.
        func, name, args, kwargs: the operator and what it was called with.
        recorded: `args` with operands in place of tensors.
        out: its result.
    """
    if name not in MOVEMENT:
        return None
    if name == "constant_pad_nd":
        padded = _padded(recorded, kwargs)
        if padded is not None:
            return padded
        recorded, kwargs = [*recorded, kwargs.get("value", 0)][:3], {}
    sources = SOURCES.get(name, (0,))
    rest = [one for k, one in enumerate(args) if k not in sources]
    if any(storages.tracked(tensor) for tensor in tensors_in((rest, kwargs))) or _sums(func, name, args, kwargs):
        return None
    changed: list[Any] = []
    for k, one in enumerate(recorded):
        if k not in sources:
            changed.append(tree_map_only(Tensor, Tensor.cpu, args[k]))
        elif isinstance(one, Operand):
            changed.append(one.element_ids())
        elif one:
            number = storages.constant(torch.tensor([one], dtype=out.dtype))
            changed.append(int(storages.graph.whole(number).element_ids()))
        else:
            changed.append(0)
    if name.startswith(FLOATS):
        changed[0] = changed[0].double()
    with torch._C._DisableTorchDispatch():
        ids = func(*changed, **tree_map_only(Tensor, Tensor.cpu, kwargs))
    return Operand(storages.graph, tuple(out.shape), ids=ids.long().contiguous())


def _sums(func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether elements that meet at one place are reduced."""
    if "reduce" in func._overloadname:
        return True
    return bool(name == "index_put" and ([*args, False, False][3] or kwargs.get("accumulate")))


def _padded(args: Sequence[Any], kwargs: dict[str, Any]) -> Operand | None:
    """Zeros around a map are a map."""
    source, pads = args[0], list(args[1])
    fill = args[2] if len(args) > 2 else kwargs.get("value", 0)
    if source.map is None or (fill != 0 and any(p > 0 for p in pads)):
        return None
    rank = len(source.shape)
    before, after = [0] * rank, [0] * rank
    for k in range(len(pads) // 2):
        before[rank - 1 - k], after[rank - 1 - k] = pads[2 * k], pads[2 * k + 1]
    wider = source.map.pad(before, after)
    return None if wider is None else Operand(source.graph, wider.shape, map=wider)
