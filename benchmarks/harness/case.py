"""`Case`: the inputs, providers and least possible work of a benchmark. runner.py runs it, timing.py measures time."""

import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

SIZES = ("toy", "cpu", "cpu-full", "gpu", "gpu-full")
INTERPRETED = "interpreted"  # suffix of a provider that runs in Triton's interpreter: compared, never timed
Outputs = Tensor | tuple[Tensor, ...]
Rivals = dict[str, Callable[..., Outputs]]


@dataclass(frozen=True)
class Case:
    """One operation at one size, and the providers that compute it.

    Attributes:
        op: name of the operation or job, which is also the name of its file.
        shape: the size as text, e.g. "1024x4096".
        dtype: dtype of the float inputs.
        inputs: function of the device that returns the keyword arguments of the providers. Float tensors that require a
            gradient, and the parameters of modules, are differentiated.
        providers: functions of the inputs, by name. The first is the baseline.
        truth: the same function, which is called with float64 inputs; None compares nothing. See also `exact`.
        modes: some of "fwd" (forward, no gradient recorded), "bwd" (backward alone), "full" (forward and backward).
        bytes: the bytes that a forward, and a backward, must move at least: inputs read once, results written once.
        flops: multiplications and additions of a forward, and of a backward, at least.
        given: function of the inputs that returns further arguments for the comparison: noise that is otherwise drawn,
            or fewer images.
        exact: True: the truth takes the inputs in their own dtype, and outputs must be equal bit for bit.
        landmarks: providers that compute something else, such as a lower bound: they are not compared, and not rivals.
        tf32: whether float32 products of all providers may be rounded to TF32 on a GPU.
        timed: False: the case is only compared.
        blocking: True waits for each launch, so that a failure is reported at its own launch. CUDA graphs cannot be
            captured then.
        threads: number of CPU threads; None: torch's default.
        batch: images of one call, for plots over the batch size.
        share: by provider, how much of the timed work one call does: 1/784 for one of 784 forward passes (such a
            provider is not compared), 1000 for a call that does a thousand times what is timed. The times of a row are
            those of the call divided by its share, and the row contains the share.
        about: function of provider and inputs, called after timing, that returns further fields of the row.
        baseline: the provider that speed-ups and tolerances refer to: the first, even if `providers` no longer has it.
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
        """The modes in which a provider is timed. "reduce-overhead" has no "bwd": torch.compile records a new CUDA
        graph for every repeated backward over the same forward."""
        return tuple(mode for mode in self.modes if mode != "bwd" or "reduce-overhead" not in provider)

    @staticmethod
    def in_mode(work: tuple[int, int], mode: str) -> int | None:
        """The part of `bytes` or `flops` that a mode needs; None if it is not known."""
        return {"fwd": work[0], "bwd": work[1], "full": sum(work)}[mode] or None

    def without(self, *words: str) -> "Case":
        """The same case without the providers whose names contain one of the words."""
        return self.only(name for name in self.providers if not any(word in name for word in words))

    def only(self, names: Iterable[str]) -> "Case":
        """The same case with only these providers."""
        kept = set(names)
        return replace(self, providers={name: call for name, call in self.providers.items() if name in kept})

    @property
    def title(self) -> str:
        return f"{self.op} {self.shape} {name_of(self.dtype)}"


def name_of(dtype: torch.dtype) -> str:
    """The name of a dtype in rows, such as "float32"."""
    return str(dtype).removeprefix("torch.")


def replays_graphs(provider: str) -> bool:
    """Whether the provider itself replays CUDA graphs. It is then not captured in another graph, and its peak memory,
    which the graphs hold, is not measured."""
    return "reduce-overhead" in provider or "CUDA graph" in provider


def contenders(
    size: str, device: torch.device, rivals: Rivals, operation: Callable[..., Outputs], definition: Callable[..., Any]
) -> Rivals:
    """The rivals, and fastgen's own providers for a device: the operation on a GPU; on a CPU the definition and, at toy
    size, the kernel in Triton's interpreter."""
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
    """The inputs in float64. Integers and other values are kept, and modules that share parameters still share them."""
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
    """The gradients that a backward starts from: different for every element of an output, and with the memory layout
    of the output, as the gradient from a following layer would have."""
    weights = (torch.linspace(0.5, 1.5, out.numel(), device=out.device).view(out.shape) for out in outputs)
    return [torch.empty_like(out).copy_(weight) for out, weight in zip(outputs, weights, strict=True)]


def gradients(outputs: tuple[Tensor, ...], variables: list[Tensor], seeds: list[Tensor], *, retain: bool = False):
    """Gradients of the variables; None for a variable that the outputs do not depend on."""
    return torch.autograd.grad(outputs, variables, seeds, retain_graph=retain, allow_unused=True)
