"""Takes two traces of a model; tells whether they compute the same."""

from typing import Any

import torch

from fastgen.sampling.trace.graph import Graph, Operand, Value, map_arguments


def same_operations(first: Graph, second: Graph) -> bool:
    """Whether the operations are the same, and their constants."""
    return len(first.values) == len(second.values) and all(
        same_operation(a, b)
        and (a.kind != "constant" or a.data is b.data or torch.equal(a.data.nan_to_num(), b.data.nan_to_num()))
        for a, b in zip(first.values, second.values, strict=True)
    )


def same_operation(one: Value, other: Value) -> bool:
    """Whether values of two traces come of the same operation, on operands that read the same elements."""
    if (one.kind, one.op, one.shape, one.data.dtype) != (other.kind, other.op, other.shape, other.data.dtype):
        return False
    ours, theirs = (map_arguments((value.args, value.kwargs), _elements_read) for value in (one, other))
    # Weights packed for integer arithmetic cannot be compared, but their hashes tell which object they are.
    return bool(map_arguments(ours, hash, torch.ScriptObject) == map_arguments(theirs, hash, torch.ScriptObject))


def _elements_read(operand: Operand) -> Any:
    """What an operand reads, in terms that two traces share."""
    if operand.map is None:
        assert operand.ids is not None
        return operand.ids.shape, operand.ids.numpy().tobytes()
    return operand.map.value.index, operand.map.shape, operand.map.start, operand.map.steps
