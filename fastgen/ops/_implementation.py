"""The choice between a Triton kernel and the PyTorch definition, one rule for every operation."""

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

PLAIN = {Tensor, torch.nn.Parameter, type(None)}
IMPLS = ("auto", "triton", "reference")
TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None  # once: torch.compile cannot follow the question


def uses_triton(impl: str, tensor: Tensor) -> bool:
    """Whether `impl` means the Triton kernel for `tensor`.

    "auto" is Triton on CUDA tensors (where Triton is installed) and the PyTorch definition elsewhere.

    Raises:
        ValueError: `impl` is not one of IMPLS.
        RuntimeError: "triton" was asked for and cannot run on this tensor.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {IMPLS}, got {impl!r}")
    if impl == "reference":
        return False
    if impl == "auto":
        return tensor.is_cuda and TRITON_IS_INSTALLED
    if not TRITON_IS_INSTALLED:
        raise RuntimeError("impl='triton' needs the triton package: pip install triton, or use impl='auto'")
    if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f"impl='triton' cannot run on a {tensor.device.type} tensor: move it to a CUDA device, set "
            "TRITON_INTERPRET=1 before starting Python to run Triton's interpreter, or use impl='auto'"
        )
    return True


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether a kernel may be called directly: nothing traces, transforms or replaces the tensors.

    Then a `torch.autograd.Function` does; otherwise it takes an operator of `torch.library`, which costs the host more.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.maybe_current_level()
    ):
        return False
    return PLAIN.issuperset(map(type, tensors))


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The autocast dtype of x's device where autocast is on."""
    kind = "cuda" if x.is_cuda else "cpu" if x.is_cpu else x.device.type  # whose string takes the host longer
    # The question whether there is an autocast takes the host a microsecond.
    known = kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind)
    return torch.get_autocast_dtype(kind) if known and torch.is_autocast_enabled(kind) else None


def under_autocast(x: Tensor, weight: Tensor, *more: Tensor | None) -> list[Any]:
    """All in the autocast dtype where autocast is on, as products take them; float64 stays."""
    dtype, tensors = autocast_dtype(x), [x, weight, *more]
    if dtype is None or torch.float64 in (x.dtype, weight.dtype):
        return tensors
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def may_read_values(tensor: Tensor) -> bool:
    """Whether argument checks may read tensor data: always in eager mode on the CPU; elsewhere it would
    synchronize or break a graph, so only when FASTGEN_CHECK=1."""
    if os.environ.get("FASTGEN_CHECK") == "1":
        return True
    return not tensor.is_cuda and not torch.compiler.is_compiling()
