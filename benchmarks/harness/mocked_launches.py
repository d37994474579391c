"""Kernels of Triton that are launched up to the driver's door, on a machine without a GPU: what that takes of the host.

Triton's driver is what all ways of launching share: `kernel[grid](...)` binds, specializes and looks up, later launches
may call what that compiled at once, and both end at a launcher of the driver. Here the driver is one of sm_90 that does
nothing, and what would be compiled is an empty kernel.
"""

import contextlib
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from benchmarks.harness import launches

_launched: list[str] = []  # one for all: what was compiled is kept beyond the `mocked` that it was compiled in


@contextlib.contextmanager
def mocked() -> Iterator[list[str]]:
    """Inside, `impl="triton"` takes tensors of a CPU and launches nothing; the names of the kernels, one a launch.

    Raises:
        RuntimeError: TRITON_INTERPRET=1 is set: kernels are in Triton's interpreter here.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    launches.catalogue()  # defines all kernels, which read the environment then
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 is set: kernels run in the interpreter, and are not launched")
    _launched.clear()

    def compiled(self: Any, key: Any, *rest: Any, **more: Any) -> Any:
        name = self.fn.__name__
        kernel = SimpleNamespace(
            name=name,
            function=0,
            packed_metadata=(),
            run=lambda *arguments: _launched.append(name),
            launch_metadata=lambda *arguments: None,
        )
        self.device_caches[0][0][key] = kernel
        return kernel

    idle = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    before, compiles = driver._active, JITFunction._do_compile
    driver._active, JITFunction._do_compile = idle, compiled
    os.environ["TRITON_INTERPRET"] = "1"  # what `impl="triton"` wants for tensors of a CPU
    try:
        yield _launched
    finally:
        driver._active, JITFunction._do_compile = before, compiles
        os.environ.pop("TRITON_INTERPRET")
