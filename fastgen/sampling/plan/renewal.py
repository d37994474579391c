"""Takes a plan and a model whose weights have changed; gives the plan their values, where all else is the same.

A plan's constants are views of what the trace held: a convolution's weights, cropped, say. So the model is traced once
more, and where it does the same, the new numbers go where the old ones were.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgen.sampling.causality.ready_times import Timed
from fastgen.sampling.machine.language import Call, Fixed, Memory, Program, views_of
from fastgen.sampling.rules.base import SOFTMAX_ZERO
from fastgen.sampling.trace.graph import Graph, Operand, Unsupported, Value, map_arguments
from fastgen.sampling.trace.network import Network


@dataclass(frozen=True, eq=False)
class Traced:
    """A value as the trace found it, before planning changes it."""

    value: Value
    op: Any
    args: Any
    kwargs: Any

    @staticmethod
    def all_of(graph: Graph) -> "list[Traced]":
        return [Traced(one, one.op, one.args, one.kwargs) for one in graph.values]


def renew(network: Network, traced: Sequence[Traced], timed: Timed, programs: Sequence[Program]) -> bool:
    """Takes over the model's weights as they are now; False, and nothing changed, where that needs another plan.

    Args:
        network: of the model.
        traced: the values of the graph as they were traced.
        timed: the graph that was planned, with the constants that planning has added.
        programs: whose constants are renewed.
    """
    graph = timed.graph
    constants = _constants(programs, graph)
    if constants is None:
        return False
    try:
        now = network.once_more()
    except Unsupported:
        return False
    read = (one for rule in timed.rules.values() if rule.sees_zeros for one in rule.value.operands)
    seen = {source for operand in read for source in operand.values}  # whose zeros matter to an operation
    pairs = zip(traced, now.values, strict=False)
    if not _same(traced, now) or not all(
        timed.analysis.holds(one.value, new.data, one.value in seen) for one, new in pairs
    ):
        return False
    for one, new in zip(traced, now.values, strict=True):
        if one.value.data.shape == new.data.shape:
            one.value.data.copy_(new.data)
    for value in sorted(graph.values, key=lambda value: value.kind == "computed"):  # constants first
        if value.derive is not None:
            value.data.copy_(value.derive())
    for memory in constants:
        assert memory.data is not None and memory.source is not None
        memory.data.copy_(memory.source.reshape(-1))
    return True


def _constants(programs: Sequence[Program], graph: Graph) -> list[Memory] | None:
    """Of the programs; None where one is no view of a constant of the graph, or hides in a call."""
    storages = {_storage(value.data) for value in graph.values if value.kind == "constant"}
    found: dict[Memory, None] = {}
    for program in programs:
        for instruction in program.instructions:
            if isinstance(instruction, Call) and any(isinstance(leaf, Fixed) for leaf in instruction.leaves):
                return None
            for view in views_of(instruction):
                if view.memory.kind == "constant" and view.memory.source is not None:
                    if _storage(view.memory.source) not in storages:
                        return None
                    found.setdefault(view.memory)
    return list(found)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _same(traced: Sequence[Traced], now: Graph) -> bool:
    """The same operations on the same operands, and constants with the same zeros, in a product and in a softmax."""
    if len(traced) != len(now.values):
        return False
    number = {id(one.value): k for k, one in enumerate(traced)}
    for one, new in zip(traced, now.values, strict=True):
        old = one.value
        if (old.kind, one.op, old.shape, old.data.dtype) != (new.kind, new.op, new.shape, new.data.dtype):
            return False
        if old.kind == "constant":
            if not torch.equal(old.data == 0, new.data == 0):
                return False
            if old.data.is_floating_point() and not torch.equal(old.data <= SOFTMAX_ZERO, new.data <= SOFTMAX_ZERO):
                return False
            number_like = old.shape == () or not old.data.is_floating_point()  # instructions hold it as it is
            if number_like and not torch.equal(old.data, new.data):
                return False
        ours = map_arguments((one.args, one.kwargs), lambda operand: _reads(operand, number))
        theirs = map_arguments((new.args, new.kwargs), lambda operand: _reads(operand, None))
        if ours != theirs:
            return False
    return True


def _reads(operand: Operand, number: dict[int, int] | None) -> Any:
    """What an operand reads, in terms that two traces share."""
    if operand.map is None:
        assert operand.ids is not None
        return operand.ids.shape, operand.ids.numpy().tobytes()
    value = operand.map.value
    which = value.index if number is None else number.get(id(value))
    return which, operand.map.shape, operand.map.start, operand.map.steps
