"""Which backends can play a plan, which one is the quickest, and which player that takes; why, as text for people."""

import importlib.util
import os
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch

from fastgen.distributions import Distribution
from fastgen.sampling.machine.cpu.build import NoMachine, machine
from fastgen.sampling.machine.parts import HALF, unknown_in
from fastgen.sampling.plan.plan import Plan
from fastgen.sampling.run.arena import images_that_fit
from fastgen.sampling.run.cpu_player import CPUPlayer, images_at_once
from fastgen.sampling.run.cuda_graph_player import CudaGraphPlayer
from fastgen.sampling.run.draw_loop import Player
from fastgen.sampling.run.torch_player import TorchPlayer

MOST_UNKNOWN = 0.1  # of the steps, that torch plays between launches of the step machine


def best_backend(plan: Plan, device: torch.device) -> tuple[str, str]:
    """The quickest backend for a model, and why."""
    if device.type == "cuda":
        return "cuda_graph", "on a GPU cuda_graph, which spares the host a launch an operation"
    if plan.output_dtype != torch.float32:
        return "eager", f"eager, since the step machine computes in float32 and the model in {plan.output_dtype}"
    try:
        found = machine()
    except NoMachine as error:
        return "eager", f"eager, since {error}"
    return "compiled", f"on a CPU compiled: a step in machine code, {found.built}"


def most_images(name: str, plan: Plan, device: torch.device) -> int | None:
    """The most images of a batch; None: as many as there are."""
    if name == "compiled":
        return images_at_once(plan)
    return images_that_fit(plan, device) if name in ("persistent", "cuda_graph") else None


def unfit_for_gpu_machine(plan: Plan, device: torch.device) -> str:
    """Why the step machine of GPUs cannot play a plan; empty where it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the model is on {device.type}"
    if plan.output_dtype not in (torch.float32, *HALF):
        return f"the kernel computes in float32 and in half precision, the model in {plan.output_dtype}"
    by_torch, names = _by_torch(plan)
    if by_torch > MOST_UNKNOWN * len(plan.steps):
        return f"the kernel does not know {names}, which {by_torch} of {len(plan.steps)} steps need"
    return ""


def _by_torch(plan: Plan) -> tuple[int, str]:
    """How many steps the machine does not know, and the names of what it does not."""
    served = Counter(step.program for step in plan.steps)
    unknown = {number: unknown_in(plan.programs[number]) for number in served}
    names = sorted({name for found in unknown.values() for name in found})
    return sum(served[number] for number, found in unknown.items() if found), ", ".join(names)


class Way(NamedTuple):
    """Attributes:
    player: of a backend.
    remarks: how it plays, for people.
    of_draws: as in `Margin`.
    """

    player: Callable[..., Player]
    remarks: list[str]
    of_draws: float = 0.0


def way_to_play(name: str, plan: Plan, distribution: Distribution, device: torch.device) -> Way:
    """How a backend, which is possible, plays a plan."""
    if name == "eager":
        return Way(TorchPlayer, [])
    if name == "compiled":
        return Way(CPUPlayer, [])
    if name == "cuda_graph":
        reason = unfit_for_gpu_machine(plan, device) or _not_drawn(distribution)
        if reason:
            return Way(CudaGraphPlayer, [f"cuda_graph: torch's operations, a graph a row of draws, because {reason}"])
    from fastgen.kernels.common import processors_of  # these need Triton
    from fastgen.kernels.sampler.machine import draws_in_float64, tiles_for
    from fastgen.sampling.machine.gpu.draws import error_of_float32_draws
    from fastgen.sampling.machine.gpu.fusion import fuse
    from fastgen.sampling.run.gpu_player import PRODUCTS, GPUPlayer, heavy_programs, precision_on
    from fastgen.sampling.run.graph_player import GraphPlayer

    by_torch, names = _by_torch(plan)
    remarks = [f"{name}: products of float32 {PRODUCTS[precision_on(device)]}"]
    if by_torch:
        remarks.append(f"{name}: torch plays {by_torch} of {len(plan.steps)} steps, between launches, for {names}")
    of_draws = 0.0 if draws_in_float64(device) else error_of_float32_draws(distribution)
    if name == "cuda_graph":
        known = {k for k, program in enumerate(plan.programs) if not unknown_in(program)}
        ((number, _),) = Counter(step.program for step in plan.steps if step.program in known).most_common(1)
        how = (
            "cuda_graph: a graph a program, which serves all its steps; an instruction a launch, "
            f"{1 + len(fuse(plan.programs[number].instructions))} for most draws; with top_k or top_p of more than 256 "
            "levels torch draws, between graphs"
        )
        return Way(GraphPlayer, [how, *remarks], of_draws)
    heavy = heavy_programs(plan, 1, tiles_for(1, device), processors_of(device))
    if heavy:
        between = "are played over the whole GPU, an instruction a launch, while there are few images"
        remarks.insert(0, f"persistent: heavy programs, {len(heavy)} of {len(plan.programs)}, {between}")
    how = (
        "persistent: images are drawn in one launch; with a distribution of your own, or top_k or top_p of more than "
        "256 levels, torch draws, and each step is a launch; programs that own an image: "
        f"{GPUPlayer.together} (several, which wait for each other, have not been measured)"
    )
    return Way(GPUPlayer, [how, *remarks], of_draws)


def _not_drawn(distribution: Distribution) -> str:
    """Why the step machine does not draw of a distribution, whatever its options; empty where it does."""
    from fastgen.sampling.machine.gpu.draws import KINDS  # needs Triton

    return "" if type(distribution) in KINDS else f"the kernel does not draw of {type(distribution).__name__}"
