"""Which kernels a call launches, by name: what a row says was measured, and what `status` goes by."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

COMPILED = "triton_"  # how the names of torch.compile's kernels begin


@functools.cache
def catalogue() -> dict[str, str]:
    """Kernel -> its module, of all kernels of fastgen; modules as in the field `kernels` of rows.

    Raises:
        ValueError: Triton is not installed.
    """
    try:
        from fastgen.kernels.catalogue import PACKAGE, kernel_modules

        entries = [entry for module in kernel_modules() for entry in getattr(module, "CATALOGUE", ())]
    except ImportError as error:
        raise ValueError("the kernels are listed by their catalogue, which needs Triton (Linux only)") from error
    modules = {entry.kernel.__name__: entry.kernel.fn.__module__ for entry in entries}
    return {name: modules[name].removeprefix(f"{PACKAGE}.").replace(".", "/") for name in sorted(modules)}


@contextlib.contextmanager
def recorded(tell: Callable[[str], Any] = lambda name: None) -> Iterator[list[str]]:
    """Names of the kernels of fastgen that are launched inside, one a launch, on a GPU or in the interpreter; `tell`
    hears of each launch before it. Stays empty where Triton is not installed.

    A kernel is launched as `kernel[grid](...)`, or again as what that compiled. Triton's hook sees both on a GPU, and
    those of torch.compile as well; only the first is seen in the interpreter. A replay of a CUDA graph launches what
    was recorded at its capture, and is not seen.
    """
    names: list[str] = []
    try:
        import triton
        from triton.runtime.jit import KernelInterface
    except ImportError:
        yield names
        return

    def launching(name: str) -> None:
        names.append(name)
        tell(name)

    def on_a_gpu(metadata: Any) -> None:
        about = metadata if isinstance(metadata, dict) else metadata.get() if metadata else {}
        name = about.get("name", COMPILED)
        if not name.startswith(COMPILED):
            launching(name)

    original = KernelInterface.__getitem__

    def subscripted(kernel: Any, grid: Any) -> Any:
        function = getattr(kernel, "fn", None)
        if function is not None and getattr(function, "__module__", "").startswith("fastgen.kernels"):
            launching(function.__name__)
        return original(kernel, grid)

    knobs = getattr(triton, "knobs", None)  # since Triton 3.4
    with mock.patch.object(KernelInterface, "__getitem__", subscripted), contextlib.ExitStack() as hooks:
        if knobs is not None:
            knobs.runtime.launch_enter_hook.add(on_a_gpu)
            hooks.callback(knobs.runtime.launch_enter_hook.remove, on_a_gpu)
        yield names
