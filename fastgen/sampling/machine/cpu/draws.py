"""The machine's table of a request's draws: distribution, noise, known levels, and where those of each place lie."""

import ctypes
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastgen.distributions import Bernoulli, Categorical, LogisticMixture
from fastgen.sampling.machine.cpu.tables import words
from fastgen.sampling.request import SampleRequest

KINDS = {Categorical: 0, Bernoulli: 1, LogisticMixture: 2}


class Placed(ctypes.Structure):
    """A tensor with places, as `machine.h` has it."""

    _fields_: ClassVar = words("*base *at image channel level")


class DrawsCode(ctypes.Structure):
    _fields_: ClassVar = [
        *words("kind channels levels parameters"),
        *((name, Placed) for name in ("params", "drawn", "noise", "known", "mask")),
        *((name, ctypes.c_double) for name in ("temperature", "top_p")),
        *words("top_k *first_channel *bad"),
    ]


class Draws:
    """Holds what the table points to. `bad` (1,) is not 0 once a parameter was NaN."""

    def __init__(
        self,
        request: SampleRequest,
        params: Tensor,
        levels: Tensor,
        order: Sequence[tuple[int, int, int]],
        whole_pixels: bool,
    ) -> None:
        distribution: Any = request.distribution
        self.bad = torch.zeros(1, dtype=torch.int64)
        self._held: list[Tensor] = [self.bad]
        index = torch.tensor(order)
        self._rows, self._columns = index[:, 1], index[:, 2]
        self._first = self._hold(torch.zeros_like(self._rows) if whole_pixels else index[:, 0].contiguous())
        code = self.code = DrawsCode()
        code.kind = KINDS[type(distribution)]
        code.channels = levels.shape[1] if whole_pixels else 1
        code.temperature = distribution.temperature
        code.first_channel = self._first.data_ptr()
        code.bad = self.bad.data_ptr()
        if isinstance(distribution, Categorical):
            code.levels, code.top_k, code.top_p = distribution.levels, distribution.top_k or 0, distribution.top_p or 0
            params = distribution.logits(params).transpose(1, 2)  # (n, C, K, H, W)
        elif isinstance(distribution, Bernoulli):
            params = params.unsqueeze(2)
        else:
            code.levels, code.parameters = distribution.n_mix, params.shape[1]
            params = params.unsqueeze(1)
        code.params = self._placed(params, params.stride(2))
        code.drawn = self._placed(levels)
        code.noise = self._placed(request.noise)
        if request.known is not None and request.known_mask is not None:
            code.known, code.mask = self._placed(request.known), self._placed(request.known_mask)

    def _hold(self, tensor: Tensor) -> Tensor:
        self._held.append(tensor)
        return tensor

    def _placed(self, tensor: Tensor, level: int = 0) -> Placed:
        """tensor (n, channels, ..., H, W)"""
        self._hold(tensor)
        at = self._hold(self._rows * tensor.stride(-2) + self._columns * tensor.stride(-1))
        return Placed(tensor.data_ptr(), at.data_ptr(), tensor.stride(0), tensor.stride(1), level)


def knows(request: SampleRequest, params: Tensor, levels: Tensor) -> bool:
    """Whether the machine can draw for a request."""
    types = params.dtype, request.noise.dtype, levels.dtype
    return type(request.distribution) in KINDS and types == (torch.float32, torch.float32, torch.int64)
