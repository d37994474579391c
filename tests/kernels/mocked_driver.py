"""A driver for Triton without a GPU: kernels are specialized for sm_90, not compiled or run; launches are noted."""

import types

from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction


class MockedDriver(DriverBase):
    def __init__(self):
        self.launches = []  # (grid, stream, function, launch metadata, hooks, arguments)
        self.stream = 7

    @staticmethod
    def is_active():
        return True

    def map_python_to_cpp_type(self, ty):
        return ty

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return self.stream

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self):
        raise AssertionError("launches need no device of torch")

    def get_benchmarker(self):
        raise AssertionError("nothing is timed")


def installed(monkeypatch):
    """Kernels made by `compiled` are then launched by the driver that this returns."""
    mocked = MockedDriver()
    monkeypatch.setattr(driver, "_active", mocked)

    def compiled(self, key, *rest, **more):
        def run(x, y, z, stream, function, metadata, about, enter, leave, *args):
            mocked.launches.append(((x, y, z), stream, function, about, (enter, leave), args))

        def launch_metadata(grid, stream, *args):
            return {"name": self.fn.__name__}

        kernel = types.SimpleNamespace(
            run=run, function=key, packed_metadata=(), launch_metadata=launch_metadata, name=self.fn.__name__
        )
        self.device_caches[0][0][key] = kernel
        return kernel

    monkeypatch.setattr(JITFunction, "_do_compile", compiled)
    return mocked
