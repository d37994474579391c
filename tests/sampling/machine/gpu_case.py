"""Programs written by hand, played by the step machine of GPUs over blocks of numbers."""

import torch

from fastgen.kernels.sampler.machine import Tiles, play
from fastgen.sampling.machine.gpu.fusion import Fused, fuse
from fastgen.sampling.machine.gpu.tables import Linker, with_views
from fastgen.sampling.machine.language import AffineOffset, Memory, Program, View, dense_strides
from fastgen.sampling.machine.parts import HALF, part_of
from fastgen.sampling.plan.plan import Step

N = 3  # images
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Blocks:
    """Memories in two arenas, as `run.arena` has them; numbers that nobody has written are NaN."""

    def __init__(self):
        self.data = {}
        self.blocks = {}

    def view(self, data, strides=None):
        """A memory for data (N, ...), and the view of it."""
        memory = Memory("stored", len(self.data), data[0].numel(), data.dtype)
        self.data[memory] = data.reshape(N, -1)
        sizes = tuple(data.shape[1:])
        return View(memory, sizes, strides or dense_strides(sizes), AffineOffset(0), 0)

    def empty(self, *sizes, dtype=torch.float32):
        return self.view(torch.full((N, *sizes), float("nan") if dtype.is_floating_point else -1).to(dtype))

    def add_constants(self, fused):
        for one in fused:
            for side in one.sides:
                if side.view.memory.kind == "constant":
                    self.data.setdefault(side.view.memory, side.view.memory.data.view(1, -1))

    def place(self):
        self.arenas = {}
        for dtype in (torch.float32, torch.int64):
            held = (torch.float32, torch.bool, *HALF) if dtype == torch.float32 else (dtype,)
            here = {memory: data for memory, data in self.data.items() if data.dtype in held}
            arena = torch.zeros(16 + sum(data.numel() for data in here.values()), dtype=dtype, device=DEVICE)
            start = 16
            for memory, data in here.items():
                self.blocks[memory] = arena[start : start + data.numel()].view(data.shape)
                self.blocks[memory].copy_(data)
                start += data.numel()
            self.arenas[dtype] = arena

    def block(self, memory, program=0):
        return self.blocks[memory]

    def read(self, view):
        """What a view holds, (N, ...)."""
        return self.blocks[view.memory].view(N, *view.sizes).cpu()


def run(blocks, instructions, offsets=None, moves=(), slots=None, join=None, precision="widened"):
    """Plays instructions as the program of one step; moves: (target, source) columns as slices of a view's block; join:
    makes fused ones of them, one of each where there is None; precision: as of `play`."""
    numbers, tiles = {}, Tiles()
    fused = [Fused(part_of(one, half=True)) for one in instructions] if join is None else join(instructions)
    fused = [with_views(one, numbers) for one in fused]
    blocks.add_constants(fused)
    blocks.place()
    step = Step(0, torch.tensor(offsets or [], dtype=torch.int64).numpy())
    moved = [
        (blocks.block(view.memory)[:, target], blocks.block(view.memory)[:, source]) for view, target, source in moves
    ]
    tables = Linker(blocks, tiles.BN, tiles.BK).link([(fused, slots or {})], [step], {0: moved}, DEVICE)
    floats, integers = blocks.arenas[torch.float32], blocks.arenas[torch.int64]
    meeting = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    tensors = (floats, integers, *tables.read(), *tables.no_request(floats), tables.steps, meeting)
    play(tensors, tiles, precision, (-1, 0, 0), False, N)


def by_gpu_machine(blocks, instructions, offsets=()):
    """Plays instructions, joined, on the blocks of `played`."""
    arenas = Blocks()
    arenas.data = dict(blocks.blocks)
    slots = {view: k for k, view in enumerate(Program(list(instructions)).moving())}
    run(arenas, instructions, list(offsets), slots=slots, join=fuse)
    for memory, block in blocks.blocks.items():
        block.copy_(arenas.blocks[memory])
