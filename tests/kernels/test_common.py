"""The cached launch calls what Triton's own would call, with the same arguments; sizes; empty maps."""

import itertools
import random
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")
import triton
from mocked_driver import installed
from triton import language as tl
from triton.runtime.jit import JITFunction

from fastgen.kernels import common


def add_kernel(x_ptr, y_ptr, alpha, n, stride, step, BLOCK: tl.constexpr, ABSENT: tl.constexpr, SIGN: tl.constexpr = 1):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i * stride, i < n) * alpha + step)


@pytest.fixture
def mocked(monkeypatch):
    monkeypatch.setattr(common, "_prepared", {})
    return installed(monkeypatch)


def fresh(**options):
    """Two of one kernel: launched by Triton, and from the cache."""
    options = {"do_not_specialize": ("step",), **options}
    return JITFunction(add_kernel, **options), JITFunction(add_kernel, **options)


def tensors():
    memory = torch.zeros(64)
    return [memory, memory[4:], memory[1:], memory[2:].bfloat16(), memory.half()[8:], memory.long(), memory.bool()]


SIZES = (0, 1, 2, 15, 16, 17, -16, -1, 2**31 - 16, 2**31 - 1, 2**31, -(2**31), -(2**31) - 16, 2**40, 2**40 + 3, 2**63)


def test_the_same_kernel_is_called_with_the_same_arguments(mocked):
    """For combinations by chance: the first launch of each kind and later ones. `function` is Triton's own key, so that
    one that a coarser key of ours had found would not be equal."""
    chance = random.Random(0)
    ordinary, cached = fresh()
    pointers = tensors()
    for _ in range(3000):
        args = [chance.choice(pointers), chance.choice([*pointers, None]), chance.choice([0.5, 1.0, 16.0])]
        args += [chance.choice(SIZES) for _ in range(3)]
        constants = {"BLOCK": chance.choice([16, 32]), "ABSENT": chance.choice([None, True]), "num_warps": 4}
        constants |= {"SIGN": -1} if chance.random() < 0.3 else {}
        grid = tuple(chance.choice([1, 3]) for _ in range(chance.choice([1, 2, 3])))
        mocked.stream = chance.randrange(9)
        mocked.launches.clear()
        ordinary[grid](*args, **constants)
        common.launch(cached, grid, args, constants)
        expected, found = mocked.launches
        assert expected[:3] == found[:3]
        assert all(a is b or a == b for a, b in zip(expected[5], found[5], strict=True))


def test_later_launches_do_not_bind(mocked, monkeypatch):
    """Of one kind, and of another that Triton would not tell apart: at most one more of its own launches each."""
    _, kernel = fresh()
    ordinary = []
    run = JITFunction.run
    monkeypatch.setattr(JITFunction, "run", lambda self, *a, **k: ordinary.append(a) or run(self, *a, **k))
    x = torch.zeros(64)
    for n in (32, 48, 64, 160):
        common.launch(kernel, (n,), (x, x[4:], 0.5, n, 1, n), {"BLOCK": 16, "ABSENT": None})
    assert len(ordinary) == 1 and [call[0] for call in mocked.launches] == [(n, 1, 1) for n in (32, 48, 64, 160)]
    common.launch(kernel, (1,), (x, x[1:], 0.5, 32, 1, 32), {"BLOCK": 16, "ABSENT": None})
    common.launch(kernel, (1,), (x, x, 0.5, 32, 1, 32), {"BLOCK": 16, "ABSENT": None, "num_warps": 8})
    assert len(ordinary) == 3


def test_prepared_once_for_many(mocked):
    _, kernel = fresh()
    x = torch.zeros(64)
    step = common.prepare(kernel, (x, x, 0.5, 48, 1, 0), {"BLOCK": 16, "ABSENT": None})
    for number in range(20):  # which is not specialized
        step((2, 5), (x, x, 0.5, 48, 1, number))
    assert [call[5][5] for call in mocked.launches] == list(range(20))
    assert len({call[2] for call in mocked.launches}) == 1 and len(kernel.device_caches[0][0]) == 1


def test_two_kernels_of_one_name(mocked):
    one, other = fresh()
    x = torch.zeros(64)
    for kernel in (one, other, one):
        common.launch(kernel, (1,), (x, x, 0.5, 3, 3, 3), {"BLOCK": 16, "ABSENT": None})
    assert len(one.device_caches[0][0]) == len(other.device_caches[0][0]) == 1


