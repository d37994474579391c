"""Plays a plan with the step machine of GPUs, an instruction a launch: a CUDA graph for each program."""

from typing import Any

import torch
from torch import Tensor

from fastgen.kernels.sampler import words
from fastgen.sampling.machine.gpu.draws import Draws
from fastgen.sampling.request import SampleRequest
from fastgen.sampling.run.fixed_request import FixedRequest
from fastgen.sampling.run.gpu_player import GPUPlayer


class GraphPlayer(GPUPlayer):
    """A `Player`. All draws and steps are replays; whatever the request says lies at fixed places.

    Steps whose programs the machine does not know are played by torch between them.
    """

    captures = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._fixed: FixedRequest | None = None
        places = (len(self.plan.order), words.PLACE_WORDS.value)
        self._code = torch.zeros(words.DRAWS_WORDS.value, dtype=torch.int64, device=self.device)
        self._places = torch.zeros(places, dtype=torch.int64, device=self.device)
        self._bad = torch.zeros(1, dtype=torch.int32, device=self.device)

    def alone(self, step: int) -> bool:
        return False

    def draw_all(self, request: SampleRequest, first: int) -> Tensor:
        draws = self._held(request)
        self.steps.go_to(first)
        row, of_place = self.draws_of_row
        for place in range(first, len(self.plan.order)):
            if self.knows(place + 1):
                self.steps.play(place + 1, draws)
            else:
                self.steps.draw(draws)
                super().step(place)
            done = place + 1
            if request.progress is not None and done % row == 0:
                request.progress((done - max(first, (done - 1) // row * row)) * of_place)
        return self._bad[0] != 0

    def _held(self, request: SampleRequest) -> tuple[Tensor, ...]:
        """What the kernel reads of a request."""
        if self._fixed is None or self._fixed.noise.shape != request.noise.shape:
            self._fixed = FixedRequest(request)
            self.steps.captured.clear()
        fixed = self._fixed
        draws = Draws(fixed.take(request), self.params(), self.levels, self.plan.order, self.plan.whole_pixels)
        self._code.copy_(draws.code)
        self._places.copy_(draws.places)
        self._bad.zero_()
        return self._code, self._places, fixed.noise, fixed.known, fixed.known_mask.view(torch.uint8), self._bad
