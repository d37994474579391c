"""Plays a plan with the step machine of the CPU: many draws and steps a call, torch for what it does not know."""

import ctypes
import time
from collections import Counter
from collections.abc import Callable
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastgen.sampling.machine.cpu.build import machine
from fastgen.sampling.machine.cpu.draws import Draws, DrawsCode, knows
from fastgen.sampling.machine.cpu.pages import LINE, LargePages
from fastgen.sampling.machine.cpu.tables import Linker, Panels, words
from fastgen.sampling.machine.language import Memory, Program, views_of
from fastgen.sampling.machine.parts import Part, sections
from fastgen.sampling.plan.plan import Plan, Step
from fastgen.sampling.request import SampleRequest
from fastgen.sampling.run.memory import PlanMemory, Sizes
from fastgen.sampling.run.pace import Pace
from fastgen.sampling.run.torch_player import TorchPlayer
from fastgen.sampling.run.torch_program import TorchProgram

WORTH_A_THREAD = 2**15  # multiply-adds between two waits from which another thread may pay
CACHE = 12 * 2**20  # bytes of the last level of cache that weights and activations of a step may count on
MOST_DRAWS = 128  # of a call: so progress shows, Ctrl-C works, and numbers of threads are tried
FULL_TILES = 16  # images from which on products run at full speed


class ProgramCode(ctypes.Structure):
    _fields_: ClassVar = words("*code count threads")


class StepCode(ctypes.Structure):
    _fields_: ClassVar = words("program *offsets moves moves_end")


class MoveCode(ctypes.Structure):
    _fields_: ClassVar = words("*target *source image bytes")


class PlayCode(ctypes.Structure):
    _fields_: ClassVar = [
        ("programs", ctypes.POINTER(ProgramCode)),
        ("steps", ctypes.POINTER(StepCode)),
        ("moves", ctypes.POINTER(MoveCode)),
        ("draws", ctypes.POINTER(DrawsCode)),
        *words("images threads"),
    ]


