"""Steps of a plan over a whole GPU, an instruction a launch, as CUDA graphs that serve all steps of a program."""

from typing import Any

import torch
from torch import Tensor

from fastgen.kernels.common import cdiv
from fastgen.kernels.sampler import words
from fastgen.kernels.sampler.machine import Tiles, play_one, programs_for
from fastgen.sampling.machine.gpu.tables import Tables

Key = tuple[int, int, bool]  # a program, the copies before its step, whether a place is drawn before


class StepLaunches:
    """The step that comes next, and the place that is drawn next, stand on the device.

    Args:
        arenas: of float32 and int64.
        tables, tiles, precision: as the kernel takes them.
        n: images.
        captures: whether launches are captured the second time that they are asked for. The first time warms up what
            may not be initialized during a capture.

    Attributes:
        launches: of the kernel, so far, those of graphs included.
        captured: graphs.
    """

    def __init__(
        self, arenas: tuple[Tensor, Tensor], tables: Tables, tiles: Tiles, precision: str, n: int, captures: bool
    ) -> None:
        self.launches = 0
        self.captured: dict[Key, Any] = {}
        self._tensors = (*arenas, *tables.read())
        self._next = torch.zeros(2, dtype=torch.int64, device=arenas[0].device)
        self._meeting = torch.zeros(2, dtype=torch.int32, device=arenas[0].device)
        self._no_draws = tables.no_request(arenas[0])
        self._tiles, self._precision, self._n, self._captures = tiles, precision, n, captures
        self._programs, self._steps = tables.programs.tolist(), tables.steps.tolist()
        self._grids = [programs_for(code, n, tiles) for code in tables.codes.tolist()]
        self._asked: set[Key] = set()
        self._stream: Any = None

    def go_to(self, place: int) -> None:
        """What comes next is the draw of a place, or else the step before it."""
        self._next.fill_(place)

    def draw(self, draws: tuple[Tensor, ...]) -> None:
        """Draws the next place without its step."""
        self._launch([(words.DRAW.value, cdiv(self._n, self._tiles.ROWS)), (words.NOTHING.value, 1)], draws)
        self.launches += 2

    def play(self, step: int, draws: tuple[Tensor, ...] | None) -> None:
        """Plays a step, the next one, and draws the place before it where there are draws: the tables of a request, at
        the same addresses always."""
        program, _, _, moves = self._steps[step]
        key = program, moves, draws is not None
        launches, graph = self._of(*key), self.captured.get(key)
        if graph is None and self._captures and key in self._asked:
            graph = self.captured[key] = self._capture(launches, draws)
        self._asked.add(key)
        if graph is None:
            self._launch(launches, draws)
        else:
            graph.replay()
        self.launches += len(launches)

    def _of(self, program: int, moves: int, drawing: bool) -> list[tuple[int, int]]:
        """What is launched, and with how many programs."""
        first, count = self._programs[program]
        found = [(words.DRAW.value, cdiv(self._n, self._tiles.ROWS))] if drawing else []
        found += [(1 + k, cdiv(self._n, self._tiles.BM)) for k in range(moves)]
        found += [(1 + moves + k, self._grids[first + k]) for k in range(count)]
        return [*found, (words.NOTHING.value, 1)] if len(found) == drawing else found

    def _launch(self, launches: list[tuple[int, int]], draws: tuple[Tensor, ...] | None) -> None:
        tensors = (*self._tensors, *(draws or self._no_draws), self._next, self._meeting)
        for what, programs in launches:
            play_one(tensors, self._tiles, self._precision, what, programs, self._n)

    def _capture(self, launches: list[tuple[int, int]], draws: tuple[Tensor, ...] | None) -> Any:
        device = self._next.device
        with torch.cuda.device(device):  # the default stream of captures is that of whichever device came first
            self._stream = self._stream or torch.cuda.Stream(device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._launch(launches, draws)
        return graph
