"""What the storages of tensors hold while a model is recorded, and where views lie in it."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastgen.sampling.trace.graph import Operand


@dataclass
class Storage:
    """What a storage holds: the map of a tensor that lies in it as (shape, strides, offset), or numbers of elements."""

    operand: Operand
    shape: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    offset: int = 0


def place_in(tensor: Tensor, storage: Storage) -> tuple[list[int], list[list[int]]] | None:
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
