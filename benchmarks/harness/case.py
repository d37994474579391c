"""What a benchmark states: inputs, rivals, floor. How it is run stands in runner.py, how time is taken in timing.py."""

import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

SIZES = ("toy", "cpu", "cpu-full", "gpu", "gpu-full")
INTERPRETED = "interpreted"  # suffix of a provider that runs in Triton's interpreter: checked, never timed
Outputs = Tensor | tuple[Tensor, ...]
Rivals = dict[str, Callable[..., Outputs]]


@dataclass(frozen=True)
class Case:
    """One operation at one size.

    Attributes:
        op: name of the operation or job, that of its file.
        shape: the size in words, e.g. "1024x4096".
        dtype: dtype of the float inputs.
        inputs: device -> keyword arguments of the providers. Float tensors that require a gradient, and the
            parameters of modules, are differentiated.
        providers: name -> function of the inputs. The first is the baseline, which speed-ups refer to.
        truth: the same function in float64; None where nothing is compared. See also `exact`.
        modes: some of "fwd" (no gradient recorded), "bwd" (the backward alone), "full" (forward and backward).
        bytes: the least that a forward and a backward must move: inputs read once, results written once.
        flops: multiplications and additions of a forward and a backward, at least.
        given: inputs -> arguments for the comparison alone: noise that is otherwise drawn, fewer images.
        exact: truth takes the inputs as they are, and outputs must be equal to the last bit.
        landmarks: providers that compute something else (a lower bound, another recurrence): not compared, no rivals.
        tf32: whether all float32 products may be rounded to TF32 on a GPU, those of rivals as well.
        timed: False: it is only compared.
        blocking: each launch is waited for, so that a failure shows at the launch that it is of. No CUDA graph can be
            captured then.
        threads: the number of threads of a CPU; None: as many as torch takes by itself.
        batch: images of one call, for plots over it.
        share: provider -> how much one call does of what the row times: 1/784 where it makes one of 784 passes (and is
            not compared), 1000 where it launches a thousand nodes and the time of one is the question. The row's times
            are those of the call over its share, and the row says so.
        about: provider, inputs -> what the row shall say beside its times, asked after them.
        baseline: the provider that speed-ups and tolerances refer to; the first, also where it was left out since.
    """

    op: str
    shape: str
    dtype: torch.dtype
    inputs: Callable[[torch.device], dict[str, Any]]
    providers: Mapping[str, Callable[..., Outputs]]
    truth: Callable[..., Outputs] | None
    modes: tuple[str, ...] = ("fwd", "bwd", "full")
    bytes: tuple[int, int] = (0, 0)
    flops: tuple[int, int] = (0, 0)
    given: Callable[[dict[str, Any]], dict[str, Any]] = lambda inputs: {}
    exact: bool = False
    landmarks: frozenset[str] = frozenset()
    tf32: bool = True
    timed: bool = True
    blocking: bool = False
    threads: int | None = None
    batch: int | None = None
    share: Mapping[str, float] = field(default_factory=dict)
    about: Callable[[str, dict[str, Any]], dict[str, Any]] = lambda provider, inputs: {}
    baseline: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "baseline", self.baseline or next(iter(self.providers)))

    def timed_modes(self, provider: str) -> tuple[str, ...]:
        """The modes in which a provider is timed. CUDA graphs of torch.compile are recorded anew for every backward
        that follows another over the same forward, so that the backward alone has no time of its own."""
        return tuple(mode for mode in self.modes if mode != "bwd" or "reduce-overhead" not in provider)

    @staticmethod
    def in_mode(work: tuple[int, int], mode: str) -> int | None:
        """The part of `bytes` or `flops` that a mode needs; None where they are not known."""
        return {"fwd": work[0], "bwd": work[1], "full": sum(work)}[mode] or None

    def without(self, *words: str) -> "Case":
        """The same without the providers whose names contain one of the words."""
        return self.only(name for name in self.providers if not any(word in name for word in words))

    def only(self, names: Iterable[str]) -> "Case":
        """The same with these providers."""
        kept = set(names)
        return replace(self, providers={name: call for name, call in self.providers.items() if name in kept})

    @property
    def title(self) -> str:
        return f"{self.op} {self.shape} {name_of(self.dtype)}"


def name_of(dtype: torch.dtype) -> str:
    """ "float32" and the like, as in the rows."""
    return str(dtype).removeprefix("torch.")


def replays_graphs(provider: str) -> bool:
    """Whether the provider runs as CUDA graphs by itself: its memory is theirs, and it is not captured once more."""
    return "reduce-overhead" in provider or "CUDA graph" in provider


def contenders(
    size: str, device: torch.device, rivals: Rivals, operation: Callable[..., Outputs], definition: Callable[..., Any]
) -> Rivals:
    """The rivals and what fastgen runs there: its kernel on a GPU, its definition on a CPU, and at toy size its kernel
    in Triton's interpreter."""
    if device.type == "cuda":
        return {**rivals, "fastgen": operation}
    interpreted = {f"fastgen, {INTERPRETED}": functools.partial(operation, impl="triton")} if size == "toy" else {}
    return {**rivals, "definition": definition, **interpreted}


def leaves(inputs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors to differentiate, each once."""
    values = (value.parameters() if isinstance(value, nn.Module) else [value] for value in inputs.values())
    tensors = (x for group in values for x in group if isinstance(x, Tensor) and x.requires_grad)
    return list({id(tensor): tensor for tensor in tensors}.values())


def in_float64(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same inputs in float64; integers and what is no tensor stay. Modules that share parameters go on doing so."""
    copies: dict[int, Any] = {}

    def widen(value: Any) -> Any:
        if isinstance(value, nn.Module):
            return copy.deepcopy(value, copies).double()
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().double().requires_grad_(value.requires_grad)
        return value

    return {name: widen(value) for name, value in inputs.items()}


def as_tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def cotangents(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The gradients that a backward starts from. Every element of an output counts differently, and the layout is that
    of the output, as it would be of a gradient from a next layer."""
    weights = (torch.linspace(0.5, 1.5, out.numel(), device=out.device).view(out.shape) for out in outputs)
    return [torch.empty_like(out).copy_(weight) for out, weight in zip(outputs, weights, strict=True)]


def gradients(outputs: tuple[Tensor, ...], variables: list[Tensor], seeds: list[Tensor], *, retain: bool = False):
    """Gradients of the variables, None for one that the outputs do not depend on."""
    return torch.autograd.grad(outputs, variables, seeds, retain_graph=retain, allow_unused=True)
