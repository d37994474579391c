"""How a scan becomes an operation that is differentiable, compiled and traced: one factory for both LSTMs."""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgen.kernels.maps import empty_map
from fastgen.ops._implementation import is_plain, under_autocast
from fastgen.ops._lstm import Offsets, exact_dtype, needs_gradient, own, runs_triton, weight_gradient


@dataclass(frozen=True)
class Scan:
    """A scan of gates (B, 4h, H, W) with weight (4h, h, taps), as operators and as an operation.

    Operators of `torch.library`, for `torch.compile` and for traces: `fastgen::NAME` keeps nothing but its result, and
    its gradient runs the scan again; `fastgen::NAME_saving` is that of a training step; `fastgen::NAME_backward`. In
    eager mode the kernel is called without them.

    Attributes:
        name: of the operators.
        flags: the schema of what the scan takes besides: "" or ", bool reverse".
        check: raises TypeError or ValueError where gates and weight do not fit.
        forward: the definition, (gates, weight, *flags) -> hidden states, activated gates, cell states.
        backward: (grad_hidden, activated, cell, weight, *flags) -> gradient of the gates.
        offsets: (taps, *flags) -> those of the taps' neighbours.
        kernels: the module of the Triton kernels, with `forward` and `backward`.
    """

    name: str
    flags: str
    check: Callable[[Tensor, Tensor], None]
    forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    backward: Callable[..., Tensor]
    offsets: Callable[..., Offsets]
    kernels: str

    def __post_init__(self) -> None:
        """Defines the operators."""

        def define(
            suffix: str, arguments: str, results: str, body: Callable[..., Any], fake: Callable[..., Any]
        ) -> Any:
            schema = f"({arguments}{self.flags}, bool triton=False) -> {results}"
            operator = torch.library.custom_op(f"fastgen::{self.name}{suffix}", body, mutates_args=(), schema=schema)
            operator.register_fake(fake)
            return operator

        def fake_saving(gates: Tensor, weight: Tensor, *flags: Any) -> tuple[Tensor, Tensor, Tensor]:
            units, height, width = weight.shape[1], *gates.shape[2:]
            cell = empty_map(gates, units, height, width, exact_dtype(gates.dtype))
            return empty_map(gates, units, height, width), empty_map(gates, 4 * units, height, width), cell

        def fake_backward(grad: Tensor, activated: Tensor, cell: Tensor, weight: Tensor, *flags: Any) -> Tensor:
            return empty_map(grad, *activated.shape[1:])

        def run(*args: Any) -> Tensor:
            return self._run(*args, save=False)[0]

        inputs, saved = (
            "Tensor gates, Tensor weight",
            "Tensor grad_hidden, Tensor activated, Tensor cell, Tensor weight",
        )
        plain = define("", inputs, "Tensor", run, lambda *args: fake_saving(*args)[0])
        saving = define("_saving", inputs, "(Tensor, Tensor, Tensor)", self._run, fake_saving)
        backward = define("_backward", saved, "Tensor", self._run_backward, fake_backward)

        def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            gates, weight, *ctx.flags = inputs
            ctx.save_for_backward(weight, *((gates,) if isinstance(output, Tensor) else output))

        def by_rerun(ctx: Any, grad_hidden: Tensor) -> Any:
            weight, gates = ctx.saved_tensors
            return self._gradients(ctx, backward, grad_hidden, weight, *saving(gates, weight, *ctx.flags))

        def of_saved(ctx: Any, grad_hidden: Tensor, *unused: Tensor) -> Any:
            return self._gradients(ctx, backward, grad_hidden, *ctx.saved_tensors)

        def no_second_derivative(ctx: Any, *grads: Tensor) -> Any:
            raise RuntimeError(f"{self.name} has no second derivative: use impl='reference'")

        plain.register_autograd(by_rerun, setup_context=keep)
        saving.register_autograd(of_saved, setup_context=keep)
        backward.register_autograd(no_second_derivative)

        class Direct(torch.autograd.Function):
            """The kernel without operators."""

            @staticmethod
            def forward(ctx: Any, gates: Tensor, weight: Tensor, flags: tuple[Any, ...]) -> Tensor:
                hidden, activated, cell = self._module.forward(gates, weight, *flags, save=True, check=self.check)
                ctx.flags = [*flags, True]
                ctx.save_for_backward(weight, hidden, activated, cell)
                return hidden

            @staticmethod
            def backward(ctx: Any, *grads: Tensor) -> Any:
                # Where the gradient is to be differentiated, the operator says that it cannot be.
                run = backward if torch.is_grad_enabled() else self._run_backward
                return self._gradients(ctx, run, *grads, *ctx.saved_tensors)[:3]

        # `Function.apply` looks for transforms of `torch.func`, which `is_plain` has excluded, and goes on to this one.
        direct = super(torch.autograd.Function, Direct).apply
        object.__setattr__(self, "_operators", (plain, saving, direct))

    @functools.cached_property
    def _module(self) -> Any:
        return importlib.import_module(self.kernels)

    def _run(self, gates: Tensor, weight: Tensor, *flags: Any, save: bool = True) -> Any:
        """flags end with whether Triton runs; PyTorch leaves out what is the default."""
        flags, triton = self._split(flags)
        if triton:
            return self._module.forward(gates, weight, *flags, save=save)
        return tuple(map(own, self.forward(gates, weight, *flags)))

    def _run_backward(self, grad: Tensor, activated: Tensor, cell: Tensor, weight: Tensor, *flags: Any) -> Tensor:
        flags, triton = self._split(flags)
        if triton:
            return self._module.backward(grad, activated, cell, weight, *flags)
        return own(self.backward(grad, activated, cell, weight, *flags))

    def _split(self, flags: tuple[Any, ...]) -> tuple[tuple[Any, ...], bool]:
        count = self.flags.count(",")
        return flags[:count], any(flags[count:])

    def _gradients(
        self, ctx: Any, backward: Callable[..., Tensor], grad: Tensor, weight: Tensor, hidden: Tensor, *saved: Tensor
    ) -> Any:
        flags, _ = self._split(tuple(ctx.flags))
        grad_gates = backward(grad, *saved, weight, *ctx.flags)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = weight_gradient(grad_gates, hidden, self.offsets(weight.shape[2], *flags))
        return grad_gates, grad_weight, *([None] * len(ctx.flags))

    def __call__(self, gates: Tensor, weight: Tensor, *flags: Any, recompute: bool, impl: str) -> Tensor:
        plain, saving, direct = self._operators  # type: ignore[attr-defined]
        is_eager = is_plain(gates, weight)
        are_tensors = isinstance(gates, Tensor) and isinstance(weight, Tensor)
        if are_tensors and (not is_eager or torch._C._is_any_autocast_enabled()):
            gates, weight = under_autocast(gates, weight)
        if is_eager and runs_triton(impl, gates):
            # Arguments are checked once for each kind of call.
            if not needs_gradient(gates, weight):
                return self._module.forward(gates, weight, *flags, save=False, check=self.check)[0]
            if not recompute:
                return direct(gates, weight, flags)
        self.check(gates, weight)
        triton = runs_triton(impl, gates)
        if impl == "reference":
            return self.forward(gates, weight, *flags)[0]
        if recompute or not needs_gradient(gates, weight):
            return plain(gates, weight, *flags, triton)
        return saving(gates, weight, *flags, triton)[0]
