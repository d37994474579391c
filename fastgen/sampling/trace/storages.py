"""What the storages of tensors hold while a model is recorded: `Storages`, and where views lie in them.

Views and writes in place need no operation of their own. The recorder asks here what a tensor holds at this moment, and
gets an `Operand`: after `y = 2 * x; z = y[:, 1:]` the tensor z lies in the storage of y, which holds the value `mul`;
its operand is the map of that value that begins at (0, 1).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fastgen.sampling.trace.graph import Graph, Operand, Value


@dataclass
class TracedStorage:
    """What a storage holds: the map of a tensor that lies in it as (shape, strides, offset), or numbers of elements."""

    operand: Operand
    shape: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    offset: int = 0


class Storages:
    """The storages of all tensors that depend on the input, by address.

    Args:
        graph: that is recorded.
        like: of another run, with which it shares constants that are equal.
    """

    def __init__(self, graph: Graph, like: Graph | None = None) -> None:
        self.graph = graph
        self._others = iter(() if like is None else [one.data for one in like.values if one.kind == "constant"])
        self._known: dict[int, TracedStorage] = {}
        # Storages are known by address, which is not used again while there is such a reference; their contents may go.
        self._seen: list[StorageWeakRef] = []
        self._constants: dict[Any, Value] = {}

    def define(self, tensor: Tensor, operand: Operand) -> None:
        """From now on the tensor's storage holds the operand's elements, and nothing else."""
        self._seen.append(StorageWeakRef(tensor.untyped_storage()))
        offset = int(tensor.storage_offset())
        self._known[storage_of(tensor)] = TracedStorage(operand, tuple(tensor.shape), tensor.stride(), offset)

    def tracked(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and storage_of(tensor) in self._known

    def constant(self, tensor: Tensor) -> Value:
        """Weights are used again and again in loops: what is the same tensor with the same contents is one value."""
        key = (storage_of(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        known = self._constants.get(key)
        if known is None or not torch.equal(known.data, tensor.cpu()):
            self._seen.append(StorageWeakRef(tensor.untyped_storage()))
            other = next(self._others, None)  # two runs have the same constants in the same order
            same = other is not None and other.dtype == tensor.dtype and torch.equal(other, tensor.cpu())
            data = other if other is not None and same else copied_to_cpu(tensor)
            known = self._constants[key] = self.graph.add(Value("constant", tuple(tensor.shape), data))
        return known

    def operand(self, tensor: Tensor) -> Operand:
        """What the tensor holds at this moment."""
        shape = tuple(tensor.shape)
        if not self.tracked(tensor):
            return self.graph.whole(self.constant(tensor))
        storage = self._known[storage_of(tensor)]
        place = TracedStorage(storage.operand, shape, tensor.stride(), int(tensor.storage_offset()))
        if storage.operand.map is not None and storage == place:
            return storage.operand
        if storage.operand.map is not None:
            decoded = place_in(tensor, storage)
            if decoded is not None:
                return Operand(self.graph, shape, map=storage.operand.map.within(shape, *decoded))
        flat = self.flat_ids(tensor)
        ids = flat.as_strided(shape, tensor.stride(), tensor.storage_offset()).contiguous()
        return Operand(self.graph, shape, ids=ids)

    def flat_ids(self, tensor: Tensor) -> Tensor:
        """Number of the element in every place of the tensor's storage."""
        storage = self._known[storage_of(tensor)]
        if storage.operand.ids is not None and storage.strides == (1,):
            return storage.operand.ids
        room = tensor.untyped_storage().nbytes() // tensor.element_size()
        flat = torch.zeros(room, dtype=torch.long)
        flat.as_strided(storage.shape, storage.strides, storage.offset).copy_(storage.operand.element_ids())
        return flat

    def write(self, tensor: Tensor, operand: Operand) -> None:
        """The operand's elements, broadcast, take the place of what the tensor held."""
        room = tensor.untyped_storage().nbytes() // tensor.element_size()
        if operand.shape == tuple(tensor.shape) and tensor.numel() == room and 0 not in tensor.stride():
            self.define(tensor, operand)
            return
        if not self.tracked(tensor):
            base = tensor.as_strided((room,), (1,), 0).clone()
            base.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).zero_()  # written already
            value = self.constant(base)
            flat = self.graph.whole(value).element_ids().view(-1)
        else:
            flat = self.flat_ids(tensor).clone()
        region = flat.as_strided(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))
        region.copy_(operand.element_ids().expand(tensor.shape))
        self._seen.append(StorageWeakRef(tensor.untyped_storage()))
        self._known[storage_of(tensor)] = TracedStorage(Operand(self.graph, (room,), ids=flat), (room,), (1,), 0)


def tensors_in(arguments: Any) -> list[Tensor]:
    if isinstance(arguments, dict):
        arguments = tuple(arguments.values())
    if isinstance(arguments, (list, tuple)):
        return [tensor for one in arguments for tensor in tensors_in(one)]
    return [arguments] if isinstance(arguments, Tensor) else []


def storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def copied_to_cpu(tensor: Tensor) -> Tensor:
    """The analysis is done on the CPU, wherever the model is."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def place_in(tensor: Tensor, storage: TracedStorage) -> tuple[list[int], list[list[int]]] | None:
    """Where the elements of a view lie in the tensor that the storage holds: first coordinates, steps a dimension.

    None where they do not advance by a fixed number of coordinates (two dimensions taken as one, for example).
    """
    if math.prod(tensor.shape) == 0:
        return None
    dims = sorted(
        (d for d, size in enumerate(storage.shape) if size > 1), key=lambda d: storage.strides[d], reverse=True
    )

    def split(distance: Any) -> list[int] | None:
        found = [0] * len(storage.shape)
        for d in dims:
            if storage.strides[d] > 0:
                found[d], distance = divmod(distance, storage.strides[d])
        return None if distance else found

    first = int(tensor.storage_offset()) - storage.offset
    start = split(first) if first >= 0 else None
    if start is None:
        return None
    steps = []
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        step = split(stride) if size > 1 else [0] * len(storage.shape)
        if step is None:
            return None
        steps.append(step)
    for d, size in enumerate(storage.shape):
        last = start[d] + sum(step[d] * (n - 1) for step, n in zip(steps, tensor.shape, strict=True))
        if last >= max(size, 1):
            return None
    return start, steps
