"""Records the names of the kernels that a call launches, for the rows and for `status`."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

COMPILED = "triton_"  # prefix of the names of torch.compile's kernels


@functools.cache
def catalogue() -> dict[str, str]:
    """All kernels of fastgen: the module of each, by its name. Modules are written as in the field `kernels` of rows.

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
    """Yields a list of the kernels of fastgen that are launched inside, one name for each launch, on a GPU or in the
    interpreter. `tell` is called with the name before each launch. The list stays empty if Triton is not installed.

    A kernel is launched as `kernel[grid](...)`, or by calling the compiled kernel directly. On a GPU Triton's hook
    reports both, and also torch.compile's kernels, which are left out here; in the interpreter only the first is seen.
    Replays of CUDA graphs are not seen.
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
