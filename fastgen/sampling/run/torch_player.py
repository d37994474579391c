"""Plays a plan with torch, a call an instruction: the definition, on any device and in any float dtype."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastgen.sampling.plan.plan import Plan, Step
from fastgen.sampling.request import SampleRequest
from fastgen.sampling.run.memory import PlanMemory
from fastgen.sampling.run.prefill import prefill
from fastgen.sampling.run.torch_program import TorchProgram


class TorchPlayer:
    """A `Player`, see `run.draw_loop`. Subclasses play programs in another way."""

    def __init__(self, plan: Plan, n: int, device: torch.device) -> None:
        self.plan, self.n, self.device = plan, n, device
        self.memory = self.allocated()
        self.levels = self.memory.levels
        self.programs = self.bound()

    def another(self, n: int) -> "TorchPlayer":
        return type(self)(self.plan, n, self.device)

    def allocated(self) -> PlanMemory:
        return PlanMemory(self.plan, self.n, self.device)

    def bound(self) -> list[Callable[[Step], None]]:
        """The plan's programs, ready to run on this batch."""
        return [TorchProgram(self.plan, number, self.memory) for number in range(len(self.plan.programs))]

    def params(self) -> Tensor:
        """The model's output for what has been drawn, (n, ..., H, W), a view."""
        return self.memory.params

    def begin(self, request: SampleRequest) -> None:
        """Takes the condition, sets all levels to zero, computes what depends on no pixel."""
        self.levels.zero_()
        leaves = [leaf for leaf in tree_leaves(request.condition) if isinstance(leaf, Tensor) and leaf.dim()]
        for value, leaf in zip(self.plan.leaves, leaves, strict=True):
            self.memory.inner(value).copy_(leaf.view(self.n, *value.shape))
        self.memory.rewind()
        self.run(0)

    def step(self, place: int) -> None:
        """Computes what the level drawn at this place decides."""
        for target, source in self.memory.moves.get(place + 1, ()):
            target.copy_(source.clone())
        self.run(place + 1)

    def run(self, number: int) -> None:
        """Runs the program of a step; step 0 comes before the first draw."""
        step = self.plan.steps[number]
        self.programs[step.program](step)

    def fill_known(self, levels: Tensor, count: int) -> None:
        """Computes all that the first `count` places of levels (n, C, H, W) decide, in one pass."""
        self.levels.copy_(levels)
        given = {  # players may hold half precision as float32
            value: self.memory.inner(value).to(value.data.dtype).contiguous()
            for value in (self.plan.levels, *self.plan.leaves)
        }
        prefill(self.plan, given, lambda value, found: self.memory.keep(value, found, count))
