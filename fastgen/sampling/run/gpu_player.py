"""Plays a plan with the step machine of GPUs: draws and steps of whole images in one launch."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fastgen.kernels.common import cdiv, processors_of
from fastgen.kernels.sampler.machine import PATIENCE, Tiles, play, tiles_for
from fastgen.sampling.machine.gpu.draws import Draws, unknown_draws
from fastgen.sampling.machine.gpu.fusion import Fused, fuse
from fastgen.sampling.machine.gpu.tables import Linker, with_views
from fastgen.sampling.machine.language import View
from fastgen.sampling.machine.parts import unknown_in
from fastgen.sampling.plan.plan import Plan, Step
from fastgen.sampling.plan.temporaries import share_scratch
from fastgen.sampling.request import SampleRequest
from fastgen.sampling.run.arena import ArenaMemory
from fastgen.sampling.run.memory import PlanMemory
from fastgen.sampling.run.step_launches import StepLaunches
from fastgen.sampling.run.torch_player import TorchPlayer
from fastgen.sampling.run.torch_program import TorchProgram

# Multiply-adds of one processor in the time that a launch takes: an assumption, not measured.
WORTH_A_LAUNCH = 2**20


def heavy_programs(plan: Plan, images: int, tiles: Tiles, processors: float) -> set[int]:
    """Numbers of those that the whole GPU plays sooner, an instruction a launch, than a part of it in one launch."""
    found = set()
    for number, program in enumerate(plan.programs):
        joined = [] if unknown_in(program) else fuse(program.instructions)
        work = sum(one.head.depth * torch.Size(one.head.sizes).numel() for one in joined)  # for an image
        if work * (tiles.BM - images / processors) > WORTH_A_LAUNCH * len(joined):
            found.add(number)
    return found


# Of a product of two numbers, at most. Each of them is taken as two of 11 bits, which leaves out 2^-22 of it, and the
# product of the two lower ones, another 2^-22, is left out, too. Float32 itself rounds by 2^-24.
ERROR_OF_TF32X3 = 3 * 2.0**-22
PRODUCTS = {
    "tf32x3": f"by TF32 three times, each wrong by {ERROR_OF_TF32X3:.1e} of it at most",
    **dict.fromkeys(("ieee", "widened"), "in IEEE arithmetic"),
}  # by precision, for people


def precision_on(device: torch.device) -> str:
    """Of products of float32: by TF32 thrice, see `ERROR_OF_TF32X3`, where there is such a unit."""
    if device.type != "cuda":
        return "widened"
    tensor_cores = torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
    return "tf32x3" if tensor_cores else "ieee"


class GPUPlayer(TorchPlayer):
    """A `Player`. Between launches of draws and steps, steps of heavy programs are played over the whole GPU, an
    instruction a launch, and those whose programs the machine does not know by torch.

    Attributes:
        steps: plays single steps over the whole GPU.
        captures: whether it captures them on a device without graphs, too.
        heavy: numbers of programs.
        together: programs of a launch that share images, as far as all run at the same time. More than one has not been
            measured on any GPU: nothing chooses it.
        patience: of programs that wait for another one, in looks.
    """

    tiles: Tiles | None = None
    together, patience = 1, PATIENCE
    captures = False

    def allocated(self) -> PlanMemory:
        numbers: dict[float, View] = {}
        self.tiles = self.tiles or tiles_for(self.n, self.device)
        self._fused: list[list[Fused] | None] = []
        # Steps move rows of rings before their instructions: torch plays all where the arenas have no such rows.
        rings = {ArenaMemory.held.get(ring.dtype, ring.dtype) for ring in self.plan.rings}
        for program in self.plan.programs:
            known = rings <= {torch.float32, torch.int64} and not unknown_in(program)
            self._fused.append([with_views(one, numbers) for one in fuse(program.instructions)] if known else None)
        sides = [side for fused in self._fused for one in fused or () for side in one.sides]
        constants = dict.fromkeys(side.view.memory for side in sides if side.view.memory.kind == "constant")
        # An instruction writes as early as its first part does, into what must be free by then.
        touched = [
            program.views if fused is None else [one.views for one in fused]
            for program, fused in zip(self.plan.programs, self._fused, strict=True)
        ]
        plan = replace(self.plan, scratch=share_scratch(touched))
        self._arena = ArenaMemory(plan, self.n, self.device, constants)
        return self._arena

    def bound(self) -> list[Callable[[Step], None]]:
        self._launched = 0
        self.precision = precision_on(self.device)
        assert self.tiles is not None
        tiles = self.tiles
        programs = [
            None if fused is None else (fused, {view: k for k, view in enumerate(program.moving())})
            for program, fused in zip(self.plan.programs, self._fused, strict=True)
        ]
        linker = Linker(self.memory, tiles.BN, tiles.BK)
        self.tables = linker.link(programs, self.plan.steps, self.memory.moves, self.device)
        arenas = (self._arena.arenas[torch.float32], self._arena.arenas[torch.int64])
        captures = self.captures or self.device.type == "cuda"
        self.steps = StepLaunches(arenas, self.tables, tiles, self.precision, self.n, captures)
        self._meeting = torch.zeros(1 + cdiv(self.n, tiles.BM), dtype=torch.int32, device=self.device)
        self.heavy = heavy_programs(self.plan, self.n, tiles, processors_of(self.device))
        return [
            TorchProgram(self.plan, number, self.memory, None if fused is None else ())
            for number, fused in enumerate(self._fused)
        ]

    @property
    def launches(self) -> int:
        """Of kernels, so far."""
        return self._launched + self.steps.launches

    @property
    def arrivals(self) -> int:
        """Of programs at barriers, in the latest launch of several that share images."""
        return int(self._meeting[1:].sum())

    def knows(self, step: int) -> bool:
        return self._fused[self.plan.steps[step].program] is not None

    def alone(self, step: int) -> bool:
        """Whether a step is played within a launch of draws and steps."""
        return self.knows(step) and self.plan.steps[step].program not in self.heavy

    def run(self, number: int) -> None:
        if self.alone(number):
            self._launch(None, number - 1, number, number)
        elif self.knows(number):
            self.steps.go_to(number)
            self.steps.play(number, None)
        else:
            super().run(number)

    @property
    def draws_of_row(self) -> tuple[int, int]:
        """Places of a row, and draws of a place."""
        channels, columns = self.levels.shape[1], self.levels.shape[-1]
        return (columns, channels) if self.plan.whole_pixels else (columns * channels, 1)

    def step(self, place: int) -> None:
        if self.knows(place + 1):
            self.run(place + 1)  # moves included
        else:
            super().step(place)

    def play(self, request: SampleRequest, first: int) -> Tensor | None:
        """Draws all places from number `first` on; whether a parameter was NaN. None: the machine cannot draw these."""
        assert self.tiles is not None
        arena = self._arena.arenas[torch.float32]
        if unknown_draws(request, self.params(), arena, self.tiles.LEVELS) is not None:
            return None
        return self.draw_all(request, first)

    def draw_all(self, request: SampleRequest, first: int) -> Tensor:
        plan, count = self.plan, len(self.plan.order)
        draws = Draws(request, self.params(), self.levels, plan.order, plan.whole_pixels)
        row, of_place = self.draws_of_row
        place = first
        while place < count:
            # All in one launch, where nobody wants to see how it goes.
            last = count if request.progress is None else min(count, (place // row + 1) * row)
            stop = next((k for k in range(place, last) if not self.alone(k + 1)), last)
            self._launch(draws, place, min(stop + 1, last), stop)
            if stop < last:
                self.step(stop)
                stop += 1
            if request.progress is not None:
                request.progress((stop - place) * of_place)
            place = stop
        return draws.bad[0] != 0

    def _launch(self, draws: Draws | None, first: int, last: int, until: int) -> None:
        """Places from `first`: to before `last` they are drawn, to before `until` their steps follow."""
        assert self.tiles is not None
        floats, integers = (self._arena.arenas[one] for one in (torch.float32, torch.int64))
        request = self.tables.no_request(floats) if draws is None else draws.read()
        tensors = (floats, integers, *self.tables.read(), *request, self.tables.steps, self._meeting)
        together = max(1, min(self.together, processors_of(self.device) // cdiv(self.n, self.tiles.BM)))
        if together > 1:
            self._meeting.zero_()
        self._launched += 1
        places = first, last, until
        play(tensors, self.tiles, self.precision, places, draws is not None, self.n, together, self.patience)
        if together > 1 and int(self._meeting[0]):
            raise RuntimeError(f"of {together} programs that share images one was missing")
