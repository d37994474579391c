"""Which kernels a call launches, by name: what a row says was measured, and what `status` goes by."""

import contextlib
from collections.abc import Iterator
from typing import Any

PACKAGE = "fastgen.kernels"


@contextlib.contextmanager
def recorded() -> Iterator[set[str]]:
    """Names of the kernels of fastgen that are launched inside, on a GPU or in the interpreter. A replay of a CUDA
    graph launches what was recorded at its capture, and is not seen. Stays empty where Triton is not installed."""
    names: set[str] = set()
    try:
        from triton.runtime.jit import KernelInterface
    except ImportError:
        yield names
        return
    original = KernelInterface.__getitem__

    def launching(kernel: Any, grid: Any) -> Any:
        function = getattr(kernel, "fn", None)
        if function is not None and getattr(function, "__module__", "").startswith(PACKAGE):
            names.add(function.__name__)
        return original(kernel, grid)

    KernelInterface.__getitem__ = launching
    try:
        yield names
    finally:
        KernelInterface.__getitem__ = original
