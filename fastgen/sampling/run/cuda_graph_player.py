"""The steps of a run as CUDA graphs: a row of draws a graph, nothing that the host has to wait for in between."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastgen.sampling.request import SampleRequest
from fastgen.sampling.run.draw_loop import draw_place
from fastgen.sampling.run.torch_player import TorchPlayer


class CudaGraphPlayer(TorchPlayer):
    """A `Run` whose draws and steps are captured the second time that they are asked for, and replayed then.

    What differs from batch to batch is copied to fixed places: noise, known levels. The first batch runs eagerly,
    which also warms up what may not be initialized during a capture.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._captured: dict[Any, dict[int, torch.cuda.CUDAGraph]] = {}
        self._request: SampleRequest | None = None
        self._bad = torch.zeros((), dtype=torch.bool, device=self.device)

    def play(self, request: SampleRequest, first: int) -> Tensor | None:
        key = (repr(request.distribution), request.known is None)
        if key not in self._captured:
            self._captured[key] = {}
            return None
        fixed = self._held(request)
        self._bad.zero_()
        graphs = self._captured[key]
        for start, stop in self._rows(first):
            if start not in graphs and start >= first:
                graphs[start] = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graphs[start]):
                    for place in range(start, stop):
                        draw_place(self, fixed, place, self._bad)
            if start >= first:
                graphs[start].replay()
            else:  # known levels may end in the middle of a row
                for place in range(first, stop):
                    draw_place(self, fixed, place, self._bad)
            if request.progress is not None:
                request.progress((stop - max(start, first)) * (request.shape[0] if self.plan.whole_pixels else 1))
        return self._bad.clone()

    def _held(self, request: SampleRequest) -> SampleRequest:
        """The request with its noise and known levels copied to where the graphs read them."""
        if self._request is None:
            zeros = torch.zeros((self.n, *request.shape), dtype=torch.long, device=self.device)
            self._request = replace(
                request, noise=torch.empty_like(request.noise), known=zeros, known_mask=zeros.bool(), progress=None
            )
        held = self._request
        held.noise.copy_(request.noise)
        if request.known is None or held.known is None or held.known_mask is None:
            return replace(held, distribution=request.distribution, known=None, known_mask=None)
        held.known.copy_(request.known)
        assert request.known_mask is not None
        held.known_mask.copy_(request.known_mask)
        return replace(held, distribution=request.distribution)

    def _rows(self, first: int) -> Iterator[tuple[int, int]]:
        """Pieces of the drawing order, those before `first` left out."""
        length = self.plan.levels.shape[-1] * (1 if self.plan.whole_pixels else self.plan.levels.shape[1])
        for start in range(0, len(self.plan.order), length):
            stop = min(start + length, len(self.plan.order))
            if stop > first:
                yield start, stop
