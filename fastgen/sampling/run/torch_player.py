"""Memory of a batch, the programs bound to it, and the draws in between."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastgen.distributions import Distribution
from fastgen.sampling.draws import draw_channel
from fastgen.sampling.plan.plan import Plan
from fastgen.sampling.plan.program import Memory
from fastgen.sampling.plan.sliding_rows import Ring
from fastgen.sampling.request import SampleRequest
from fastgen.sampling.run.prefill import prefill
from fastgen.sampling.trace.graph import CONSTANT, Value


class Run:
    """The memory of a batch of n images, and the programs bound to it."""

    def __init__(self, plan: Plan, n: int, device: torch.device) -> None:
        self.plan = plan
        self.n = n
        self.device = device
        self.blocks: dict[int, Tensor] = {}
        self._keep: list[Memory] = []
        self._scratch = [
            torch.empty(n * size, dtype=dtype, device=device)
            for size, dtype in zip(plan.scratch.sizes, plan.scratch.dtypes, strict=True)
        ]
        programs = self.bound()
        self.steps = [(programs[number], self.offsets(offsets)) for number, offsets in plan.steps]
        self._initial: list[tuple[Tensor, Tensor]] = []  # rings, and what they begin with
        self._moves: dict[int, list[tuple[Tensor, Tensor]]] = {}  # step -> where rows go, and which
        for index in sorted(plan.storage.stored):
            value = plan.timed.graph.values[index]
            if value.kind == "computed":
                constant = plan.timed.graph.of(plan.schedule.times, value) == CONSTANT
                if constant.any() or id(plan.storage.memories.get(index)) in plan.rings:
                    self._start_with(value, torch.where(constant, value.data, 0).to(device))
        self._levels = self._inner(plan.levels)
        self.levels = self._levels[:, 0]
        view = plan.output.map
        assert view is not None
        strides, origin = plan.storage.strides(view.value)
        memory = self.block(plan.storage.memory(view.value))
        if view.value.kind == "constant":
            memory = memory.expand(n, -1)
        along = [sum(s * t for s, t in zip(step, strides, strict=True)) for step in view.steps]
        offset = origin + sum(s * t for s, t in zip(view.start, strides, strict=True))
        self._params = memory.as_strided((n, *view.shape), (memory.stride(0), *along), offset)[:, 0]

    def bound(self) -> list[Callable[[list[Any]], None]]:
        """The plan's programs, ready to run on this batch."""
        return [program.bind(self.n, self.block, self.on_device) for program in self.plan.programs]

    def _start_with(self, value: Value, constants: Tensor) -> None:
        """Puts the constants of a stored value, 0 elsewhere, where they belong."""
        memory = self.plan.storage.memory(value)
        block, ring = self.block(memory), self.plan.rings.get(id(memory))
        if ring is None:
            self._inner(value).copy_(constants)
            return
        self._initial.append((block, self._part(ring, constants[None], 0)))
        for move in ring.moves:
            source = block[:, move.first * ring.pitch : move.stop * ring.pitch]
            self._moves.setdefault(move.step, []).append((block[:, : source.shape[1]], source))

    @staticmethod
    def _part(ring: Ring, values: Tensor, step: int) -> Tensor:
        """What a ring holds of values (n, *shape) when a step runs, padding included."""
        first = ring.first_row(step) * ring.pitch
        whole = values.new_zeros((len(values), max(ring.layout.numel, first + ring.numel)))
        ring.layout.inner(whole).copy_(values)
        return whole[:, first : first + ring.numel]

    def offsets(self, offsets: list[Any]) -> Any:
        """What a program is called with in a step."""
        return [self.on_device(one) for one in offsets]

    def block(self, memory: Memory) -> Tensor:
        if id(memory) not in self.blocks:
            self._keep.append(memory)
            if memory.data is not None:
                found = memory.data.to(self.device).view(1, -1)
            elif memory.kind == "scratch":
                found = self._scratch[self.plan.scratch.block_of[id(memory)]][: self.n * memory.numel].view(self.n, -1)
            else:
                ring = self.plan.rings.get(id(memory))
                size = memory.numel if ring is None else ring.numel
                found = torch.zeros((self.n, size), dtype=memory.dtype, device=self.device)
            self.blocks[id(memory)] = found
        return self.blocks[id(memory)]

    def on_device(self, one: Any) -> Any:
        return one.to(self.device) if isinstance(one, Tensor) and one.device != self.device else one

    def params(self) -> Tensor:
        """The model's output for what has been drawn, (n, ..., H, W), a view."""
        return self._params

    def begin(self, job: SampleRequest) -> None:
        """Takes the condition, forgets the levels, computes what depends on no pixel."""
        self.forced = job.known_mask.clone() if job.known_mask is not None else None
        self.given = job.known.clone() if job.known is not None else None
        self._levels.zero_()
        leaves = [leaf for leaf in tree_leaves(job.condition) if isinstance(leaf, Tensor) and leaf.dim()]
        for value, leaf in zip(self.plan.leaves, leaves, strict=True):
            self._inner(value).copy_(leaf.view(self.n, *value.shape))
        self.rewind()

    def rewind(self) -> None:
        """Computes what depends on no pixel, with the rings as they begin."""
        for block, initial in self._initial:
            block.copy_(initial)
        program, offsets = self.steps[0]
        program(offsets)

    def draw_from(self, job: SampleRequest, first: int) -> Tensor:
        """Draws from one place on; returns whether parameters were NaN."""
        bad = torch.zeros((), dtype=torch.bool, device=self.device)
        known = [None] * len(self.plan.order) if self.forced is None else self._all_known(self.forced)
        for place in range(first, len(self.plan.order)):
            if known[place] and self.given is not None:
                c, i, j = self.plan.order[place]
                at = slice(None) if self.plan.whole_pixels else slice(c, c + 1)
                self.levels[:, at, i, j] = self.given[:, at, i, j]
                self.step(place)
            else:
                draw_place(self, job.distribution, job.noise, self.given, self.forced, place, bad)
            if job.progress is not None and first == 0:
                job.progress(self.channels if self.plan.whole_pixels else 1)
        return bad

    def step(self, place: int) -> None:
        """Computes what the level drawn at this place decides."""
        for target, source in self._moves.get(place + 1, ()):
            target.copy_(source.clone())
        program, offsets = self.steps[place + 1]
        program(offsets)

    def _all_known(self, mask: Tensor) -> list[bool]:
        """For every place whether no image draws there."""
        everywhere = mask.all(0).cpu()
        index = torch.tensor(self.plan.order)
        of_places = everywhere[:, index[:, 1], index[:, 2]]
        if self.plan.whole_pixels:
            return of_places.all(0).tolist()
        return of_places[index[:, 0], torch.arange(len(index))].tolist()

    def fill_known(self) -> int:
        """Takes over leading known pixels in one pass; returns how many places, 0 where they are less than a row."""
        if self.forced is None or self.given is None:
            return 0
        known = [*self._all_known(self.forced), False]
        count = known.index(False)
        if count < self.levels.shape[-1]:
            return 0
        self.levels.copy_(torch.where(self.forced, self.given, 0))
        given = {self.plan.levels.index: self._levels.contiguous()}
        for value in self.plan.leaves:
            given[value.index] = self._inner(value).contiguous()

        def keep(value: Value, found: Tensor) -> None:
            memory = self.plan.storage.memory(value)
            ring = self.plan.rings.get(id(memory))
            if ring is None:
                self._inner(value).copy_(found)
            else:
                self.block(memory).copy_(self._part(ring, found, count))

        prefill(self.plan, given, keep)
        return count

    def _inner(self, value: Value) -> Tensor:
        """A stored value, (n, *shape)."""
        return self.plan.storage.layouts[value.index].inner(self.block(self.plan.storage.memory(value)))

    @property
    def channels(self) -> int:
        return self.plan.levels.shape[1]

    def correct(self, job: SampleRequest, truth: Tensor) -> int | None:
        """Puts the first wrong level of each image right; the place to go on from, None where all are right.

        Rings have forgotten what came before: with them all is drawn again, to the same levels.
        """
        index = torch.tensor(self.plan.order, device=self.device)
        wrong = self.levels != truth
        if not bool(wrong.any()):
            return None
        if self.plan.whole_pixels:
            by_place = wrong.any(1)[:, index[:, 1], index[:, 2]]
        else:
            by_place = wrong[:, index[:, 0], index[:, 1], index[:, 2]]
        if self.forced is None or self.given is None:
            self.forced, self.given = torch.zeros_like(wrong), torch.zeros_like(self.levels)
        firsts = []
        for b in torch.nonzero(by_place.any(1)).flatten().tolist():
            place = int(torch.nonzero(by_place[b])[0])
            c, i, j = self.plan.order[place]
            at = slice(None) if self.plan.whole_pixels else slice(c, c + 1)
            self.given[b, at, i, j] = truth[b, at, i, j]
            self.forced[b, at, i, j] = True
            firsts.append(place)
        if self._initial:
            self.rewind()
            return 0
        return min(firsts)


def draw_place(
    run: Run,
    distribution: Distribution,
    noise: Tensor,
    given: Tensor | None,
    forced: Tensor | None,
    place: int,
    bad: Tensor,
) -> None:
    """Draws one place of the order and computes what it decides; `bad` notes parameters that are NaN."""
    c, i, j = run.plan.order[place]
    for channel in range(run.channels) if run.plan.whole_pixels else (c,):
        drawn, nan = draw_channel(
            distribution,
            run.params()[..., i, j],
            noise[..., i, j],
            channel,
            run.levels[:, :channel, i, j],
            None if given is None else given[:, channel, i, j],
            None if forced is None else forced[:, channel, i, j],
        )
        run.levels[:, channel, i, j] = drawn
        bad |= nan
    run.step(place)
