"""The steps of a run as CUDA graphs: a row of draws a graph, nothing that the host has to wait for in between."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastgen.sampling.request import SampleRequest
from fastgen.sampling.run.torch_player import Run, draw_place


class GraphRun(Run):
    """A `Run` whose draws and steps are captured the second time that they are asked for, and replayed then.

    What differs from batch to batch is copied to fixed places: noise, known levels. The first batch runs eagerly,
    which also warms up what may not be initialized during a capture.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._captured: dict[Any, dict[int, torch.cuda.CUDAGraph]] = {}
        self._noise: Tensor | None = None
        self._known: tuple[Tensor, Tensor] | None = None
        self._bad = torch.zeros((), dtype=torch.bool, device=self.device)

    def draw_from(self, job: SampleRequest, first: int) -> Tensor:
        key = (repr(job.distribution), self.forced is None)
        if key not in self._captured:
            self._captured[key] = {}
            return super().draw_from(job, first)
        if self._noise is None or self._noise.shape != job.noise.shape:
            self._noise = torch.empty_like(job.noise)
        self._noise.copy_(job.noise)
        if self.forced is not None and self.given is not None:
            if self._known is None:
                self._known = torch.empty_like(self.given), torch.empty_like(self.forced)
            self._known[0].copy_(self.given)
            self._known[1].copy_(self.forced)
        known, mask = self._known if self.forced is not None and self._known is not None else (None, None)
        self._bad.zero_()
        graphs = self._captured[key]
        for start, stop in self._rows(first):
            if start not in graphs and start >= first:
                graphs[start] = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graphs[start]):
                    for place in range(start, stop):
                        draw_place(self, job.distribution, self._noise, known, mask, place, self._bad)
            if start >= first:
                graphs[start].replay()
            else:  # a correction may begin in the middle of a row
                for place in range(first, stop):
                    draw_place(self, job.distribution, self._noise, known, mask, place, self._bad)
            if job.progress is not None and first == 0:
                job.progress((stop - start) * (self.channels if self.plan.whole_pixels else 1))
        return self._bad.clone()

    def _rows(self, first: int) -> Iterator[tuple[int, int]]:
        """Pieces of the drawing order, those before `first` left out."""
        length = self.plan.levels.shape[-1] * (1 if self.plan.whole_pixels else self.channels)
        for start in range(0, len(self.plan.order), length):
            stop = min(start + length, len(self.plan.order))
            if stop > first:
                yield start, stop