def test_descriptors(mocked):
    """A tensor descriptor's dtype, box and padding, not its sizes."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    ordinary, cached = fresh()
    y = torch.zeros(64)
    made = [
        TensorDescriptor(torch.zeros(n, 64, dtype=dtype), [n, 64], [64, 1], [16, box], padding)
        for n, dtype, box, padding in itertools.product(
            (16, 24), (torch.float32, torch.bfloat16), (16, 32), ("zero", "nan")
        )
    ]
    for descriptor in made:
        mocked.launches.clear()
        args, constants = (descriptor, y, 0.5, 3, 3, 3), {"BLOCK": 16, "ABSENT": None}
        ordinary[(1,)](*args, **constants)
        common.launch(cached, (1,), args, constants)
        assert mocked.launches[0][2] == mocked.launches[1][2] and mocked.launches[1][5][0] is descriptor
    assert len(common._prepared) == len(made) // 2


def test_hooks_are_called(mocked):
    _, kernel = fresh()
    x = torch.zeros(64)
    arguments = (kernel, (1,), (x, x, 0.5, 3, 3, 3), {"BLOCK": 16, "ABSENT": None})
    common.launch(*arguments)
    common.launch(*arguments)
    assert mocked.launches[1][3:5] == (None, (None, None))
    runtime = triton.knobs.runtime
    hook = lambda metadata: None  # noqa: E731
    runtime.launch_enter_hook.add(hook)
    try:
        common.launch(*arguments)
    finally:
        runtime.launch_enter_hook.remove(hook)
    assert mocked.launches[2][3] == {"name": "add_kernel"}
    assert mocked.launches[2][4] == (runtime.launch_enter_hook, runtime.launch_exit_hook)


@pytest.mark.parametrize("hooked", [False, True])
def test_launches_in_which_only_the_tensors_differ(hooked, mocked):
    """Call what `launch` calls, also where a hook comes later."""
    _, kernel = fresh()
    x, y = torch.zeros(64), torch.zeros(64)
    numbers, constants = (0.5, 48, 1, 5), {"BLOCK": 16, "ABSENT": None}
    launches = common.Launches(kernel, (2, 5), numbers, **constants)
    launches(x, x)
    enter, hook = triton.knobs.runtime.launch_enter_hook, lambda metadata: None
    for one, other in ((x, y), (y, x)):
        mocked.launches.clear()
        if hooked:
            enter.add(hook)
        try:
            common.launch(kernel, (2, 5), (one, other, *numbers), constants)
            launches(one, other)
        finally:
            enter.remove(hook)
        expected, found = mocked.launches
        assert expected[:5] == found[:5] and (found[3] is not None) == hooked
        assert all(a is b or a == b for a, b in zip(expected[5], found[5], strict=True))


@pytest.mark.parametrize("case", ["unknown Triton", "hook of the kernel", "bool"])
def test_what_is_not_known_is_launched_as_ever(mocked, monkeypatch, case):
    _, kernel = fresh()
    ordinary = []
    run = JITFunction.run
    monkeypatch.setattr(JITFunction, "run", lambda self, *a, **k: ordinary.append(a) or run(self, *a, **k))
    if case == "unknown Triton":
        monkeypatch.setattr(triton, "__version__", "4.0.0")
    if case == "hook of the kernel":
        kernel.add_pre_run_hook(lambda *args, **constants: None)
    x = torch.zeros(64)
    for _ in range(3):
        args = (x, x, case == "bool" or 0.5, 3, 3, 3)
        common.launch(kernel, (1,), args, {"BLOCK": 16, "ABSENT": None})
    assert len(ordinary) == len(mocked.launches) == 3


def test_the_device_of_the_tensors_is_current(mocked, monkeypatch):
    """Two pretended GPUs."""
    current = [0]
    entered = []

    class Guard:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            entered.append(self.index)
            self.before, current[0] = current[0], self.index

        def __exit__(self, *error):
            current[0] = self.before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", Guard)
    monkeypatch.setattr(mocked, "get_current_device", lambda: current[0])
    monkeypatch.setattr(mocked, "get_current_stream", lambda device: 100 + device)

    class OnGpu(torch.Tensor):
        def get_device(self):
            return self.index

    def on(index):
        x = torch.zeros(64).as_subclass(OnGpu)
        x.index = index
        return x

    _, kernel = fresh()
    for index in (1, 1, 0, 1):
        x = on(index)
        common.launch(kernel, (1,), (None, x, 0.5, 3, 3, 3), {"BLOCK": 16, "ABSENT": None})
    launches = common.Launches(kernel, (1,), (0.5, 3, 3, 3), BLOCK=16, ABSENT=None)
    for _ in range(3):
        launches(None, on(1))
    assert [call[1] for call in mocked.launches] == [101, 101, 100, 101, 101, 101, 101]
    assert entered == [1] * 6 and current == [0]


def test_sizes():
    for n in range(1, 70):
        assert common.next_power_of_2(n) == triton.next_power_of_2(n)
        assert all(common.cdiv(n, m) == triton.cdiv(n, m) for m in range(1, 20))
    assert common.cdiv(0, 3) == 0


@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (1, 5, 3, 4), (2, 1, 3, 4), (2, 5, 1, 1), (0, 5, 3, 4)])
def test_empty_map(shape):
    like = torch.zeros(shape[0], 7, 9, 9, dtype=torch.bfloat16)
    found = common.empty_map(like, *shape[1:])
    assert found.shape == shape and found.dtype == torch.bfloat16 and found._base is None
    assert found.permute(0, 2, 3, 1).is_contiguous()
    assert common.empty_map(like, *shape[1:], torch.float32).dtype == torch.float32


SETTINGS = {
    "torch.set_float32_matmul_precision('high')": True,
    "torch.set_float32_matmul_precision('highest')": False,
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'": True,
    "torch.backends.cuda.matmul.fp32_precision = 'ieee'": False,
    "torch.backends.fp32_precision = 'tf32'": True,
    "torch.backends.cuda.matmul.allow_tf32 = True": True,
    "pass": False,
}


EACH = """
import os, sys, torch
from fastgen.kernels.common import tf32_allowed
for setting in sys.argv[1:]:
    if os.fork() == 0:
        exec(setting)
        print(tf32_allowed(), flush=True)
        os._exit(0)
    os.wait()
"""


def test_every_way_to_allow_tf32_is_read():
    """In processes of their own: after a newer setting the older ones cannot be read any more."""
    newer = hasattr(torch.backends, "fp32_precision")
    settings = [one for one in SETTINGS if newer or "fp32_precision" not in one]
    found = subprocess.run([sys.executable, "-c", EACH, *settings], capture_output=True, text=True)
    assert found.stdout.split() == [str(SETTINGS[one]) for one in settings], found.stderr
