"""The steps of a run as CUDA graphs of torch's operations: a row of draws a graph, nothing that the host has to wait
for in between. For what the step machine does not know, see `run.graph_player`."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastgen.sampling.request import SampleRequest
from fastgen.sampling.run.draw_loop import draw_place
from fastgen.sampling.run.fixed_request import FixedRequest
from fastgen.sampling.run.margin import Held
from fastgen.sampling.run.torch_player import TorchPlayer

MOST_CAPTURED = 3  # distributions, options included, whose graphs are kept: hundreds of megabytes each
Graphs = dict[int, torch.cuda.CUDAGraph]  # by the number of the first place


class CudaGraphPlayer(TorchPlayer):
    """A player whose draws and steps are captured the second time that they are asked for, and replayed then.

    What differs from batch to batch is copied to fixed places: noise, known levels. The first batch runs eagerly,
    which also warms up what may not be initialized during a capture. All graphs share one pool of memory, which is
    safe as they run one after another and leave nothing in it.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._captured = Held[dict[bool, Graphs]](MOST_CAPTURED)  # by distribution; then whether levels are known
        self._fixed: FixedRequest | None = None
        self._bad = torch.zeros((), dtype=torch.bool, device=self.device)
        with torch.cuda.device(self.device):  # the default stream of captures is that of whichever device came first
            self._stream, self._pool = torch.cuda.Stream(self.device), torch.cuda.graph_pool_handle()

    def play(self, request: SampleRequest, first: int) -> Tensor | None:
        by_known = self._captured.get(request.distribution) or {}
        self._captured.put(request.distribution, by_known)
        known = request.known is not None
        if known not in by_known:
            by_known[known] = {}
            return None
        draws = request.shape[0] if self.plan.whole_pixels else 1
        with torch.cuda.device(self.device):
            self._fixed = self._fixed or FixedRequest(request)
            fixed = self._fixed.take(request)
            self._bad.zero_()
            for start, stop in self._rows(first):
                if start >= first:
                    graph = by_known[known].get(start) or self._capture(by_known[known], fixed, start, stop)
                    graph.replay()
                else:  # known levels end in the middle of a row
                    for place in range(first, stop):
                        draw_place(self, fixed, place, self._bad)
                if request.progress is not None:
                    request.progress((stop - max(start, first)) * draws)
            return self._bad.clone()

    def _capture(self, graphs: Graphs, fixed: SampleRequest, start: int, stop: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            for place in range(start, stop):
                draw_place(self, fixed, place, self._bad)
        graphs[start] = graph
        return graph

    def _rows(self, first: int) -> Iterator[tuple[int, int]]:
        """Pieces of the drawing order, those before `first` left out."""
        length = self.plan.levels.shape[-1] * (1 if self.plan.whole_pixels else self.plan.levels.shape[1])
        for start in range(0, len(self.plan.order), length):
            stop = min(start + length, len(self.plan.order))
            if stop > first:
                yield start, stop