def images_at_once(plan: Plan) -> int:
    """The images beyond which the weights would have to be fetched from memory again at every step."""
    (number, _), *_ = Counter(step.program for step in plan.steps).most_common(1)
    views = {view for one in plan.programs[number].instructions for view in views_of(one)}
    weights = {view.memory for view in views if view.memory.kind == "constant"}
    left = CACHE - sum(memory.numel * memory.dtype.itemsize for memory in weights)
    of_image = sum(view.numel * view.memory.dtype.itemsize for view in views if view.memory not in weights)
    return max(FULL_TILES, left // max(1, of_image))


def _check_lookups(missed: bool) -> None:
    """Raises IndexError."""
    if missed:
        raise IndexError(
            "index out of range: the model looks up a row that its table does not have, for a level or its condition"
        )


class CPUMemory(PlanMemory):
    """With conditions as the machine takes them. Images lie one after the other.

    Args:
        plan, n: as in `PlanMemory`.
        images: uint8 (images, bytes of each) of another memory of this plan, to serve again if they are enough.
    """

    held: ClassVar = {torch.bool: torch.float32}

    def __init__(self, plan: Plan, n: int, images: Tensor | None) -> None:
        self.images = images
        super().__init__(plan, n, torch.device("cpu"))

    def allocated(self, sizes: Sizes) -> dict[Memory | int, Tensor]:
        ends = list(accumulate(-(-size * dtype.itemsize // LINE) * LINE for size, dtype in sizes.values()))
        if self.images is None or len(self.images) < self.n:
            # An odd number of lines: a cache keeps few whose addresses differ by powers of two, and the same place of
            # all images is read at once.
            width = ends[-1] | LINE
            self.images = LargePages().take(self.n * width, torch.uint8).view(self.n, width)
        begins = [0, *ends]
        return {
            one: self.images[: self.n, begin : begin + size * dtype.itemsize].view(dtype)
            for begin, (one, (size, dtype)) in zip(begins, sizes.items(), strict=False)
        }


class CPUPlayer(TorchPlayer):
    """A `Player`. Programs that are all of the machine's are played in `play`, many draws in a call.

    Args:
        plan, n, device: as in `Player`.
        like: another one of this plan, to share weights and, where it is large enough, memory with.
    """

    memory: CPUMemory

    def __init__(self, plan: Plan, n: int, device: torch.device, like: "CPUPlayer | None" = None) -> None:
        self.machine = machine()
        self._panels: Panels = Panels(self.machine.panel) if like is None else like._panels
        self._images = None if like is None else like.memory.images
        super().__init__(plan, n, device)

    def another(self, n: int) -> "CPUPlayer":
        return CPUPlayer(self.plan, n, self.device, self)

    def allocated(self) -> PlanMemory:
        return CPUMemory(self.plan, self.n, self._images)

    def bound(self) -> list[Callable[[Step], None]]:
        self._linker = Linker(self.machine, self.n, self.memory, self._panels)
        self._codes = (ProgramCode * len(self.plan.programs))()
        self._held: list[object] = []
        self._threads: list[tuple[ProgramCode, int]] = []  # programs, and the most threads that pay for each
        found = [self._bound(number, program) for number, program in enumerate(self.plan.programs)]
        self._tables()
        self._pace = Pace(1)
        return found

    def begin(self, request: SampleRequest) -> None:
        for program, most in self._threads:
            program.threads = min(torch.get_num_threads(), max(most, self.n))
        threads = max((program.threads for program, _ in self._threads), default=1)
        if threads != self._pace.most:
            self._pace = Pace(threads)
        super().begin(request)

    def play(self, request: SampleRequest, first: int) -> Tensor | None:
        """Draws all places from number `first` on; whether a parameter was NaN. None: the machine cannot draw these."""
        if not knows(request, self.params(), self.levels):
            return None
        plan, count = self.plan, len(self.plan.order)
        draws = Draws(request, self.params(), self.levels, plan.order, plan.whole_pixels)
        code = PlayCode(self._codes, self._steps, self._moves, ctypes.pointer(draws.code), self.n, 1)
        row = self.levels.shape[-1] * (1 if plan.whole_pixels else self.levels.shape[1])
        turn = min(row, MOST_DRAWS)
        place = first
        while place < count:
            last = min(count, (place // turn + 1) * turn)
            code.threads, start = self._pace.threads(), time.perf_counter()
            stop = self.machine.play(ctypes.addressof(code), place, last)
            _check_lookups(stop < 0)
            self._pace.took(code.threads, (time.perf_counter() - start) / (stop - place + 1))
            if stop < last:  # the step after this draw is not all of the machine's
                self.step(stop)
                stop += 1
            if request.progress is not None:
                request.progress((stop - place) * (self.levels.shape[1] if plan.whole_pixels else 1))
            place = stop
        return draws.bad[0] != 0

    def _bound(self, number: int, program: Program) -> Callable[[Step], None]:
        slots = {view: k for k, view in enumerate(program.moving())}
        parts = sections(program)
        if len(parts) == 1 and parts[0].parts:
            return self._machine_section(parts[0].parts, number, slots, self._codes[number])
        steps = [
            self._machine_section(section.parts, number, slots, ProgramCode())
            if section.parts
            else TorchProgram(self.plan, number, self.memory, section.instructions)
            for section in parts
        ]

        def run(step: Step) -> None:
            for one in steps:
                one(step)

        return run

    def _machine_section(
        self, parts: list[Part], number: int, slots: dict[Any, int], program: ProgramCode
    ) -> Callable[[Step], None]:
        codes = self._linker.link(parts, number, slots)
        work = sum(part.depth * torch.Size(part.sizes).numel() * self.n for part in parts if part.depth)
        most = max(1, work // (1 + sum(code.waits for code in codes)) // WORTH_A_THREAD)
        program.code, program.count, program.threads = ctypes.addressof(codes), len(codes), 1
        self._held.append(codes)
        self._threads.append((program, most))
        address, run = ctypes.addressof(program), self.machine.run
        return lambda step: _check_lookups(run(address, step.offsets.ctypes.data, program.threads))

    def _tables(self) -> None:
        """The steps, and the rows of rings that move before them."""
        moves: list[MoveCode] = []
        self._steps = (StepCode * len(self.plan.steps))()
        for k, step in enumerate(self.plan.steps):
            first = len(moves)
            for target, source in self.memory.moves.get(k, ()):
                size = target.element_size()
                bytes_of_image = target.shape[1] * size
                moves.append(MoveCode(target.data_ptr(), source.data_ptr(), target.stride(0) * size, bytes_of_image))
            self._steps[k] = StepCode(step.program, step.offsets.ctypes.data, first, len(moves))
        self._moves = (MoveCode * max(1, len(moves)))(*moves)
