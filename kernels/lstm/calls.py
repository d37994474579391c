"""What a call of a scan does, planned once for each kind of tensors: the host's time is the scan's where images are
small."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgen.kernels.common import Launches, tf32_allowed
from fastgen.kernels.lstm.choice import ScanLaunch, TileLaunch
from fastgen.kernels.maps import empties, empty_map

CALLS = 4096  # kinds of calls that are kept; beyond, all are planned anew
New = Callable[[], Tensor] | None  # makes a map that is written; None for one that is not asked for
Choice = ScanLaunch | TileLaunch | Callable[..., ScanLaunch | TileLaunch]  # or what chooses, `choice.choose`


class Call(NamedTuple):
    """A plan.

    Attributes:
        packed: of weights, as the kernel reads them.
        new: of the maps that are written, on the current device.
        launches: of the maps that are read, the weights, and the maps that are written, in the kernel's order.
    """

    packed: Callable[[Tensor], Tensor]
    new: tuple[New, ...]
    launches: Launches


Plan = Callable[..., Call]  # of a call's tensors and options
Check = Callable[..., None]  # of a call's tensors: raises where they do not fit
_calls: dict[Any, Call] = {}


def planned(plan: Plan, check: Check | None, tensors: tuple[Tensor, ...], *options: Any) -> Call:
    """The plan of calls with such tensors, which `check` has seen once."""
    key: tuple[Any, ...] = (plan, options, tensors[0].dtype == torch.float32 and tf32_allowed())
    for x in tensors:
        key += (x.shape, x.stride(), x.dtype, x.get_device(), x.data_ptr() % 16)
    call = _calls.get(key)
    if call is None:
        if check is not None:
            check(*tensors)
        if len(_calls) >= CALLS:
            _calls.clear()
        call = _calls[key] = plan(*tensors, *options)
    return call


def new_map(like: Tensor, channels: int, dtype: torch.dtype | None = None) -> Callable[[], Tensor]:
    """Of (B, channels, H, W), channels-last, with the other sizes of `like`."""
    example = empty_map(like, channels, like.shape[2], like.shape[3])
    return empties(like, (tuple(example.shape), example.stride()), dtype)


def new_results(gates: Tensor, save: bool) -> tuple[New, ...]:
    """Of hidden states, and to train of activated gates and cell states (float32)."""
    channels = gates.shape[1]
    hidden = new_map(gates, channels // 4)
    if not save:
        return hidden, None, None
    return hidden, new_map(gates, channels), new_map(gates, channels // 4, torch.float32)


def is_elsewhere(x: Tensor) -> bool:
    """Whether x is on a GPU that is not the current one."""
    device = x.get_device()
    return device >= 0 and device != torch.cuda.current_device()


def run_forward(
    plan: Plan, check: Check | None, gates: Tensor, weight: Tensor, *options: Any
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """hidden (B, h, H, W), and to train the activated gates and the cell states, all channels-last.

    Args:
        gates: (B, 4h, H, W), any strides.
        weight: (4h, h, taps), any strides.
    """
    if is_elsewhere(gates):
        with torch.cuda.device(gates.device):
            return run_forward(plan, check, gates, weight, *options)
    call = planned(plan, check, (gates, weight), *options)
    hidden, activated, cell = results = [new and new() for new in call.new]
    if gates.shape[0]:
        call.launches.start(gates, call.packed(weight), *results)
    assert hidden is not None
    return hidden, activated, None if activated is None else cell


def run_backward(
    plan: Plan, grad_hidden: Tensor, activated: Tensor, cell: Tensor, weight: Tensor, *options: Any
) -> Tensor:
    """Gradient of the gates (B, 4h, H, W), channels-last, from what the forward has saved."""
    if is_elsewhere(grad_hidden):
        with torch.cuda.device(grad_hidden.device):
            return run_backward(plan, grad_hidden, activated, cell, weight, *options)
    activated, cell = (saved.contiguous(memory_format=torch.channels_last) for saved in (activated, cell))
    call = planned(plan, None, (grad_hidden, weight, activated, cell), *options)
    grad_gates, *more = [new and new() for new in call.new]
    if grad_hidden.shape[0]:
        call.launches.start(grad_hidden, activated, cell, call.packed(weight), grad_gates, *more)
    assert grad_gates is not None
    return grad_gates
