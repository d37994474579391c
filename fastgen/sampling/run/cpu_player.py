"""The steps of a run in machine code, as far as the step machine knows their instructions."""

import ctypes
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastgen.sampling.machine.cpu.build import machine
from fastgen.sampling.machine.cpu.encode import Part, Unknown, translate
from fastgen.sampling.machine.cpu.link import Linker
from fastgen.sampling.plan.plan import Plan
from fastgen.sampling.plan.program import Instruction, Program, Temporary
from fastgen.sampling.request import SampleRequest
from fastgen.sampling.run.torch_player import Run

Step = Callable[[Any], None]
WORTH_A_THREAD = 2**17  # multiply-adds between two waits from which another thread pays
CACHE = 12 * 2**20  # bytes of the last level of cache that weights and activations of a step may count on
FULL_TILES = 16  # images from which on products run at full speed


def images_at_once(plan: Plan) -> int:
    """The images beyond which the weights would have to be fetched from memory again at every step."""
    (number, _), *_ = Counter(number for number, _ in plan.steps).most_common(1)
    program = plan.programs[number]
    weights = {id(one): one for step in program.instructions for one in step.args if isinstance(one, Tensor)}
    views = {view for step in program.instructions for view in step.views()}
    left = CACHE - sum(one.numel() * one.element_size() for one in weights.values())
    of_image = sum(view.numel * view.memory.dtype.itemsize for view in views if view.memory.kind != "constant")
    return max(FULL_TILES, left // max(1, of_image))


@dataclass
class Section:
    """Instructions in a row that the machine knows, as `parts`, or else as they are."""

    parts: list[Part] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)


class Offsets(list[Any]):
    """Of a step: as a program in Python takes them, and where the machine finds those of moving views."""

    def __init__(self, offsets: list[Any]) -> None:
        super().__init__(offsets)
        numbers = [one for one in offsets if isinstance(one, int)]
        self._numbers = (ctypes.c_int64 * len(numbers))(*numbers)
        self.address = ctypes.addressof(self._numbers)


class CompiledRun(Run):
    def bound(self) -> list[Step]:
        self.threads = torch.get_num_threads()
        self._linker = Linker(machine(), self.n, self.block)  # holds what the machine's code points to
        return [self._step(program, self._linker) for program in self.plan.programs]

    def offsets(self, offsets: list[Any]) -> Offsets:
        return Offsets(offsets)

    def begin(self, job: SampleRequest) -> None:
        self.threads = torch.get_num_threads()
        super().begin(job)

    def _step(self, program: Program, linker: Linker) -> Step:
        slots = {view: k for k, view in enumerate(program.views())}
        steps: list[Step] = []
        for section in sections(program):
            if section.parts:
                steps.append(self._machine_step(section.parts, linker, slots))
            else:
                steps.append(program.bind(self.n, self.block, self.on_device, section.instructions))
        if len(steps) == 1:
            return steps[0]

        def step(offsets: Any) -> None:
            for one in steps:
                one(offsets)

        return step

    def _machine_step(self, parts: list[Part], linker: Linker, slots: Any) -> Step:
        codes = linker.link(parts, slots)
        address, count, run = ctypes.addressof(codes), len(codes), linker.machine.run
        work = sum(part.weight.numel() * self.n for part in parts if part.weight is not None)
        waits = 1 + sum(code.waits for code in codes)
        most = max(1, work // waits // WORTH_A_THREAD)

        def step(offsets: Offsets, keep: Any = codes) -> None:
            run(address, count, offsets.address, min(self.threads, most))

        return step


def sections(program: Program) -> list[Section]:
    found: list[Section] = []
    last_use = {}
    for k, instruction in enumerate(program.instructions):
        for one in (*instruction.args, *instruction.kwargs.values()):
            if isinstance(one, Temporary):
                last_use[one] = k
    open_until = -1  # new tensors live within one section
    for k, instruction in enumerate(program.instructions):
        if instruction.result is not None:
            open_until = max(open_until, last_use.get(instruction.result, k))
        parts: list[Part] = []
        if k > open_until:
            with suppress(Unknown):
                parts = translate(instruction)
        if not found or bool(parts) != bool(found[-1].parts):
            found.append(Section())
        found[-1].parts += parts
        if not parts:
            found[-1].instructions.append(instruction)
    return found
