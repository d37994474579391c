"""Scans with launches other than those that fastgen chooses: what its choice is to be judged by, on a GPU."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgen.ops import diagonal_lstm, row_lstm
from fastgen.ops._lstm import needs_gradient, weight_gradient

Scans = dict[str, Callable[[Tensor, Tensor], Tensor]]


@dataclass(frozen=True)
class Scan:
    """A scan of gates (B, 4h, H, W) with its own choice of launches, differentiable.

    forward, backward: of `fastgen.kernels`; lanes: the dimension whose pixels stand side by side in a step; offsets:
    (rows, columns) to the state of each tap; choice: of `fastgen.kernels.lstm.choice`.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Tensor]
    lanes: int
    offsets: list[tuple[int, int]]
    choice: Callable[..., Any]

    def launch(self, gates: Tensor) -> Any:
        return self.choice(gates, gates.shape[self.lanes], gates.shape[1] // 4)

    def __call__(self, gates: Tensor, weight: Tensor) -> Tensor:
        if needs_gradient(gates, weight):
            return Differentiable.apply(gates, weight, self)
        return self.forward(gates, weight, save=False, choice=self.launch(gates))[0]


class Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gates: Tensor, weight: Tensor, scan: Scan) -> Tensor:
        ctx.scan, ctx.launch = scan, scan.launch(gates)
        hidden, activated, cell = scan.forward(gates, weight, save=True, choice=ctx.launch)
        ctx.save_for_backward(weight, hidden, activated, cell)
        return hidden

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        weight, hidden, activated, cell = ctx.saved_tensors
        grad_gates = ctx.scan.backward(*grads, activated, cell, weight, choice=ctx.launch)
        return grad_gates, weight_gradient(grad_gates, hidden, ctx.scan.offsets), None


def _of_every_choice(operation: Callable[..., Tensor], scan_of: Callable[..., Scan]) -> Scans:
    """By name; where there is no GPU, the operation itself, which runs its definition there."""
    from fastgen.kernels.lstm import choice as choice_of

    choices = {
        "one launch by tiles": choice_of.scan_by_tiles,
    }

    def on_any_device(gates: Tensor, weight: Tensor, scan: Scan) -> Tensor:
        return scan(gates, weight) if gates.is_cuda else operation(gates, weight)

    return {name: functools.partial(on_any_device, scan=scan_of(choice)) for name, choice in choices.items()}


def diagonal_scans() -> Scans:
    from fastgen.kernels.lstm import diagonal as diagonal_kernels

    forward = functools.partial(diagonal_kernels.forward, reverse=False)
    backward = functools.partial(diagonal_kernels.backward, reverse=False)
    return _of_every_choice(diagonal_lstm, functools.partial(Scan, forward, backward, 2, [(-1, 0), (0, -1)]))


def row_scans(taps: int) -> Scans:
    from fastgen.kernels.lstm import row as row_kernels

    offsets = [(-1, tap - taps // 2) for tap in range(taps)]
    return _of_every_choice(row_lstm, functools.partial(Scan, row_kernels.forward, row_kernels.backward, 3, offsets))
