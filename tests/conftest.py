"""Without a GPU the kernels run in Triton's interpreter, which must be chosen before they are defined.

`pytest -m gpu` on a GPU runs the tests marked so and all that use the fixture `device`; `-m "gpu and not slow"` those
that take few minutes; `python -m benchmarks gpu-tests` does so in several processes, and saves how it went as a row.
"""

import ast
import dataclasses
import importlib.util
import os
import sys

import numpy as np
import pytest
import torch

CUDA = torch.cuda.is_available()
WORKER = "PYTEST_XDIST_WORKER" in os.environ
PACKAGES = (
    "hypothesis",
    "mpmath",
    "safetensors",
    "PIL",
    "sklearn",
    "matplotlib",
    "constriction",
)  # not on every machine with a GPU
HELD = 2e9  # bytes: what a test leaves cached beyond them goes back to the GPU

if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")
if WORKER:
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start


def pytest_ignore_collect(collection_path):
    """A file whose imports are not installed is not collected; the header says so."""
    return bool(_missing(collection_path)) or None


def _missing(path):
    if path.suffix != ".py":
        return []
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    return sorted(name for name in names & set(PACKAGES) if importlib.util.find_spec(name) is None)


def pytest_report_header(config):
    files = sorted((config.rootpath / "tests").rglob("*.py"))
    return [f"not collected: {file.name} needs {', '.join(_missing(file))}" for file in files if _missing(file)]


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(config, items):
    if not CUDA:
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
        return
    # What is launched by default comes first, then what only a GPU can show.
    items.sort(key=lambda item: 0 if "every_launch" in item.name else 1 if "gpu" in item.keywords else 2)
    for item in items:
        if "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)


def _lost():
    """Whether the GPU answers nothing more in this process."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """After an illegal memory access the GPU answers nothing more in this process, and all later tests would fail. Of
    several processes this one ends, and pytest-xdist starts another; a single one stops."""
    report = yield
    if CUDA and report.failed and _lost():
        if WORKER:
            print(report.longreprtext, file=sys.stderr, flush=True)
            os._exit(3)
        item.session.shouldstop = f"the GPU answers nothing more after {item.nodeid}"
    return report


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _memory_goes_back():
    yield
    if CUDA and torch.cuda.memory_reserved() > HELD:
        torch.cuda.empty_cache()


@pytest.fixture(scope="session", autouse=True)
def _interpreter():
    """Triton's interpreter refuses masks of loads and stores that are not bool, as that of Triton 3.9 does by itself.

    It does not compute integers a second time to see whether they overflow: it would assert it only with the option
    `debug`, which an interpreter never has, and spends a quarter of its time so. A function that a kernel calls does
    not replace Triton's language by the interpreter's once more, another quarter. NumPy's dtypes are found once.
    """
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        yield
        return
    from triton import language
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, interpreter_builder

    def checked(method, place):
        def call(self, *arguments, **more):
            kind = np.asarray(arguments[place].data).dtype
            if kind != np.bool_:
                raise TypeError(f"the mask of a load or a store is not bool but {kind}")
            return method(self, *arguments, **more)

        return call

    def replaced_once(function, replace=interpreter._patch_lang):
        members = (language.load, language.core.load, language.tensor.__add__)
        if any(map(language.core.is_builtin, members)):
            return replace(function)
        return interpreter._LangPatchScope()

    numpy_dtypes = {}

    def numpy_dtype(dtype, find=interpreter._get_np_dtype):
        scalar = dtype.scalar
        if scalar.name not in numpy_dtypes:
            numpy_dtypes[scalar.name] = find(scalar)
        return numpy_dtypes[scalar.name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_get_np_dtype", numpy_dtype)
        patch.setattr(interpreter, "_patch_lang", replaced_once)
        for name, place in (("create_masked_load", 1), ("create_masked_store", 2)):
            patch.setattr(InterpreterBuilder, name, checked(getattr(InterpreterBuilder, name), place))
        options = dataclasses.replace(interpreter_builder.options, sanitize_overflow=False)
        patch.setattr(interpreter_builder, "options", options)
        yield


@pytest.fixture
def device():
    return "cuda" if CUDA else "cpu"


@pytest.fixture
def full_memory():
    """Memory that a kernel should write starts as NaN; float32 is float32."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def kernels_wherever_they_can(monkeypatch):
    """The masked convolution runs its kernels also where cuDNN is expected to be faster; nothing is remembered."""
    from fastgen.kernels.masked_conv2d import config, launch

    launch.forget()
    monkeypatch.setattr(config, "ALWAYS_KERNELS", True)
    yield
    launch.forget()
