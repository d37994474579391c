"""A few instructions on memory made up for a test, played by the C++ machine and by torch."""

import ctypes
import itertools
import math
from types import SimpleNamespace

import numpy as np
import torch

from fastgen.sampling.machine.cpu.build import machine
from fastgen.sampling.machine.cpu.tables import Linker, Panels
from fastgen.sampling.machine.language import AffineOffset, Memory, Program, View, dense_strides
from fastgen.sampling.machine.parts import part_of
from fastgen.sampling.plan.plan import Step
from fastgen.sampling.run.cpu_player import ProgramCode
from fastgen.sampling.run.torch_program import TorchProgram

N = 3  # images
_numbers = itertools.count()


class Blocks:
    """Memory of N images, as `PlanMemory` gives it to players."""

    device = torch.device("cpu")

    def __init__(self):
        self.blocks = {}

    def new(self, numel, dtype=torch.float32, fill=math.nan):
        """A memory of so many numbers an image; the machines hold conditions as numbers."""
        memory = Memory("stored", next(_numbers), numel, dtype)
        self.blocks[memory] = torch.full((N, numel), fill, dtype=torch.float32 if dtype == torch.bool else dtype)
        return memory

    def holding(self, data):
        """A view of a new memory that holds data (N, ...)."""
        memory = self.new(data[0].numel(), data.dtype, 0)
        self.blocks[memory].copy_(data.reshape(N, -1))
        return View(memory, tuple(data.shape[1:]), dense_strides(data.shape[1:]), AffineOffset(0), 0)

    def result(self, *sizes, dtype=torch.float32):
        """A view of a new memory that is all NaN."""
        memory = self.new(math.prod(sizes), dtype, math.nan if dtype.is_floating_point else -9)
        return View(memory, sizes, dense_strides(sizes), AffineOffset(0), 0)

    def block(self, memory, program=0):
        return memory.data.view(1, -1) if memory.data is not None else self.blocks[memory]

    def strided(self, view, program=0):
        block = self.block(view.memory)
        rows = 0 if view.memory.kind == "constant" else block.stride(0)
        return block, (N, *view.sizes), (rows, *view.strides)

    def read(self, view, offset=0):
        """(N, *sizes)"""
        return torch.as_strided(*self.strided(view), offset if view.moves else view.offset.at(()))

    def copy(self):
        found = Blocks()
        found.blocks = {memory: block.clone() for memory, block in self.blocks.items()}
        return found


def linked(blocks, instructions, threads=1):
    """What the machine plays, `(program, what it points to)`. Raises Unknown."""
    slots = {view: k for k, view in enumerate(Program(list(instructions)).moving())}
    parts = [part_of(one) for one in instructions]
    linker = Linker(machine(), N, blocks, Panels(machine().panel))
    codes = linker.link(parts, 0, slots)
    return ProgramCode(ctypes.addressof(codes), len(codes), threads), (linker, codes)


def by_machine(blocks, instructions, offsets=(), threads=1):
    program, held = linked(blocks, instructions, threads)
    numbers = np.array([*offsets, 0], dtype=np.int64)
    machine().run(ctypes.addressof(program), numbers.ctypes.data, threads)
    return held


def by_torch(blocks, instructions, offsets=()):
    plan = SimpleNamespace(programs=[Program(list(instructions))])
    TorchProgram(plan, 0, blocks)(Step(0, np.array(offsets, dtype=np.int64)))
