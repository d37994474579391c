"""Takes a plan and a model whose weights have changed; gives the plan their values, where all else is the same.

A plan's constants are views of what the trace held: a convolution's weights, cropped, say. So the model is traced once
more, and where it does the same, the new numbers go where the old ones were.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgen.sampling.causality.ready_times import Timed
from fastgen.sampling.machine.language import Call, Fixed, Memory, Program, views_of
from fastgen.sampling.rules.base import SOFTMAX_ZERO
from fastgen.sampling.trace.comparison import same_operation
from fastgen.sampling.trace.graph import Graph, Unsupported, Value
from fastgen.sampling.trace.network import Network


def renew(network: Network, traced: Sequence[Value], timed: Timed, programs: Sequence[Program]) -> bool:
    """Takes over the model's weights as they are now; False, and nothing changed, where that needs another plan.

    Args:
        network: of the model.
        traced: the values of the graph, but those that planning has added.
        timed: the graph that was planned.
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
    if len(traced) != len(now.values) or not all(
        same_operation(one, new) and _fits(one, new) and timed.analysis.holds(one, new.data, one in seen)
        for one, new in zip(traced, now.values, strict=True)
    ):
        return False
    with torch.inference_mode():  # in which a model may have made its constants
        for one, new in zip(traced, now.values, strict=True):
            one.data.copy_(new.data)
        for value in set(timed.computed).difference(traced):
            value.data.copy_(value.compute(*map(graph.data_of, value.operands)))
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


def _fits(old: Value, new: Value) -> bool:
    """Whether a constant has the same zeros, in a product and in a softmax, or, where it may have become a number in an
    instruction, the same contents."""
    if old.kind != "constant":
        return True
    if old.shape == () or not old.data.is_floating_point():
        return torch.equal(old.data, new.data)
    pairs = ((old.data == 0, new.data == 0), (old.data <= SOFTMAX_ZERO, new.data <= SOFTMAX_ZERO))
    return all(torch.equal(*pair) for pair in pairs)
