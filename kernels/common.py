"""What several families of kernels share: launches that are looked up once, sizes, products, hyperbolic tangent, empty
maps."""

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from fastgen.kernels.maps import empty_map as empty_map

ONES = (1, 1, 1)  # the least grid
# How a compiled kernel is called is Triton's own affair. Known and tested for these; others launch the ordinary way.
KNOWN_TRITON = ("3.6.", "3.7.", "3.8.", "3.9.")


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. `triton.cdiv` takes 50 times as long on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two >= n >= 1."""
    return 1 << (n - 1).bit_length()


def kernel(function: Any) -> Any:
    """`triton.jit`, which compiles once for all values of the numbers."""
    arguments = inspect.signature(function).parameters.values()
    sizes = [a.name for a in arguments if a.annotation is a.empty and not a.name.endswith(("ptr", "map"))]
    return triton.jit(do_not_specialize=sizes)(function)


@triton.jit
def product(a, b, accumulator, PRECISION: tl.constexpr):
    """The interpreter multiplies bfloat16 wrongly: the precision "float32" tells it to widen first."""
    if PRECISION == "float32":
        a, b = a.to(tl.float32), b.to(tl.float32)
        return tl.dot(a, b, accumulator, input_precision="ieee")
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def tanh_near_0(x):
    """To float32's precision for |x| < 0.3."""
    q = x * x
    return x * (1.0 + q * (-1 / 3 + q * (2 / 15 + q * (-17 / 315 + q * (62 / 2835 + q * (-1382 / 155925))))))


@triton.jit
def tanh(x, FAST: tl.constexpr = False):
    """To float32's precision, also near 0, where the quotient cancels; never NaN for a finite x.

    FAST: one instruction of NVIDIA's special function unit, to 2^-11.
    """
    if FAST:
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    size = tl.abs(x)
    e = tl.exp(-2.0 * size)
    far = (1.0 - e) / (1.0 + e)
    return tl.where(size < 0.3, tanh_near_0(x), tl.where(x < 0, -far, far))


@functools.cache
def processors_of(device: torch.device) -> int:
    """Streaming multiprocessors, or compute units."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


_precision = getattr(torch._C, "_get_fp32_precision_getter", None)  # of PyTorch 2.9 and later


def tf32_allowed() -> bool:
    """Whether PyTorch's setting allows TF32 in matrix products of float32."""
    # Once the newer setting is set, the older ones raise where they are read.
    return torch.backends.cuda.matmul.allow_tf32 if _precision is None else _precision("cuda", "matmul") == "tf32"


# --- launches


class Launch:
    """Launches of one kernel, with arguments of one kind and the same constants, on one device.

    Triton binds and specializes the arguments of every launch anew, which takes 40 to 80 us on the host. After the
    first launch this calls what was compiled. Settings of Triton that change what is compiled (its debugging and
    instrumentation) are those of the first launch; hooks on launches are called.
    """

    __slots__ = ("compiled", "constants", "current_stream", "device", "head", "kernel", "run", "tail")

    def __init__(self, kernel: Any, constants: Mapping[str, Any], device: int) -> None:
        self.kernel, self.constants, self.device = kernel, dict(constants), device
        self.compiled: Any = None
        self.run: Any = None  # what launches it
        self.current_stream: Any = None  # of a device
        self.head: tuple[Any, ...] = ()  # of its arguments those that say what is launched
        self.tail: tuple[Any, ...] = ()  # of all arguments: those that are constants

    def start(self, grid: Sequence[int], args: Sequence[Any], rest: Sequence[Any] = ()) -> None:
        """`kernel[grid](*args, *rest, **constants)`; args and rest of the kind that `prepare` was called with."""
        device = self.device
        if device >= 0 and device != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self.start(grid, args, rest)
        run = self.run
        if run is None:
            return self._first(grid, (*args, *rest))
        stream = self.current_stream(device)
        hooks = triton.knobs.runtime
        enter, leave = hooks.launch_enter_hook, hooks.launch_exit_hook
        about = None
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
            about = self.compiled.launch_metadata(tuple(grid), stream, *args, *rest, *self.tail)
        else:
            enter = leave = None
        run(*grid, *ONES[len(grid) :], stream, *self.head, about, enter, leave, *args, *rest, *self.tail)
        return None

    __call__ = start  # which takes the host longer

    def _first(self, grid: Sequence[int], args: Sequence[Any]) -> None:
        compiled = self.kernel[tuple(grid)](*args, **self.constants)
        if compiled is None or not isinstance(self.kernel, JITFunction):
            return  # the interpreter
        if not triton.__version__.startswith(KNOWN_TRITON) or self.kernel.pre_run_hooks:
            return
        rest = self.kernel.params[len(args) :]
        self.tail = tuple(self.constants.get(parameter.name, parameter.default) for parameter in rest)
        self.compiled, self.run, self.head = compiled, compiled.run, (compiled.function, compiled.packed_metadata)
        self.current_stream = driver.active.get_current_stream


_prepared: dict[tuple[Any, ...], Launch] = {}


def _key(kernel: Any, args: Sequence[Any], constants: Mapping[str, Any]) -> tuple[tuple[Any, ...], int] | None:
    """What Triton specializes a kernel for, as finely as it does or more so, and the device; None if that is unknown.

    Of tensors the dtype and whether they lie at a multiple of 16 bytes; of ints whether they are 1, multiples of 16,
    and in 32 bits.
    """
    key: list[Any] = [id(kernel), *constants.items()]
    device = None
    for value in args:
        if value is None or type(value) is float:
            key.append(type(value))
        elif type(value) is int:
            kind = 1 if value == 1 else 16 if value % 16 == 0 else 0
            key.append(kind if -(2**31) <= value < 2**31 else kind + 2 if value < 2**63 else kind + 3)
        elif isinstance(value, Tensor):
            key += (value.dtype, value.data_ptr() % 16 == 0)
            device = value.get_device() if device is None else device
        elif hasattr(value, "block_shape"):  # a tensor descriptor
            base = value.base
            fixed = (tuple(value.block_shape), value.padding, getattr(value, "round_f32_to_tf32", False))
            key += (base.dtype, base.data_ptr() % 16 == 0, *fixed)
            device = base.get_device() if device is None else device
        else:
            return None
    device = -1 if device is None else device
    key.append(device)
    return tuple(key), device


def prepare(kernel: Any, args: Sequence[Any], constants: Mapping[str, Any]) -> Launch:
    """For several launches of a kernel whose arguments differ only in values that it is not specialized for.

    Args:
        kernel: a `@triton.jit` function whose last arguments are constants.
        args: the arguments of the first launch that are no constants, in order, a tensor among them.
        constants: by name, all `tl.constexpr` arguments, and options as num_warps.
    """
    known = _key(kernel, args, constants) if isinstance(kernel, JITFunction) else None
    if known is None:
        bases = (getattr(value, "base", value) for value in args)  # of tensor descriptors
        return Launch(kernel, constants, next(value.get_device() for value in bases if isinstance(value, Tensor)))
    key, device = known
    prepared = _prepared.get(key)
    if prepared is None:
        prepared = _prepared[key] = Launch(
            kernel, constants, device
        )  # it holds the kernel, so that its id stays its own
    return prepared


def launch(kernel: Any, grid: Sequence[int], args: Sequence[Any], constants: Mapping[str, Any]) -> None:
    """`kernel[grid](*args, **constants)` on the tensors' device and its current stream; arguments of `prepare`."""
    prepare(kernel, args, constants)(grid, args)


class Launches:
    """Launches of one kernel in which only the tensors differ, its first arguments: those of one kind (see `_key`)."""

    __slots__ = ("arguments", "constants", "grid", "head", "kernel", "ready", "run", "tail")

    def __init__(self, kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], **constants: Any) -> None:
        self.kernel, self.grid, self.arguments, self.constants = kernel, grid, arguments, constants
        self.ready: Any = None
        self.run: Any = None

    def start(self, *tensors: Any) -> None:
        run, ready = self.run, self.ready
        if run is None:
            return self._first(tensors)
        device, hooks = ready.device, triton.knobs.runtime
        enter, leave = hooks.launch_enter_hook, hooks.launch_exit_hook
        if (
            getattr(enter, "calls", enter)
            or getattr(leave, "calls", leave)
            or (device >= 0 and device != torch.cuda.current_device())
        ):
            return ready.start(self.grid, tensors, self.arguments)
        run(*self.grid, ready.current_stream(device), *self.head, *tensors, *self.tail)
        return None

    def _first(self, tensors: tuple[Any, ...]) -> None:
        if self.ready is None:
            self.ready = prepare(self.kernel, tensors + self.arguments, self.constants)
        self.ready.start(self.grid, tensors, self.arguments)
        if self.ready.run is not None:
            self.run, self.grid = self.ready.run, (*self.grid, *ONES[len(self.grid) :])
            self.head, self.tail = (*self.ready.head, None, None, None), self.arguments + self.ready.tail

    __call__ = start  # which takes the host longer
